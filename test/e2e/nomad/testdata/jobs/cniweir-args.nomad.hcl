# The exec driver, and the mesh by the job's own arguments instead of a
# transparent_proxy block. "client" takes a port, a CIDR and a user out of the mesh, and
# has its proxy under another UID, which needs the operator's word. The UIDs have more
# than 16 bits. Without the block Nomad does not point DNS at Consul: the
# job does, and has the resolver's port by an argument.

job "cniweir-args" {
  group "server" {
    network {
      mode = "cni/weir"
      cni {
        args = {
          "weir.mode"         = "transparent"
          "weir.inbound-port" = "${NOMAD_PORT_connect_proxy_cniweir_server}"
          "weir.guard"        = "enforce"
        }
      }
    }
    service {
      name = "cniweir-server"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
        }
        sidecar_task {
          driver = "exec"
          user   = "envoy"
          config {
            command = "envoy"
            args    = ["-c", "${NOMAD_SECRETS_DIR}/envoy_bootstrap.json", "--disable-hot-restart", "--concurrency", "1"]
          }
        }
      }
    }
    task "server" {
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

  group "client" {
    network {
      mode = "cni/weir"
      dns {
        servers = ["10.99.0.2"]
      }
      cni {
        args = {
          "weir.mode"                   = "transparent"
          "weir.inbound-port"           = "${NOMAD_PORT_connect_proxy_cniweir_client}"
          "weir.dns"                    = "10.99.0.2:8600"
          "weir.exclude-outbound-ports" = "backup@9099"
          "weir.exclude-outbound-cidrs" = "lan@10.99.0.4/32"
          "weir.proxy-uid"              = "65637"
          "weir.exclude-uids"           = "nightly@66536"
        }
      }
    }
    service {
      name = "cniweir-client"
      port = "8080"
      connect {
        sidecar_service {
          disable_default_tcp_check = true
        }
        sidecar_task {
          driver = "exec"
          user   = "envoy32"
          config {
            command = "envoy"
            args    = ["-c", "${NOMAD_SECRETS_DIR}/envoy_bootstrap.json", "--disable-hot-restart", "--concurrency", "1"]
          }
        }
      }
    }
    task "client" {
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
    task "nightly" {
      driver = "exec"
      user   = "excluded32"
      config {
        command = "app"
        args    = ["pause"]
      }
      resources {
        cpu    = 50
        memory = 64
      }
    }
  }
}
