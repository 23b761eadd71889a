# The service that the tasks of gate-first.nomad.hcl dial.
job "gate-api" {
  group "api" {
    network {
      mode = "bridge"
    }
    service {
      name = "gate-api"
      port = "8080"
      connect {
        sidecar_service {
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
    task "api" {
      driver = "exec"
      user   = "app"
      config {
        command = "app"
        args    = ["serve", "127.0.0.1:8080"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
