# Tasks that dial a service of the mesh in their first moment and end at the first
# error, as many programs do. Nothing in the job waits for Envoy.
variable "count" {
  type    = number
  default = 10
}

# How many of each dial by an explicit upstream.
variable "upstreams" {
  type    = number
  default = 0
}

variable "id" {
  type    = string
  default = "gate-first"
}

job "gate-first" {
  id = var.id
  group "implicit" {
    count = var.count
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
      name = "gate-implicit"
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
          resources {
            cpu    = 50
            memory = 128
          }
        }
      }
    }
    task "implicit" {
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

  group "explicit" {
    count = var.upstreams
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
      name = "gate-explicit"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {}
            upstreams {
              destination_name = "gate-api"
              local_bind_port  = 9191
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
          resources {
            cpu    = 50
            memory = 128
          }
        }
      }
    }
    task "explicit" {
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

  group "plain" {
    count = var.upstreams
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
      name = "gate-plain"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "gate-api"
              local_bind_port  = 9191
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
          resources {
            cpu    = 50
            memory = 128
          }
        }
      }
    }
    task "plain" {
      driver = "exec"
      user   = "app"
      config {
        command = "app"
        args    = ["first", "http://127.0.0.1:9191/"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }

  group "docker" {
    count = var.count
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
      name = "gate-docker"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {}
          }
        }
        sidecar_task {
          resources {
            cpu    = 50
            memory = 128
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
