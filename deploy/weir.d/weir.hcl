# The agent's configuration: every key with its default. Files of /etc/weir.d are
# read in lexical order, later ones win; the environment (WEIR_*, CONSUL_*) wins
# over files, and flags over both.

# Where the data path keeps its state. The plugin must have the same paths.
# pin_dir     = "/sys/fs/bpf/weir"
# state_dir   = "/run/weir"
# cgroup_root = ""                  # found in mountinfo

# log_level = "info"                # debug, info, warn, error
# log_json  = false

# The local Consul agent. What the token needs, where NODE is the name of its node:
#   node "NODE" { policy = "read" }
#   agent "NODE" { policy = "read" }
#   service_prefix "" { policy = "read" }
# Where jobs have upstreams of a peer, node_prefix "" { policy = "read" } in place of
# the first.
consul {
  # enabled         = true
  # address         = "127.0.0.1:8500"   # or https://, or unix:///run/consul/http.sock
  # token_file      = ""                 # read anew for each request
  # token           = ""
  # namespace       = ""
  # partition       = ""
  # ssl             = false
  # verify_ssl      = true
  # ca_file         = ""                 # the four files are read anew for each connection
  # ca_path         = ""
  # cert_file       = ""
  # key_file        = ""
  # tls_server_name = ""
  # watch           = true               # one blocking query, so that a change is seen at once
}

# How long after its ADD what an allocation dials waits for a proxy that has not
# listened yet, at most; "0s": it is refused at once. A job shortens it by
# sidecar_service { meta { weir-gate = "5s" } }.
gate {
  # timeout = "30s"
}

# What may be reached from outside a mesh allocation beside its proxy, expose
# paths and mapped ports: off (everything), audit (everything, but counted),
# enforce (nothing). A job strengthens it by sidecar_service { meta { weir-guard =
# "enforce" } } and never weakens it. Forward lets packets be forwarded through the
# namespaces of allocations, past their proxies, as Docker in Docker does: without
# it that is refused in transparent mode, and under enforce in any.
guard {
  # default = "audit"
  # forward = false
}

# The UID of proxies that no plugin was told about.
proxy {
  # default_uid = 101
}

# Where libcni keeps its results, of which the agent reads cache_dir/results, and
# where Nomad makes the namespaces of all drivers but Docker's. The other keys
# are read by the plugin, from /etc/weir.d, and only for jobs that they concern:
# which arguments weir.* a job may set, these and no others, and whether a
# transparent_proxy block may exclude outbound ports, CIDRs and UIDs. A network's
# own configuration (jobArgs, consulExclusions) wins over both.
cni {
  # cache_dir         = "/var/lib/cni"
  # netns_dir         = "/var/run/netns"
  # job_args          = ["mode", "guard", "egress", "inbound-port", "outbound-port"]
  # consul_exclusions = true
}

# Docker's engine API: which namespace a pause container has now, and which task a
# container is. "" asks nobody; a node without Docker needs nothing.
docker {
  # socket = "/var/run/docker.sock"
}

# Prometheus at /metrics, health at /health; and at /map/ a map of the node for
# browsers, which shows names and connections: "off", "loopback" (who comes by this
# node's own, as by "ssh -L") or "any" (whoever reaches the address).
telemetry {
  # listen = "127.0.0.1:9902"            # default: nowhere
  # map    = "off"
}

# What the node's tables have room for, when they are made: at the agent's first start
# after a boot. 'weir status -verbose' shows how full they are.
tables {
  # workloads = 16384
  # origins   = 131072
}
