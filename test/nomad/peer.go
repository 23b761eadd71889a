// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"fmt"
	"net/http"
	"time"
)

// Abroad adds a machine on the same network that is the only one of another cluster: it
// has servers of its own, and its Consul is another datacenter.
func (n *Node) Abroad(options Options, datacenter string) *Node {
	n.tb.Helper()
	m := newNode(n.tb, options, n.parts, datacenter)
	m.machine.join(n.machine, "abroad", 102)
	m.members[m.machine.name] = m
	m.run()
	return m
}

// Peer makes the Consuls of two secure clusters peers, each under the name of its
// datacenter.
func (n *Node) Peer(other *Node) {
	n.tb.Helper()
	var token struct{ PeeringToken string }
	err := n.api.consul.call(http.MethodPost, "/v1/peering/token", map[string]string{"PeerName": other.datacenter}, &token)
	if err != nil {
		n.tb.Fatal(err)
	}
	// The server that was asked for a token may still be about to listen for peers.
	eventually(n.tb, 30*time.Second, func() error {
		return other.api.consul.call(http.MethodPost, "/v1/peering/establish",
			map[string]string{"PeerName": n.datacenter, "PeeringToken": token.PeeringToken}, nil)
	}, "peering to be established")
	for from, to := range map[*Node]*Node{n: other, other: n} {
		eventually(n.tb, 30*time.Second, func() error {
			var told struct{ State string }
			err := from.api.consul.get("/v1/peering/"+to.datacenter, &told)
			if err == nil && told.State != "ACTIVE" {
				err = fmt.Errorf("it is %s", told.State)
			}
			return err
		}, "peering of "+from.datacenter+" with "+to.datacenter)
	}
}

// AllowMeshGateway gives the workload identity of a service what a mesh gateway for peers
// asks of Consul, beyond what "nomad setup consul" allows a service.
func (n *Node) AllowMeshGateway(service string) {
	n.tb.Helper()
	const name = "mesh-gateway"
	rules := fmt.Sprintf("service %q { policy = \"write\" }\n", service) +
		"service_prefix \"\" { policy = \"read\" }\nnode_prefix \"\" { policy = \"read\" }\nagent_prefix \"\" { policy = \"read\" }\n" +
		"mesh = \"write\"\npeering = \"read\"\n"
	n.ConsulPut("/v1/acl/policy", map[string]string{"Name": name, "Rules": rules})
	n.ConsulPut("/v1/acl/role", map[string]any{"Name": name, "Policies": []map[string]string{{"Name": name}}})
	n.ConsulPut("/v1/acl/binding-rule", map[string]string{
		"AuthMethod": "nomad-workloads", "BindType": "role", "BindName": name, "Selector": fmt.Sprintf("\"nomad_service\" in value and value.nomad_service == %q", service),
	})
}

// ReplaceMeshCA gives Consul's mesh another root, with another key, and returns when it
// signs with it.
func (n *Node) ReplaceMeshCA() {
	n.tb.Helper()
	before := n.meshRoot()
	bits := 384
	var now struct {
		Config struct{ PrivateKeyBits int }
	}
	n.ConsulGet("/v1/connect/ca/configuration", &now)
	if now.Config.PrivateKeyBits == bits {
		bits = 256
	}
	n.ConsulPut("/v1/connect/ca/configuration", map[string]any{
		"Provider": "consul", "Config": map[string]any{"PrivateKeyType": "ec", "PrivateKeyBits": bits},
	})
	eventually(n.tb, 30*time.Second, func() error {
		if n.meshRoot() == before {
			return fmt.Errorf("it is still %s", before)
		}
		return nil
	}, "another root of the mesh")
}

// meshRoot is the ID of the root that Consul signs with.
func (n *Node) meshRoot() string {
	n.tb.Helper()
	var roots struct{ ActiveRootID string }
	n.ConsulGet("/v1/agent/connect/ca/roots", &roots)
	return roots.ActiveRootID
}
