// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const consulConfig = `
node_name            = %q
datacenter           = %q
data_dir             = "/var/lib/consul"
bind_addr            = %q
client_addr          = "127.0.0.1"
disable_update_check = true
leave_on_terminate   = false
log_level            = "info"
addresses {
  dns = %q
}
ports {
  grpc     = 8502
  grpc_tls = -1
}
connect {
  enabled = true
}
performance {
  raft_multiplier = 1
}
%s
`

// The server has ports of its own: the client has the usual ones.
const serverConfig = `
name                 = "server"
data_dir             = "/var/lib/nomad-server"
bind_addr            = %q
disable_update_check = true
addresses {
  http = "0.0.0.0"
}
ports {
  http = 14646
  rpc  = 14647
  serf = 14648
}
consul {
  address             = "127.0.0.1:8500"
  server_auto_join    = false
  server_service_name = "nomad-server"
}
server {
  enabled          = true
  bootstrap_expect = 1
  raft_multiplier  = 1
  heartbeat_grace  = "60s"
  %s
}
`

const clientConfig = `
name                 = %q
data_dir             = "/var/lib/nomad"
bind_addr            = %q
disable_update_check = true
addresses {
  http = "0.0.0.0"
}
consul {
  address          = "127.0.0.1:8500"
  grpc_address     = "127.0.0.1:8502"
  client_auto_join = false
}
client {
  enabled           = true
  servers           = [%q]
  network_interface = "eth0"
  cni_path          = "/opt/cni/bin"
  cni_config_dir    = "/opt/cni/config"
  cpu_total_compute = 100000
  memory_total_mb   = 64000
  gc_interval       = "1h"
  max_kill_timeout  = "30s"
  options = {
    "fingerprint.denylist" = "env_aws,env_gce,env_azure,env_digitalocean"
  }
  chroot_env {
    "/opt/task" = "/"
  }
  meta {
    "connect.sidecar_image" = "envoy:node"
    "connect.gateway_image" = "envoy:node"
  }
  %s
}
plugin "docker" {
  config {
    infra_image = "pause:node"
    gc {
      image = false
    }
    volumes {
      enabled = true
    }
  }
}
plugin "raw_exec" {
  config {
    enabled = true
  }
}
`

func (n *Node) writeConfigs() {
	n.tb.Helper()
	dns := n.options.ConsulDNS
	if dns == "" {
		dns = n.machine.address
	}
	n.Write("/etc/consul.d/consul.hcl", fmt.Sprintf(consulConfig, n.machine.name, n.datacenter, n.machine.address, dns, n.consulRole()+n.options.Consul), 0o600)
	if n.leader == nil {
		n.Write("/etc/nomad.d/server.hcl", fmt.Sprintf(serverConfig, n.machine.address, n.options.Server), 0o600)
	}
	n.Write("/etc/nomad.d/client.hcl", fmt.Sprintf(clientConfig, n.machine.name, n.machine.address, n.serverAddress()+":14647", n.options.Client), 0o600)
	if n.options.Secure {
		n.writeSecurity()
	}
	if n.options.NoWeir {
		return
	}
	agent := "log_level = \"debug\"\n" + n.options.Agent + "\n"
	if !strings.Contains(agent, "gate {") {
		agent += "gate {\n  timeout = \"0s\"\n}\n" // what no proxy takes is refused at once
	}
	n.Write("/etc/weir.d/weir.hcl", agent, 0o600)
}

// consulRole makes Consul the server, or a client of the leader's.
func (n *Node) consulRole() string {
	if n.leader == nil {
		return "server = true\nbootstrap_expect = 1\n"
	}
	return fmt.Sprintf("server = false\nretry_join = [%q]\nretry_interval = \"1s\"\n", n.serverAddress())
}

// serverAddress is where the servers of the node's cluster are.
func (n *Node) serverAddress() string {
	if n.leader != nil {
		return n.leader.machine.address
	}
	return n.machine.address
}

func (n *Node) defineDaemons() {
	daemon := func(name string, ready func() error, args ...string) *Daemon {
		return &Daemon{
			Name: name, machine: n.machine, args: args, ready: ready, patient: 60 * time.Second,
			log: filepath.Join(n.machine.dir, "log", name+".log"),
		}
	}
	n.Consul = daemon("consul", n.consulReady, "consul", "agent", "-config-dir", "/etc/consul.d")
	if n.leader == nil {
		n.Server = daemon("nomad-server", n.serverReady, nomadAgent("server", n.options.Secure)...)
	}
	n.Nomad = daemon("nomad", n.clientReady, nomadAgent("client", n.options.Secure)...)
	if !n.options.NoAgent && !n.options.NoWeir {
		n.Agent = daemon("weir", n.agentReady, n.weir(), "agent", "-config", "/etc/weir.d")
	}
	if n.options.NoDocker {
		return
	}
	args := []string{"dockerd", "--storage-driver=overlay2", "--bridge=none", "--ip6tables=false"}
	if !n.options.DockerRules {
		args = append(args, "--iptables=false")
	} else {
		args = slices.DeleteFunc(args, func(arg string) bool { return arg == "--bridge=none" })
	}
	n.Docker = daemon("docker", n.dockerReady, append(args, n.options.DockerArgs...)...)
}

func nomadAgent(role string, secure bool) []string {
	args := []string{"nomad", "agent", "-config", "/etc/nomad.d/" + role + ".hcl"}
	if secure {
		args = append(args, "-config", "/etc/nomad.d/"+role+"-secure.hcl")
	}
	return args
}

// daemons are those that the node has, in the order of their start.
func (n *Node) daemons() []*Daemon {
	return slices.DeleteFunc([]*Daemon{n.Consul, n.Docker, n.Server, n.Nomad, n.Agent}, func(d *Daemon) bool { return d == nil })
}

func (n *Node) consulReady() error {
	var nodes []any
	if err := n.api.consul.get("/v1/catalog/nodes", &nodes); err != nil {
		return err
	}
	if len(nodes) == 0 {
		return errors.New("the catalog has no node")
	}
	return nil
}

// serverReady waits for the keys too: a client that registers before is turned
// away and tries again after 15 seconds.
func (n *Node) serverReady() error {
	var keys []struct{ State string }
	if err := n.api.server.get("/v1/operator/keyring/keys", &keys); err != nil {
		return err
	}
	if len(keys) == 0 {
		return errors.New("the keyring is empty")
	}
	return nil
}

func (n *Node) clientReady() error {
	attributes, err := n.attributes()
	if err != nil {
		return err
	}
	if attributes.Status != "ready" {
		return fmt.Errorf("the client is %q", attributes.Status)
	}
	drivers := []string{"exec", "raw_exec"}
	if n.Docker != nil {
		drivers = append(drivers, "docker")
	}
	for _, name := range drivers {
		if driver := attributes.Drivers[name]; !driver.Healthy {
			return fmt.Errorf("driver %s: %s", name, driver.HealthDescription)
		}
	}
	if attributes.Attributes["unique.consul.name"] == "" {
		return errors.New("the client has not found Consul")
	}
	return nil
}

// attributes is what the servers know of the client, by the client's own API.
func (n *Node) attributes() (node clientNode, err error) {
	var self struct {
		Stats struct {
			Client struct {
				ID string `json:"node_id"`
			} `json:"client"`
		} `json:"stats"`
	}
	if err := n.api.nomad.get("/v1/agent/self", &self); err != nil {
		return node, err
	}
	return node, n.api.nomad.get("/v1/node/"+self.Stats.Client.ID, &node)
}

type clientNode struct {
	ID         string
	Status     string
	Attributes map[string]string
	Drivers    map[string]struct {
		Healthy           bool
		HealthDescription string
	}
}

// Attributes are the client's node attributes.
func (n *Node) Attributes() map[string]string {
	n.tb.Helper()
	node, err := n.attributes()
	if err != nil {
		n.tb.Fatal(err)
	}
	return node.Attributes
}

func (n *Node) dockerReady() error { return n.api.dockerCall("GET", "/_ping", nil) }

func (n *Node) agentReady() error {
	conn, err := net.Dial("unix", n.Path("/run/weir/agent.sock"))
	if err != nil {
		return err
	}
	return conn.Close()
}
