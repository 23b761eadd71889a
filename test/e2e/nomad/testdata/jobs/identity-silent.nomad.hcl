# Proxies that never listen, as every proxy is at first.
job "identity-silent" {
  group "exec" {
    network {
      mode = "bridge"
    }
    service {
      name = "id-silent-exec"
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
            command = "app"
            args    = ["pause"]
          }
        }
      }
    }
    task "app" {
      driver = "exec"
      user   = "app"
      config {
        command = "app"
        args    = ["serve", ":8080"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }

    task "envoy" {
      driver = "exec"
      user   = "envoy"
      config {
        command = "app"
        args    = ["serve", "127.0.0.1:8082"]
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
      name = "id-silent-docker"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {}
          }
        }
        sidecar_task {
          driver = "docker"
          user   = "101"
          config {
            image = "app:node"
            args  = ["pause"]
          }
        }
      }
    }
    task "app" {
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

    task "envoy" {
      driver = "docker"
      user   = "101"
      config {
        image = "app:node"
        args  = ["serve", "127.0.0.1:8082"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
