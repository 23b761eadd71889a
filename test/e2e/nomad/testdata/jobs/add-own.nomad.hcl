# The least that asks Weir to redirect a namespace that it builds: no Consul, no proxy.
# Where its network cannot be made Nomad tries again, and then places another one.
variable "id" {}
variable "mode" {}

job "life-add" {
  id = var.id

  group "task" {
    network {
      mode = var.mode
      port "http" {
        to = 8080
      }
      cni {
        args = {
          "weir.mode" = "transparent"
        }
      }
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
