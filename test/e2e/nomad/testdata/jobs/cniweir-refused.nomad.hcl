# An argument that the operator does not let a job set: the allocation must not start.
job "cniweir-refused" {
  group "refused" {
    network {
      mode = "cni/weir"
      cni {
        args = {
          "weir.mode"                   = "transparent"
          "weir.exclude-outbound-ports" = "9099"
        }
      }
    }
    reschedule {
      attempts  = 0
      unlimited = false
    }
    task "refused" {
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
