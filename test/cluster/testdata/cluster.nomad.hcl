# Servers on the members of a cluster, and a client of each kind beside its servers.
variable "round" {
  type = string
}
variable "count" {
  type    = number
  default = 3
}
variable "parallel" {
  type    = number
  default = 1
}
variable "canaries" {
  type    = number
  default = 0
}

job "cluster" {
  node_pool = "all"

  update {
    max_parallel      = 1
    min_healthy_time  = "1s"
    health_check      = "checks"
    healthy_deadline  = "60s"
    progress_deadline = "90s"
  }
  migrate {
    max_parallel     = 1
    min_healthy_time = "1s"
    health_check     = "checks"
    healthy_deadline = "60s"
  }

  group "server" {
    count          = var.count
    shutdown_delay = "5s"
    update {
      canary       = var.canaries
      max_parallel = var.parallel
    }
    network {
      mode = "bridge"
    }
    constraint {
      attribute = "${node.unique.name}"
      operator  = "!="
      value     = "node"
    }
    spread {
      attribute = "${node.unique.name}"
    }
    service {
      name = "cluster-server"
      port = "8080"
      check {
        type     = "http"
        path     = "/health"
        interval = "1s"
        timeout  = "2s"
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
    task "server" {
      driver = "exec"
      user   = "app"
      config {
        command = "app"
        args    = ["serve", ":8080"]
      }
      env {
        ROUND = var.round
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }

  group "transparent" {
    network {
      mode = "bridge"
    }
    constraint {
      attribute = "${node.unique.name}"
      value     = "node"
    }
    service {
      name = "cluster-transparent"
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
    }
    constraint {
      attribute = "${node.unique.name}"
      value     = "node"
    }
    service {
      name = "cluster-plain"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "cluster-server"
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
