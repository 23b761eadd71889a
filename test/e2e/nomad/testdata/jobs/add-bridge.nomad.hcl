# Nomad's own bridge, with Weir in the place of consul-cni at the end of its chain. It
# excludes something, so that the operator's policy is asked. The sidecar is a stand-in
# that does not listen: what is redirected is refused.
variable "id" {}

job "add-bridge" {
  id = var.id

  group "task" {
    network {
      mode = "bridge"
    }
    restart {
      attempts = 0
      mode     = "fail"
    }
    reschedule {
      delay          = "5s"
      delay_function = "constant"
      unlimited      = true
    }
    service {
      name = var.id
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {
              exclude_outbound_cidrs = ["192.0.2.0/24"]
            }
          }
        }
        sidecar_task {
          driver = "raw_exec"
          config {
            command = "app"
            args    = ["pause"]
          }
          shutdown_delay = "0s"
          resources {
            cpu    = 50
            memory = 64
          }
        }
      }
    }
    task "task" {
      driver = "raw_exec"
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
