# Tasks that dial the mesh, in their first moment, and end.
variable "type" {}

job "drivers-batch" {
  type = var.type

  group "batch" {
    network {
      mode = "bridge"
    }
    restart {
      attempts = 0
      mode     = "fail"
    }
    service {
      name = "drivers-batch"
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
    task "ask" {
      driver = "exec"
      user   = "app"
      config {
        command = "app"
        args    = ["check", "http://drivers-server.virtual.consul/"]
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
    restart {
      attempts = 0
      mode     = "fail"
    }
    service {
      name = "drivers-docker"
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
    task "ask" {
      driver = "docker"
      config {
        image = "app:node"
        args  = ["check", "http://drivers-server.virtual.consul/"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
