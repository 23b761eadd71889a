# Many allocations that start at once. The sidecar is a stand-in that sleeps, and so is
# the task: Nomad ends a group that has no task but a sidecar.
variable "mode" {
  type = string
}

variable "count" {
  type = number
}

job "storm" {
  group "storm" {
    count = var.count
    ephemeral_disk {
      size = 10 # 300 MiB are the default, which no node has a hundred times
    }
    network {
      mode = var.mode
    }
    service {
      name = "storm"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
          proxy {
            transparent_proxy {}
          }
        }
        sidecar_task {
          driver = "raw_exec"
          config {
            command = "app"
            args    = ["pause"]
          }
          kill_timeout   = "5s"
          shutdown_delay = "0s"
          logs {
            max_files     = 1
            max_file_size = 1
          }
          resources {
            cpu    = 50
            memory = 64
          }
        }
      }
    }
    task "storm" {
      driver = "raw_exec"
      config {
        command = "app"
        args    = ["pause"]
      }
      logs {
        max_files     = 1
        max_file_size = 1
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
