# Tasks that dial in their first moment beside a proxy that never listens.
job "gate-silent" {
  group "exec" {
    network {
      mode = "bridge"
    }
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }
    service {
      name = "gate-silent-exec"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          meta {
            weir-gate = "15s"
          }
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
    task "exec" {
      driver = "exec"
      user   = "app"
      config {
        command = "app"
        args    = ["first", "http://gate-api.virtual.consul/"]
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
    reschedule {
      attempts  = 0
      unlimited = false
    }
    service {
      name = "gate-silent-docker"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          meta {
            weir-gate = "15s"
          }
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
    task "docker" {
      driver = "docker"
      config {
        image = "app:node"
        args  = ["first", "http://gate-api.virtual.consul/"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
