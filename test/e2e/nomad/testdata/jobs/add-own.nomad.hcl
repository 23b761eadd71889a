# The least that asks Weir to redirect a namespace that it builds: no Consul, no proxy.
# Where its network cannot be made Nomad tries again, and then places another one.
variable "id" {}
variable "mode" {}

# "port", or "" for a network without host ports.
variable "port" {
  default = ""
}

# What the job says in network.cni.args.
variable "args" {
  type    = map(string)
  default = { "weir.mode" = "transparent" }
}

job "add-own" {
  id = var.id

  group "task" {
    network {
      mode = var.mode
      dynamic "port" {
        for_each = compact([var.port])
        labels   = ["http"]
        content {
          to = 8080
        }
      }
      cni {
        args = var.args
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
