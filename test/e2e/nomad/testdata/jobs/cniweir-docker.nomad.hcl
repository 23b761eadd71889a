# Docker on the network that the plugin builds: "api" is transparent and has a static
# host port, "shop" dials it by virtual name, "web" is a plain connect job with an
# upstream, host ports of both kinds and the guard.
job "cniweir-docker" {
  group "api" {
    network {
      mode = "cni/weir"
      port "static" {
        static = 28081
        to     = 8081
      }
    }
    service {
      name = "cniweir-api"
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
    task "api" {
      driver = "docker"
      config {
        image = "app:node"
        args  = ["serve", ":8080", ":8081"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }

  group "shop" {
    network {
      mode = "cni/weir"
    }
    service {
      name = "cniweir-shop"
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
    task "shop" {
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

  group "web" {
    network {
      mode = "cni/weir"
      port "dynamic" {
        to = 8082
      }
      port "untold" {
        static = 28083
      }
    }
    service {
      name = "cniweir-web"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          meta {
            weir-guard = "enforce"
          }
          proxy {
            upstreams {
              destination_name = "cniweir-api"
              local_bind_port  = 9191
            }
          }
        }
      }
    }
    task "web" {
      driver = "docker"
      config {
        image = "app:node"
        args  = ["serve", ":8080", ":8082", "udp::8082", ":28083"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
