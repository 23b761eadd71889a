# An allocation whose task may not die: Nomad then places another one.
variable "id" {}
variable "mode" {}

job "life-fragile" {
  id = var.id

  group "fragile" {
    network {
      mode = var.mode
    }
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      delay          = "5s"
      delay_function = "constant"
      unlimited      = true
    }
    service {
      name = "${var.id}-fragile"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {}
          }
        }
        sidecar_task {
          driver = "exec"
          user   = "envoy"
          config {
            command = "envoy"
            args    = ["-c", "${NOMAD_SECRETS_DIR}/envoy_bootstrap.json", "--disable-hot-restart", "--concurrency", "1"]
          }
        }
      }
    }
    task "fragile" {
      driver       = "exec"
      user         = "app"
      kill_timeout = "1s"
      config {
        command = "app"
        args    = ["serve", ":8080"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
