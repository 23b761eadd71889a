# Containers that may do as little as Docker lets a container do, and that it checks.
job "drivers" {
  group "server" {
    network {
      mode = "bridge"
    }
    service {
      name = "drivers-server"
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
        image           = "checked:node"
        args            = ["serve", ":8080"]
        cap_drop        = ["all"]
        readonly_rootfs = true
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }

  group "client" {
    network {
      mode = "bridge"
    }
    service {
      name = "drivers-client"
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
        image           = "app:node"
        args            = ["serve", ":8080"]
        cap_drop        = ["all"]
        readonly_rootfs = true
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
