# What an operator runs first on a node that has just got Weir: one transparent group
# on Nomad's own bridge, one on a network of deploy/.
variable "network" {
  type    = string
  default = "cni/weir"
}

job "install" {
  group "front" {
    network {
      mode = "bridge"
    }
    service {
      name = "install-front"
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
    task "front" {
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
  }

  group "back" {
    network {
      mode = var.network
    }
    service {
      name = "install-back"
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
    task "back" {
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
  }
}
