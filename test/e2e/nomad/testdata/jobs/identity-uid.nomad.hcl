# Tasks that run under Envoy's UID, beside an Envoy each.
job "identity-uid" {
  group "exec" {
    network {
      mode = "bridge"
    }
    service {
      name = "id-exec"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {}
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
      user   = "envoy"
      config {
        command = "app"
        args    = ["serve", ":8080"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }

  group "docker" {
    network {
      mode = "bridge"
    }
    service {
      name = "id-docker"
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
    task "app" {
      driver = "docker"
      user   = "101"
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
      name = "id-server"
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
    task "app" {
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
