# Two services of one group, each with a sidecar of its own, and a third group that
# asks both.
job "cniweir-pair" {
  group "pair" {
    network {
      mode = "cni/weir"
    }
    service {
      name = "cniweir-left"
      port = "8081"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          meta {
            weir-guard = "enforce"
          }
          proxy {
            upstreams {
              destination_name = "cniweir-caller"
              local_bind_port  = 9191
            }
          }
        }
      }
    }
    service {
      name = "cniweir-right"
      port = "8082"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "cniweir-caller"
              local_bind_port  = 9192
            }
          }
        }
      }
    }
    task "pair" {
      driver = "docker"
      config {
        image = "app:node"
        args  = ["serve", ":8081", ":8082"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }

  group "caller" {
    network {
      mode = "cni/weir"
    }
    service {
      name = "cniweir-caller"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "cniweir-left"
              local_bind_port  = 9191
            }
            upstreams {
              destination_name = "cniweir-right"
              local_bind_port  = 9192
            }
          }
        }
      }
    }
    task "caller" {
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
