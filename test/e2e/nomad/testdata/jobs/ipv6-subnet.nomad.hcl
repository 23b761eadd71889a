# Allocations that have an IPv6 address, too, and tasks that listen on both families.
job "ipv6-subnet" {
  group "client" {
    network {
      mode = "bridge"
    }
    service {
      name = "v6-client"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {
              exclude_outbound_cidrs = ["fd00:99::3/128"]
            }
          }
        }
      }
    }
    task "client" {
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

  group "server" {
    network {
      mode = "bridge"
    }
    service {
      name = "v6-server"
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
    task "server" {
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

  group "plain" {
    network {
      mode = "bridge"
      port "mapped" {
        static = 9601
        to     = 8081
      }
    }
    service {
      name = "v6-plain"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "v6-server"
              local_bind_port  = 9602
            }
          }
        }
      }
    }
    task "plain" {
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
}
