# What a datacenter gives to its peer: servers, and the gateways that they are reached by.
variable "round" {
  type = string
}

job "peered" {
  update {
    max_parallel      = 1
    min_healthy_time  = "2s"
    health_check      = "checks"
    healthy_deadline  = "60s"
    progress_deadline = "90s"
  }

  group "gateway" {
    count          = 2
    shutdown_delay = "5s"
    network {
      mode = "bridge"
      port "wan" {}
    }
    service {
      name = "mesh-gateway"
      port = "wan"
      connect {
        gateway {
          proxy {}
          mesh {}
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
  }

  group "server" {
    count          = 2
    shutdown_delay = "5s"
    network {
      mode = "bridge"
    }
    service {
      name = "peered-server"
      port = "8080"
      check {
        type     = "http"
        path     = "/health"
        interval = "1s"
        timeout  = "2s"
        expose   = true
      }
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
      driver = "exec"
      user   = "app"
      config {
        command = "app"
        args    = ["serve", ":8080"]
      }
      env {
        ROUND = var.round
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
