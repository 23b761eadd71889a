# Beside install.nomad.hcl, what else Weir may do for an allocation: "guarded" is a plain
# connect job, "plain" only has its network from the plugin.
job "uninstall" {
  group "guarded" {
    network {
      mode = "bridge"
    }
    service {
      name = "uninstall-guarded"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            upstreams {
              destination_name = "install-back"
              local_bind_port  = 9191
            }
          }
        }
      }
    }
    task "guarded" {
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

  group "plain" {
    network {
      mode = "cni/weir"
      port "web" {
        static = 28090
        to     = 8080
      }
    }
    task "plain" {
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
