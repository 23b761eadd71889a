# Transparent allocations with a static host port each, one for each way that a
# network comes about. The sidecars are stand-ins that sleep.
variable "id" {}
variable "delay" {} # between the end of the services and that of the tasks

job "ended" {
  id = var.id

  group "bridge" {
    shutdown_delay = var.delay
    network {
      mode = "bridge"
      port "static" {
        static = 28101
        to     = 8080
      }
    }
    service {
      name = "${var.id}-bridge"
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
    task "bridge" {
      driver       = "exec"
      user         = "app"
      kill_timeout = "1s"
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

  group "exec" {
    shutdown_delay = var.delay
    network {
      mode = "cni/weir"
      port "static" {
        static = 28102
        to     = 8080
      }
    }
    service {
      name = "${var.id}-exec"
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
    task "exec" {
      driver       = "exec"
      user         = "app"
      kill_timeout = "1s"
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
    shutdown_delay = var.delay
    network {
      mode = "cni/weir"
      port "static" {
        static = 28103
        to     = 8080
      }
    }
    service {
      name = "${var.id}-docker"
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
          config {
            image = "app:node"
            args  = ["pause"]
          }
        }
      }
    }
    task "docker" {
      driver       = "docker"
      kill_timeout = "1s"
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
}
