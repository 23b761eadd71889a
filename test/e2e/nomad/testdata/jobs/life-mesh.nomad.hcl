# A transparent client and server in any network mode, under a name of one's own.
variable "id" {}
variable "mode" {}

job "life-mesh" {
  id = var.id

  group "server" {
    network {
      mode = var.mode
    }
    restart {
      attempts = 10
      delay    = "2s"
      mode     = "delay"
    }
    service {
      name = "${var.id}-server"
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
    task "server" {
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

  group "client" {
    network {
      mode = var.mode
    }
    restart {
      attempts = 10
      delay    = "2s"
      mode     = "delay"
    }
    service {
      name = "${var.id}-client"
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
    task "client" {
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
