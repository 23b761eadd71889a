# Plain connect with upstreams: "client" dials two services whose tasks listen on every
# address. The node counts who comes past their proxies; the second job asks for more.
job "guard-upstreams" {
  group "audit" {
    network {
      mode = "bridge"
      port "mapped" {
        to = 8081
      }
      port "metrics" {
        to = -1
      }
    }
    service {
      name = "guard-audit"
      port = "8080"
      check {
        type     = "http"
        path     = "/health"
        interval = "1s"
        timeout  = "1s"
        expose   = true
      }
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            expose {
              path {
                path            = "/metrics"
                protocol        = "http"
                local_path_port = 8080
                listener_port   = "metrics"
              }
            }
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
    task "app" {
      driver = "exec"
      user   = "app"
      config {
        command = "app"
        args    = ["serve", ":8080", ":8081"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }

  group "enforce" {
    network {
      mode = "bridge"
      port "mapped" {
        to = 8081
      }
      port "metrics" {
        to = -1
      }
    }
    service {
      name = "guard-enforce"
      port = "8080"
      check {
        type     = "http"
        path     = "/health"
        interval = "1s"
        timeout  = "1s"
        expose   = true
      }
      connect {
        sidecar_service {
          meta {
            weir-guard = "enforce"
          }
          proxy {
            expose {
              path {
                path            = "/metrics"
                protocol        = "http"
                local_path_port = 8080
                listener_port   = "metrics"
              }
            }
          }
        }
      }
    }
    task "app" {
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

  group "client" {
    network {
      mode = "bridge"
    }
    service {
      name = "guard-client"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "guard-audit"
              local_bind_port  = 9401
            }
            upstreams {
              destination_name = "guard-enforce"
              local_bind_port  = 9402
            }
          }
        }
      }
    }
    task "client" {
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
