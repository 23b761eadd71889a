# Every exclusion that a job can name, a static port without "to", an IPv6 CIDR and a
# sidecar port of the job's own. consul-cni fails the last two.
job "exclusions" {
  group "client" {
    network {
      mode = "bridge"
      port "metrics" {
        static = 9102
        to     = 9102
      }
      port "numbered" {
        static = 9103
        to     = 9103
      }
      port "untold" {
        static = 9104
      }
    }
    service {
      name = "excl-client"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {
              exclude_inbound_ports  = ["metrics", "9105"]
              exclude_outbound_ports = [9099]
              exclude_outbound_cidrs = ["10.99.0.1/32", "fd00:99::/64"]
              exclude_uids           = ["1234"]
            }
          }
        }
      }
    }
    task "client" {
      driver = "docker"
      config {
        image = "app:node"
        args  = ["serve", ":8080", ":9102", ":9103", ":9104", ":9105"]
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
      port "envoy" {
        to = 20999
      }
    }
    service {
      name = "excl-server"
      port = "8080"
      connect {
        sidecar_service {
          port                      = "envoy"
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
        args  = ["serve", "127.0.0.1:8080"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
