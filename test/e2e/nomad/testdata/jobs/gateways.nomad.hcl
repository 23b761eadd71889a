# Each kind of gateway that Nomad injects, in a network mode, a service behind them and
# one that dials a service outside the mesh. Envoy's administration of "exit" is bound
# to every address.
variable "id" {}
variable "mode" {}
variable "door" {}

job "gateways" {
  id = var.id

  group "ingress" {
    network {
      mode = var.mode
      port "inbound" {
        static = var.door
        to     = var.door
      }
    }
    service {
      name = "${var.id}-ingress"
      port = var.door
      meta {
        weir-guard = "enforce"
      }
      connect {
        gateway {
          proxy {}
          ingress {
            listener {
              port     = var.door
              protocol = "http"
              service {
                name  = "${var.id}-api"
                hosts = ["*"]
              }
            }
          }
        }
      }
    }
  }

  group "exit" {
    network {
      mode = var.mode
    }
    service {
      name = "${var.id}-exit"
      meta {
        weir-guard = "enforce"
      }
      connect {
        gateway {
          proxy {}
          terminating {
            service {
              name = "${var.id}-legacy"
            }
          }
        }
        sidecar_task {
          driver = "exec"
          user   = "envoy"
          config {
            command = "envoy"
            args    = ["-c", "${NOMAD_SECRETS_DIR}/envoy_bootstrap.json", "--disable-hot-restart", "--concurrency", "1",
              "--config-yaml", "admin: { address: { socket_address: { address: 0.0.0.0, port_value: 19000 } } }"]
          }
        }
      }
    }
  }

  group "mesh" {
    network {
      mode = var.mode
      port "wan" {}
    }
    service {
      name = "${var.id}-mesh"
      port = "wan"
      meta {
        weir-guard = "enforce"
      }
      connect {
        gateway {
          proxy {}
          mesh {}
        }
      }
    }
  }

  group "api" {
    network {
      mode = var.mode
    }
    service {
      name = "${var.id}-api"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
        }
      }
    }
    task "api" {
      driver = "docker"
      config {
        image = "app:node"
        args  = ["serve", "127.0.0.1:8080"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }

  group "web" {
    network {
      mode = var.mode
    }
    service {
      name = "${var.id}-web"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "${var.id}-legacy"
              local_bind_port  = 9501
            }
          }
        }
      }
    }
    task "web" {
      driver = "docker"
      config {
        image = "app:node"
        args  = ["serve", "127.0.0.1:8080"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
