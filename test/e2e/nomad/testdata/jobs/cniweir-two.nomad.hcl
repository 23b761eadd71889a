# Two transparent sidecars of one group, which Nomad's own block does not allow: by the
# job's arguments. Each has an outbound listener of its own (service-defaults).
job "cniweir-two" {
  group "two" {
    network {
      mode = "cni/weir"
      cni {
        args = {
          "weir.mode"         = "transparent"
          "weir.inbound-port" = "${NOMAD_PORT_connect_proxy_cniweir_first}"
          "weir.dns"          = "10.99.0.2:8600"
        }
      }
    }
    service {
      name = "cniweir-first"
      port = "8081"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
        }
      }
    }
    service {
      name = "cniweir-second"
      port = "8082"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
        }
      }
    }
    task "two" {
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

  group "other" {
    network {
      mode = "cni/weir"
    }
    service {
      name = "cniweir-other"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "cniweir-first"
              local_bind_port  = 9191
            }
            upstreams {
              destination_name = "cniweir-second"
              local_bind_port  = 9192
            }
          }
        }
      }
    }
    task "other" {
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
