# Clients of each kind that ask for a service of a peered datacenter, and the gateways of
# their own one.
job "peering" {
  update {
    max_parallel      = 1
    min_healthy_time  = "2s"
    health_check      = "checks"
    healthy_deadline  = "60s"
    progress_deadline = "90s"
  }

  group "gateway" {
    count          = 2
    shutdown_delay = "5s"
    network {
      mode = "bridge"
      port "wan" {}
    }
    service {
      name = "mesh-gateway"
      port = "wan"
      connect {
        gateway {
          proxy {}
          mesh {}
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
  }

  group "transparent" {
    network {
      mode = "bridge"
    }
    service {
      name = "peering-transparent"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {}
            upstreams {
              destination_name = "peered-server"
              destination_peer = "dc2"
              local_bind_port  = 9400
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
    task "client" {
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

  group "plain" {
    network {
      mode = "bridge"
      dns { # of the node's Consul: without transparent_proxy Nomad names none
        servers = ["10.99.0.2"]
      }
    }
    service {
      name = "peering-plain"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "peered-server"
              destination_peer = "dc2"
              local_bind_port  = 9400
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
    task "client" {
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
}
