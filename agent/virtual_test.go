// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/catalog/virtual"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/flow"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"

	realconsul "github.com/weirmesh/weir/test/consul"
)

// meshOfVirtualIPs is a real Consul with services of each kind that has a virtual IP, and
// with registrations that claim those of others.
func meshOfVirtualIPs(t *testing.T) (server *realconsul.Server, config configfile.ConsulConfig, addresses map[string]netip.Addr) {
	t.Helper()
	server = realconsul.Start(t, true)
	for i, name := range []string{"cache", "api"} {
		server.Register(object{"Name": name, "ID": name, "Port": 8080 + i, "Connect": object{"SidecarService": object{"Port": 21000 + i}}})
	}
	server.Register(object{"Name": "native", "ID": "native", "Port": 8090, "Connect": object{"Native": true}})
	server.Register(object{"Name": "billing", "ID": "billing", "Port": 8091})
	server.Put("/v1/config", object{"Kind": "terminating-gateway", "Name": "way-out", "Services": []object{{"Name": "billing"}}})
	server.Register(object{"Kind": "terminating-gateway", "Name": "way-out", "ID": "way-out", "Port": 8443})
	server.Put("/v1/acl/policy", object{"Name": "weir", "Rules": realconsul.DocumentedPolicy(t)})
	var token struct{ SecretID string }
	server.Post("/v1/acl/token", object{"Policies": []object{{"Name": "weir"}}}, &token)
	config = *configfile.DefaultConfig().Consul
	config.Address, config.TokenFile = server.Address, filepath.Join(t.TempDir(), "token")
	test.WriteFile(t, config.TokenFile, token.SecretID)
	client, err := catalog.NewClient(config, catalog.DefaultTimeouts())
	if err != nil {
		t.Fatal(err)
	}
	addresses = make(map[string]netip.Addr)
	test.Eventually(t, func() error {
		for _, name := range []string{"cache", "api", "native", "billing"} {
			list, err := client.VirtualIPs(t.Context(), registration.Service{Name: name})
			if err != nil || len(list) == 0 {
				return fmt.Errorf("%s has no virtual IP: %w", name, err)
			}
			addresses[name] = list[0]
		}
		return nil
	}, "virtual IPs")
	claim := object{"Address": addresses["api"].String(), "Port": 80}
	server.Register(object{"Name": "a-liar", "ID": "a-liar", "Port": 8092, "TaggedAddresses": object{"consul-virtual": claim}})
	server.Register(object{"Kind": "terminating-gateway", "Name": "a-gateway", "ID": "a-gateway", "Port": 8444,
		"TaggedAddresses": object{"consul-virtual:a-liar": claim, "consul-virtual:cache": claim}})
	return server, config, addresses
}

// The services of virtual IPs are those that Consul gave them to, whatever a registration
// says, and nobody's address has none.
func TestServicesByVirtualIP(t *testing.T) {
	t.Parallel()
	_, config, addresses := meshOfVirtualIPs(t)
	client, err := catalog.NewClient(config, catalog.DefaultTimeouts())
	if err != nil {
		t.Fatal(err)
	}
	asked := test.Addrs("240.0.9.9")
	for i := range virtual.AtOnce - 1 - len(addresses) {
		asked = append(asked, netip.AddrFrom4([4]byte{240, 1, 0, byte(i)}))
	}
	for _, addr := range addresses {
		asked = append(asked, addr)
	}
	found, err := virtual.Services(t.Context(), client, asked)
	if err != nil {
		t.Fatal(err)
	}
	for name, addr := range addresses {
		if found[addr].Name != name {
			t.Errorf("%s is %q, want %s", addr, found[addr].Name, name)
		}
	}
	if len(found) != len(addresses) {
		t.Errorf("found %v, want those of %v", found, addresses)
	}
	ranges, err := virtual.Ranges(t.Context(), client)
	if err != nil || !slices.Equal(ranges, virtual.DefaultRanges()) {
		t.Errorf("ranges %v, %v", ranges, err)
	}
}

// A transparent task dials services that are nobody's upstream: flows, the traffic and the
// map name them, the very first connection too, with a real Consul.
func TestFlowsNameEveryServiceOfTheMesh(t *testing.T) {
	server, config, addresses := meshOfVirtualIPs(t)
	n, id, _, task := shopNode(t, func(c *configfile.Config) {
		server.Register(object{"Name": "web", "ID": "_nomad-task-" + numbered(1) + "-group-front-web-80", "Port": 80, "Connect": object{"SidecarService": object{"Port": 20001,
			"Proxy": object{"Mode": "transparent", "Upstreams": []object{{"DestinationName": "cache", "LocalBindPort": 9191}}}}}})
		c.Consul = &config
	})
	n.recording(task)
	began := time.Now()
	const nobody = "240.0.9.9"
	dials := map[string]string{nobody: ""}
	for name, addr := range addresses {
		dials[addr.String()] = name
	}
	for to := range dials {
		if _, err := task.Ask("tcp4", netip.AddrPortFrom(netip.MustParseAddr(to), 80).String()); err != nil {
			t.Errorf("dial %s: %v", to, err)
		}
	}
	test.Eventually(t, func() error {
		seen := make(map[string]int)
		for _, one := range n.history(api.FlowQuery{Since: began, Task: "server"}) {
			if want, ok := dials[one.Destination.IP.String()]; ok {
				seen[one.Destination.IP.String()]++
				if one.Destination.Service != want {
					return fmt.Errorf("the flow to %s has service %q, want %q", one.Destination.IP, one.Destination.Service, want)
				}
			}
		}
		if len(seen) != len(dials) {
			return fmt.Errorf("seen %v, want %v", seen, dials)
		}
		return nil
	}, "each flow to have its service")
	if list := n.history(api.FlowQuery{Service: "billing"}); len(list) != 1 {
		t.Errorf("%d flows of -service billing, want 1", len(list))
	}
	traffic, err := api.ReadTraffic(context.Background(), n.config.StateDir, began)
	if err != nil {
		t.Fatal(err)
	}
	for _, edge := range traffic.Edges {
		if want, ok := dials[edge.Destination.IP.String()]; ok && edge.Destination.Service != want {
			t.Errorf("edge to %s has service %q, want %q", edge.Destination.IP, edge.Destination.Service, want)
		}
	}
	var ends []string
	for _, end := range n.agent.server.Map().Graph().Ends {
		ends = append(ends, string(end.Kind)+" "+end.Name)
	}
	for _, want := range []string{"service api", "service native", "service billing", "address " + nobody + ":80"} {
		if !slices.Contains(ends, want) {
			t.Errorf("the map has %q, want %q too", ends, want)
		}
	}
	// And so does what explain asks of the address.
	behind, err := api.ReadBehind(t.Context(), n.config.StateDir, api.BehindQuery{
		Key: workload.AttachmentID{ContainerID: id, IfName: "eth0"}, To: netip.AddrPortFrom(addresses["api"], 80), SentTo: netip.MustParseAddrPort("127.0.0.1:15001"),
	})
	if err != nil || behind.Service != "api" || behind.Source != "web" || behind.Intention != api.IntentionDeny || behind.Instances == nil {
		t.Errorf("behind %s is %+v, %v; want service api, which web may not dial", addresses["api"], behind, err)
	}
	// The next one has the name from the start, without a question.
	if _, err := task.Ask("tcp4", netip.AddrPortFrom(addresses["api"], 81).String()); err != nil {
		t.Error(err)
	}
	test.Eventually(t, func() error {
		for _, one := range n.agent.flows.LastOf(id, 10) {
			if one.Destination.Port == 81 && one.Destination.Service == "api" {
				return nil
			}
		}
		return errors.New("no such flow")
	}, "another flow")
}

// What Consul is asked for is bounded: a task that scans the range of virtual IPs fills its
// own share, and another one's dial has its name all the same.
func TestAScanOfVirtualIPsIsBounded(t *testing.T) {
	s := flow.NewVirtualServices()
	now := time.Now()
	for i := range 10_000 {
		s.Dialled(1, netip.AddrFrom4([4]byte{240, 1, byte(i >> 8), byte(i)}), now)
	}
	own := netip.MustParseAddr("240.0.0.7")
	s.Dialled(2, own, now)
	asked, turns := 0, 0
	for turn := now; ; turn = turn.Add(time.Millisecond) {
		list := s.Due(turn, time.Hour)
		if len(list) == 0 {
			break
		}
		if len(list) > virtual.AtOnce {
			t.Fatalf("%d addresses in one question", len(list))
		}
		asked += len(list)
		turns++
		found := map[netip.Addr]registration.Service{own: {Name: "api"}}
		s.Settle(list, found, nil, turn)
	}
	if asked != flow.GuardShare+1 || turns > flow.GuardShare/virtual.AtOnce+1 {
		t.Errorf("asked for %d addresses in %d questions, want the share and one", asked, turns)
	}
	if name := s.Dialled(2, own, now.Add(time.Second)); name != "api" {
		t.Errorf("the other's dial is to %q, want api", name)
	}
	if list := s.Due(now.Add(time.Second), time.Hour); len(list) > 0 {
		t.Errorf("asked again for %d within a second", len(list))
	}
	// A minute later somebody dials one of them again: that one alone is asked for.
	again := netip.MustParseAddr("240.1.0.0")
	s.Dialled(1, again, now.Add(2*time.Minute))
	if list := s.Due(now.Add(2*time.Minute), time.Hour); !slices.Equal(list, []netip.Addr{again}) {
		t.Errorf("asked for %v, want %s", list, again)
	}
}

// A name is that of the time of the connection: where the address goes to another service,
// or to none, what was before keeps what it was.
func TestAVirtualIPThatBecomesAnothers(t *testing.T) {
	s := flow.NewVirtualServices()
	addr, began := netip.MustParseAddr("240.0.0.7"), time.Now()
	at := func(minutes int) time.Time { return began.Add(time.Duration(minutes) * time.Minute) }
	answer := func(minutes int, name string) {
		t.Helper()
		if list := s.Due(at(minutes), time.Hour); !slices.Equal(list, []netip.Addr{addr}) {
			t.Fatalf("after %d minutes it asks for %v", minutes, list)
		}
		found := map[netip.Addr]registration.Service{}
		if name != "" {
			found[addr] = registration.Service{Name: name}
		}
		s.Settle([]netip.Addr{addr}, found, nil, at(minutes))
	}
	s.Dialled(1, addr, at(0))
	answer(0, "")
	s.Dialled(1, addr, at(2))
	answer(2, "api")
	if s.Named(addr, at(0).Add(-time.Second)) != "" || s.Named(addr, at(2)) != "api" {
		t.Error("what was dialled before anybody had the address is api's")
	}
	if name := s.Dialled(1, addr, at(13)); name != "api" {
		t.Errorf("while it is asked anew it is %q, want api", name)
	}
	answer(13, "db")
	if s.Named(addr, at(12)) == "db" || s.Named(addr, at(14)) != "db" {
		t.Error("what was dialled before is db's")
	}
	s.Settle([]netip.Addr{addr}, nil, errors.New("no leader"), at(14))
	if name := s.Dialled(1, addr, at(15)); name != "db" {
		t.Errorf("without an answer it is %q, want db", name)
	}
}
