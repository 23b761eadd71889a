# An API gateway as HashiCorp's guide runs one: a plain job whose task registers itself.
# Its administration is bound to every address.
job "gateway-api" {
  group "gateway" {
    network {
      mode = "bridge"
      port "http" {
        static = 9701
        to     = 9701
      }
    }
    task "gateway" {
      driver = "raw_exec"
      config {
        command = "/opt/tools/consul"
        args = [
          "connect", "envoy", "-gateway=api", "-register", "-service=gw-http", "-deregister-after-critical=10s",
          "-address={{ GetInterfaceIP \"eth0\" }}:9701", "-admin-bind=0.0.0.0:19000", "-ignore-envoy-compatibility",
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
