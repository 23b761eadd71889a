# Each kind of gateway that Nomad injects, in bridge mode, a service behind them and one
# that dials a service outside the mesh; and an ingress gateway on the node's own
# network. Envoy's administration of "exit" is bound to every address.
job "gateway-bridge" {
  group "ingress" {
    network {
      mode = "bridge"
      port "inbound" {
        static = 9080
        to     = 9080
      }
    }
    service {
      name = "gw-ingress"
      port = "9080"
      meta {
        weir-guard = "enforce"
      }
      connect {
        gateway {
          proxy {}
          ingress {
            listener {
              port     = 9080
              protocol = "http"
              service {
                name  = "gw-api"
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
      mode = "bridge"
    }
    service {
      name = "gw-exit"
      meta {
        weir-guard = "enforce"
      }
      connect {
        gateway {
          proxy {}
          terminating {
            service {
              name = "gw-legacy"
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
      mode = "bridge"
      port "wan" {}
    }
    service {
      name = "gw-mesh"
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

  group "host" {
    network {
      mode = "host"
      port "inbound" {
        static = 9081
      }
    }
    service {
      name = "gw-host"
      port = "inbound"
      connect {
        gateway {
          proxy {}
          ingress {
            listener {
              port     = 9081
              protocol = "http"
              service {
                name  = "gw-api"
                hosts = ["*"]
              }
            }
          }
        }
      }
    }
  }

  group "api" {
    network {
      mode = "bridge"
    }
    service {
      name = "gw-api"
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
      mode = "bridge"
    }
    service {
      name = "gw-web"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "gw-legacy"
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
