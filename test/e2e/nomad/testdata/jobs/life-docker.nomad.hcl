# Docker holds the namespace in a container of its own, which it may restart.
variable "id" {}
variable "mode" {}

job "life-docker" {
  id = var.id

  group "server" {
    network {
      mode = var.mode
    }
    restart {
      attempts = 10
      delay    = "2s"
      mode     = "delay"
    }
    reschedule {
      delay          = "5s"
      delay_function = "constant"
      unlimited      = true
    }
    service {
      name = "${var.id}-server"
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
    task "server" {
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

  group "client" {
    network {
      mode = var.mode
    }
    restart {
      attempts = 10
      delay    = "2s"
      mode     = "delay"
    }
    reschedule {
      delay          = "5s"
      delay_function = "constant"
      unlimited      = true
    }
    service {
      name = "${var.id}-client"
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
    task "client" {
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
