# An API gateway as HashiCorp's guide runs one: a plain job whose task registers itself.
# Its administration is bound to every address.
variable "id" {}
variable "mode" {}
variable "door" {}

job "gateway-api" {
  id = var.id # as the service: by its name and its port Weir knows whose registration that is

  group "gateway" {
    network {
      mode = var.mode
      port "http" {
        static = var.door
        to     = var.door
      }
    }
    task "gateway" {
      driver = "raw_exec"
      config {
        command = "/opt/tools/consul"
        args = [
          "connect", "envoy", "-gateway=api", "-register", "-service=${var.id}", "-deregister-after-critical=10s",
          "-address={{ GetInterfaceIP \"eth0\" }}:${var.door}", "-admin-bind=0.0.0.0:19000", "-ignore-envoy-compatibility",
          "-http-addr=http://10.99.0.2:8500", "-grpc-addr=http://10.99.0.2:8502", "-envoy-binary=/opt/tools/envoy",
          "--", "--concurrency", "1",
        ]
      }
      resources {
        cpu    = 100
        memory = 128
      }
    }
  }
}
