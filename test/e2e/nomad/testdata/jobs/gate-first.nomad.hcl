# Tasks that dial a service of the mesh in their first moment and end at the first
# error, as many programs do. Nothing in the job waits for Envoy.
variable "count" {
  type    = number
  default = 10
}

job "gate-first" {
  group "first" {
    count = var.count
    network {
      mode = "bridge"
    }
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }
    service {
      name = "gate-first"
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
          resources {
            cpu    = 50
            memory = 128
          }
        }
      }
    }
    task "first" {
      driver = "exec"
      user   = "app"
      config {
        command = "app"
        args    = ["first", "http://gate-api.virtual.consul/"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
