// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/cni/request"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

func samePrefixes() cmp.Option {
	return cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })
}

// lostAttachment is what libcni has of an allocation whose record is lost, in a network
// whose operator lets jobs set these keys.
func lostAttachment(mesh string, jobArgs string, own ...request.Arg) discover.Attachment {
	a := found()
	a.Args = request.Args{Own: own}
	if mesh != "" {
		a.Args = meshArgs(mesh, own...)
	}
	a.Conf = &request.Network{Name: a.Network, JobArgs: json.RawMessage(jobArgs)}
	return a
}

func TestLostRequestIsThatOfNomad(t *testing.T) {
	a := lostAttachment(`{"ConsulDNSIP":"10.99.0.1","ConsulDNSPort":8600,"ProxyUserID":"1101","ProxyInboundPort":23435,"ProxyOutboundPort":15001,
		"ExcludeInboundPorts":["0","7071"],"ExcludeOutboundPorts":["25"],"ExcludeOutboundCIDRs":["10.0.0.0/8"],"ExcludeUIDs":["0"]}`, "")
	got, err := desired.LostRequest(a, a.Addresses, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	want := &workload.Request{
		Network: a.Network, Job: a.Job, Mode: workload.ModeTransparent, ProxyUID: 1101, InboundPort: 23435, OutboundPort: 15001,
		Addresses: a.Addresses, DNS: workload.DNS{Address: netip.MustParseAddr("10.99.0.1"), Port: 8600},
		ExcludeInboundPorts: []uint16{7071}, ExcludeOutboundPorts: []uint16{25},
		ExcludeOutboundCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, ExcludeUIDs: []uint32{0}, Notes: got.Notes,
	}
	if diff := cmp.Diff(want, got, sameAddrs(), samePrefixes()); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	if len(got.Notes) != 1 || !strings.Contains(got.Notes[0], `ExcludeInboundPorts "0"`) {
		t.Errorf("notes %q: want the one of the plugin on a static port", got.Notes)
	}
	for _, mesh := range []string{`x`, `{}`, `{"ProxyUserID":"envoy"}`, `{"ProxyUserID":"1","ExcludeOutboundCIDRs":["ten"]}`, `{"ProxyUserID":"1","ExcludeUIDs":["-1"]}`} {
		a := lostAttachment(mesh, "")
		if got, err := desired.LostRequest(a, a.Addresses, t.TempDir()); err == nil || !strings.Contains(err.Error(), exampleAlloc) {
			t.Errorf("request of %s = %+v, %v; want an error that names the allocation", mesh, got, err)
		}
	}
}

// A job's own arguments come back with its record, and the operator's word on them counts.
func TestLostRequestHasTheJobsArguments(t *testing.T) {
	guard, excluded := request.Arg{Key: "weir.guard", Value: "enforce"}, request.Arg{Key: "weir.exclude-outbound-ports", Value: "ssh@22"}
	egress := request.Arg{Key: "weir.egress", Value: "audit"}
	a := lostAttachment(`{"ProxyUserID":"1101","ProxyInboundPort":23435}`, `["guard","egress","exclude-outbound-ports"]`, egress, excluded, guard)
	got, err := desired.LostRequest(a, a.Addresses, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	want := &workload.Request{
		Network: a.Network, Job: a.Job, Mode: workload.ModeTransparent, ProxyUID: 1101, InboundPort: 23435, OutboundPort: workload.DefaultOutboundPort,
		Addresses: a.Addresses, Guard: workload.GuardEnforce, Egress: workload.GuardAudit, ExcludeOutboundPorts: []uint16{22},
		Notes: []string{"the job excludes outbound ports ssh@22"},
	}
	if diff := cmp.Diff(want, got, sameAddrs()); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	alone := lostAttachment("", "", request.Arg{Key: "weir.mode", Value: "direct"})
	got, err = desired.LostRequest(alone, alone.Addresses, t.TempDir())
	if err != nil || got.Mode != workload.ModeDirect || got.ProxyUID != request.DefaultProxyUID {
		t.Errorf("request of arguments alone = %+v, %v", got, err)
	}
	dir := t.TempDir()
	test.WriteFile(t, filepath.Join(dir, "weir.hcl"), "cni { job_args = [\"mode\", \"exclude-uids\"] }\nproxy { default_uid = 2000 }\n")
	byFile := lostAttachment("", "", request.Arg{Key: "weir.mode", Value: "transparent"}, request.Arg{Key: "weir.exclude-uids", Value: "7"})
	got, err = desired.LostRequest(byFile, byFile.Addresses, dir)
	if err != nil || got.ProxyUID != 2000 || len(got.ExcludeUIDs) != 1 {
		t.Errorf("request under a policy in a file = %+v, %v", got, err)
	}
}

// libcni's result is believed no further than the plugin's CHECK believes it.
func TestLostRequestBelievesNoMoreThanCHECK(t *testing.T) {
	const mesh = `{"ProxyUserID":"1101","ProxyInboundPort":23435}`
	none := t.TempDir()
	unreadable := t.TempDir()
	test.WriteFile(t, filepath.Join(unreadable, "weir.hcl"), "cni {")
	own := func(key, value string) request.Arg { return request.Arg{Key: key, Value: value} }
	for _, c := range []struct {
		name string
		of   func() discover.Attachment
		dir  string
		part string
	}{
		{"a key that no job may set", func() discover.Attachment { return lostAttachment(mesh, "", own("weir.exclude-outbound-ports", "22")) }, none, "the operator of this node does not let a job set it"},
		{"a key that the network forbids", func() discover.Attachment { return lostAttachment(mesh, "[]", own("weir.guard", "enforce")) }, none, "jobArgs of the network configuration: none"},
		{"a weaker guard", func() discover.Attachment { return lostAttachment(mesh, "", own("weir.guard", "off")) }, none, "never weakens"},
		{"a key that there is not", func() discover.Attachment { return lostAttachment(mesh, "", own("weir.trust", "me")) }, none, "unknown"},
		{"a key given twice", func() discover.Attachment {
			return lostAttachment(mesh, "", own("weir.guard", "audit"), own("weir.guard", "enforce"))
		}, none, "given twice"},
		{"another user for the proxy than the block's", func() discover.Attachment { return lostAttachment(mesh, `["proxy-uid"]`, own("weir.proxy-uid", "0")) }, none, "the transparent_proxy block says 1101"},
		{"two configs that differ", func() discover.Attachment {
			a := lostAttachment(mesh, "")
			a.Args.Mesh = append(a.Args.Mesh, own("CONSUL_NFTABLES_CONFIG", `{"ProxyUserID":"0"}`))
			return a
		}, none, "differ"},
		{"exclusions of Consul's that the network forbids", func() discover.Attachment {
			a := lostAttachment(`{"ProxyUserID":"1101","ExcludeOutboundCIDRs":["::/0"]}`, "")
			a.Conf.ConsulExclusions = json.RawMessage("false")
			return a
		}, none, "lets no transparent_proxy block do"},
		{"a policy that cannot be read", func() discover.Attachment { return lostAttachment(mesh, "", own("weir.guard", "enforce")) }, unreadable, "read the operator's policy"},
		{"no network configuration", func() discover.Attachment {
			a := lostAttachment(mesh, "")
			a.Conf = nil
			return a
		}, none, "no network configuration"},
		{"no arguments", func() discover.Attachment { return lostAttachment("", "") }, none, "no arguments"},
		{"no address", func() discover.Attachment {
			a := lostAttachment(mesh, "")
			a.Addresses = nil
			return a
		}, none, "names no address"},
		{"an address of another namespace", func() discover.Attachment {
			a := lostAttachment(mesh, "")
			a.Addresses = append(a.Addresses, netip.MustParseAddr("172.26.64.99"))
			return a
		}, none, "172.26.64.99 is not in"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := desired.LostRequest(c.of(), found().Addresses, c.dir)
			if err == nil || !strings.Contains(err.Error(), c.part) || !strings.Contains(err.Error(), exampleAlloc) {
				t.Errorf("request %+v, error %v; want one that names the allocation and has %q", got, err, c.part)
			}
		})
	}
}

// An allocation whose job has arguments of its own loses its record while the agent runs:
// it comes back as it was. One that libcni's result gives more than the operator allows, or
// addresses of another namespace, stays without, and the agent says why.
func TestAgentRestoresALostRecordWithItsJobArguments(t *testing.T) {
	n := newNode(t)
	const conf = `{"cniVersion":"1.0.0","name":"nomad","plugins":[{"type":"bridge"},{"type":"consul-cni","jobArgs":["guard","egress","exclude-outbound-ports","exclude-inbound-ports"]}]}`
	args := [][2]string{
		{"CONSUL_IPTABLES_CONFIG", transparentMesh}, {"weir.guard", "enforce"}, {"weir.egress", "audit"},
		{"weir.exclude-outbound-ports", "ssh@22"}, {"weir.exclude-inbound-ports", "7071"},
	}
	honest, greedy, elsewhere := numbered(1), numbered(2), numbered(3)
	for _, id := range []string{honest, greedy, elsewhere} {
		ns := test.NewNetNS(t)
		mine, address := args, addressed(t, ns)
		switch id {
		case greedy:
			mine = append(args[:len(args):len(args)], [2]string{"weir.exclude-uids", "0"})
		case elsewhere:
			address = "172.26.64.77/20"
		}
		n.resultOf(id, ns.Path, conf, mine, address)
	}
	n.fake.answers(registered(honest, greedy, elsewhere))
	n.run(func(a *Agent) { a.policyDir = t.TempDir() })
	for again := range 2 {
		n.eventually(honest, api.StateManaged)
		records, err := n.Records()
		if err != nil || len(records) != 1 {
			t.Fatalf("records %+v, %v: want that of %s alone", records, err, honest)
		}
		want := workload.Request{
			Network: "nomad", Job: workload.Job{AllocID: honest}, Mode: workload.ModeTransparent, ProxyUID: 101, InboundPort: 20001, OutboundPort: 15001,
			Addresses: addrs("172.26.64.2"), Guard: workload.GuardEnforce, Egress: workload.GuardAudit,
			ExcludeOutboundPorts: []uint16{22}, ExcludeInboundPorts: []uint16{7071}, Notes: records[0].Request.Notes,
		}
		if diff := cmp.Diff(want, records[0].Request, sameAddrs()); diff != "" || len(want.Notes) != 2 {
			t.Errorf("record (-want +got):\n%s\nnotes %q: want one for each list", diff, want.Notes)
		}
		if again == 0 {
			before := n.agent.Status().Counts.Added
			if err := os.RemoveAll(filepath.Join(n.config.StateDir, "workloads")); err != nil {
				t.Fatal(err)
			}
			test.Eventually(t, func() error {
				if n.agent.Status().Counts.Added == before {
					return errors.New("it was not made anew")
				}
				return nil
			}, "the record to come back")
		}
	}
	for id, part := range map[string]string{greedy: "weir.exclude-uids: the operator of this node does not let a job set it", elsewhere: "address 172.26.64.77 is not in"} {
		view := n.eventually(id, api.StateUnprotected)
		if text := fmt.Sprint(view.Problems); !strings.Contains(text, part) || !strings.Contains(text, id) {
			t.Errorf("problems of %s are %s, want one with %q", id, text, part)
		}
	}
}
