// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"

	realconsul "github.com/weirmesh/weir/test/consul"
)

// The virtual IP of another cluster's service is known from a real Consul, and in
// a plain connect job it goes to the upstream's listener like any other.
func TestVirtualIPOfAPeersService(t *testing.T) {
	t.Parallel()
	here, there := realconsul.Start(t, true, realconsul.WithPeering("dc1")), realconsul.Start(t, false, realconsul.WithPeering("dc2"))
	here.Peer(there, "dc1", "dc2")
	there.Register(object{"Kind": "mesh-gateway", "Name": "mesh-gateway", "ID": "mesh-gateway", "Port": 8443, "Address": "127.0.0.1",
		"TaggedAddresses": object{"wan": object{"Address": "127.0.0.1", "Port": 8443}, "lan": object{"Address": "127.0.0.1", "Port": 8443}}})
	here.Register(object{"Name": "api", "ID": "api-1", "Port": 8080, "Connect": object{"SidecarService": object{"Port": 20005}}})
	id := "_nomad-task-" + numbered(1) + "-group-g-web-80"
	here.Register(object{"Name": "web", "ID": id, "Port": 8080, "Connect": object{"SidecarService": object{"Port": 20001, "Proxy": object{
		"Upstreams": []object{
			{"DestinationName": "api", "LocalBindPort": 9191}, {"DestinationName": "api", "DestinationPeer": "dc2", "LocalBindPort": 9292},
		}}}}})
	config := *configfile.DefaultConfig().Consul
	config.Address, config.TokenFile = here.Address, filepath.Join(t.TempDir(), "token")
	use := func(name, rules string) {
		t.Helper()
		here.Put("/v1/acl/policy", object{"Name": name, "Rules": rules})
		var token struct{ SecretID string }
		here.Post("/v1/acl/token", object{"Policies": []object{{"Name": name}}}, &token)
		test.WriteFile(t, config.TokenFile, token.SecretID)
	}
	rules := strings.ReplaceAll(realconsul.DocumentedPolicy(t), `"node"`, `"node-dc1"`)
	use("all-nodes", strings.Replace(rules, `node "node-dc1"`, `node_prefix ""`, 1))
	watcher := runWatcher(t, config, func(f *catalog.Watcher) { f.Client.Read = catalog.DefaultTimeouts().Read })
	local, peers := registration.Service{Name: "api"}, registration.Service{Name: "api", Peer: "dc2"}
	before := eventuallyKnown(t, watcher, "the question to be answered", func(v catalog.Snapshot) bool {
		_, answered := v.Facts.VirtualIPs[peers]
		return answered && len(v.Facts.VirtualIPs[local]) == 1
	})
	if addresses := before.Facts.VirtualIPs[peers]; len(addresses) > 0 {
		t.Errorf("a service that the peer does not export has virtual IPs %v", addresses)
	}
	there.Register(object{"Name": "api", "ID": "api-2", "Port": 8080, "Connect": object{"SidecarService": object{"Port": 20001}}})
	there.Put("/v1/config", object{"Kind": "exported-services", "Name": "default", "Services": []object{{"Name": "api", "Consumers": []object{{"Peer": "dc1"}}}}})
	got := eventuallyKnown(t, watcher, "the virtual IP of the peer's service", func(v catalog.Snapshot) bool { return len(v.Facts.VirtualIPs[peers]) == 1 })
	virtual, own := got.Facts.VirtualIPs[peers][0], got.Facts.VirtualIPs[local][0]
	if virtual == own {
		t.Errorf("both services have %s: nothing was tested", own)
	}

	// To the policy without peers it is nothing, and no error.
	use("own-node", rules)
	weak, err := catalog.NewClient(config, catalog.DefaultTimeouts())
	if err != nil {
		t.Fatal(err)
	}
	if addresses, err := weak.VirtualIPs(t.Context(), peers); err != nil || len(addresses) > 0 {
		t.Errorf("virtual IPs of the peer's service are %v, %v for who may read one node; docs/install.md says that they are hidden", addresses, err)
	}

	// The desired state is that of any upstream.
	s := desired.Allocation{Attachment: discover.Attachment{Key: workload.AttachmentID{ContainerID: numbered(1)}, Job: workload.Job{AllocID: numbered(1)}}}
	s.Record = &inspect.Record{Request: workload.Request{Mode: workload.ModeDirect}}
	s.Proxies = desired.ProxiesOf(got, s.Attachment)
	wanted := desired.For(s, got.Facts, desired.Policy{Guard: workload.GuardAudit})
	want := []workload.Upstream{
		{Name: "api", Addresses: []netip.Addr{own}, Listener: netip.MustParseAddrPort("127.0.0.1:9191")},
		{Name: "api.dc2", Addresses: []netip.Addr{virtual}, Listener: netip.MustParseAddrPort("127.0.0.1:9292")},
	}
	if diff := cmp.Diff(want, wanted.MeshConfig.Upstreams, sameAddrs()); diff != "" {
		t.Errorf("upstreams (-want +got):\n%s", diff)
	}
	if problems := append(got.ProblemsOf("consul"), wanted.Problems...); len(problems) > 0 {
		t.Errorf("problems are %v", problems)
	}
}
