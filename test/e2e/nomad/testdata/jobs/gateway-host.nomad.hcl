# An ingress gateway on the node's own network.
job "gateway-host" {
  group "host" {
    network {
      mode = "host"
      port "inbound" {
        static = 9081
      }
    }
    service {
      name = "gw-host"
      port = "inbound"
      connect {
        gateway {
          proxy {}
          ingress {
            listener {
              port     = 9081
              protocol = "http"
              service {
                name  = "gw-api"
                hosts = ["*"]
              }
            }
          }
        }
      }
    }
  }
}
