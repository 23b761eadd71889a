# Transparent proxy with the exec driver: "api" is bound to loopback and has a health
# check that only Envoy's exposed path can answer; "web" dials it by virtual name and
# has an explicit upstream beside; "raw" does it with raw_exec; "old" is a plain connect
# job with an upstream.
job "tproxy-exec" {
  group "api" {
    network {
      mode = "bridge"
    }
    service {
      name = "exec-api"
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

  group "web" {
    network {
      mode = "bridge"
    }
    restart {
      attempts = 5
      delay    = "4s"
      mode     = "delay"
    }
    service {
      name = "exec-web"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {}
            upstreams {
              destination_name = "exec-api"
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
        }
      }
    }
    task "web" {
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
  }

  group "old" {
    network {
      mode = "bridge"
    }
    service {
      name = "exec-old"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "exec-api"
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
        }
      }
    }
    task "old" {
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

  group "raw" {
    network {
      mode = "bridge"
    }
    service {
      name = "exec-raw"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {}
          }
        }
        sidecar_task {
          driver = "raw_exec"
          user   = "envoy"
          config {
            command = "/opt/tools/envoy"
            args    = ["-c", "${NOMAD_SECRETS_DIR}/envoy_bootstrap.json", "--disable-hot-restart", "--concurrency", "1"]
            # Nomad's bootstrap names Consul's socket by a path from there.
            work_dir = "${NOMAD_ALLOC_DIR}/.."
          }
        }
      }
    }
    task "raw" {
      driver = "raw_exec"
      user   = "app"
      config {
        command = "/opt/tools/app"
        args    = ["serve", ":8080"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
