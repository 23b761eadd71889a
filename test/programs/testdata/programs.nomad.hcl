# A client that holds Debian's programs, a server of HTTP and a Redis, each in a container
# that may talk through its proxy alone. NTP is excluded by its port.
job "programs" {
  group "client" {
    network {
      mode = "bridge"
    }
    service {
      name = "prog-client"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          meta {
            weir-guard  = "enforce"
            weir-egress = "enforce"
          }
          proxy {
            transparent_proxy {
              exclude_outbound_ports = ["123"]
            }
          }
        }
      }
    }
    task "client" {
      driver       = "docker"
      kill_timeout = "1s"
      config {
        image   = "programs:node"
        command = "/usr/local/bin/app"
        args    = ["pause"]
      }
      resources {
        cpu    = 50
        memory = 1024
      }
    }
  }

  group "api" {
    network {
      mode = "bridge"
    }
    service {
      name = "prog-api"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          meta {
            weir-guard  = "enforce"
            weir-egress = "enforce"
          }
          proxy {
            transparent_proxy {}
          }
        }
      }
    }
    task "api" {
      driver       = "docker"
      kill_timeout = "1s"
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

  group "redis" {
    network {
      mode = "bridge"
    }
    service {
      name = "prog-redis"
      port = "6379"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          meta {
            weir-guard  = "enforce"
            weir-egress = "enforce"
          }
          proxy {
            transparent_proxy {}
          }
        }
      }
    }
    task "redis" {
      driver       = "docker"
      kill_timeout = "1s"
      config {
        image   = "programs:node"
        command = "/usr/bin/redis-server"
        args    = ["--save", "", "--dir", "/tmp"] # on every address, as in Redis's own image; the guard is what keeps others out
      }
      resources {
        cpu    = 50
        memory = 128
      }
    }
  }
}
