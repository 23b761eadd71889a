# Both families, on a network with a range of each: "plain" may leave, "closed" is
# transparent and lets nothing past the mesh, in or out.
job "cniweir-six" {
  group "plain" {
    network {
      mode = "cni/weir6"
    }
    service {
      name = "cniweir-plain"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "cniweir-closed"
              local_bind_port  = 9191
            }
          }
        }
      }
    }
    task "plain" {
      driver = "docker"
      config {
        image = "app:node"
        args  = ["serve", ":8080"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }

  group "closed" {
    network {
      mode = "cni/weir6"
    }
    service {
      name = "cniweir-closed"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {}
          }
        }
      }
    }
    task "closed" {
      driver = "docker"
      config {
        image = "app:node"
        args  = ["serve", ":8080"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
