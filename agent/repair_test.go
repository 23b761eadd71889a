// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

const transparentMesh = `{"ProxyUserID":"101","ProxyInboundPort":20001,"ProxyOutboundPort":15001}`

// transparent puts an allocation under Weir as the plugin does.
func (n *node) transparent(id string) (ns *test.NetNS, key workload.AttachmentID) {
	n.t.Helper()
	ns, key = test.NewNetNS(n.t), workload.AttachmentID{ContainerID: id, IfName: "eth0"}
	inside := addressed(n.t, ns)
	err := n.Add(redirect.Attachment{Key: key, NetNS: ns.Path, Request: workload.Request{
		Network: "nomad", Job: workload.Job{AllocID: id}, Mode: workload.ModeTransparent, ProxyUID: 101, InboundPort: 20001, OutboundPort: 15001,
		Addresses: []netip.Addr{netip.MustParsePrefix(inside).Addr()},
	}})
	if err != nil {
		n.t.Fatal(err)
	}
	n.result(id, ns.Path, transparentMesh, inside)
	return ns, key
}

// addressed gives a namespace an address, as a plugin before ours does.
func addressed(t *testing.T, ns *test.NetNS) string {
	t.Helper()
	inside := netip.MustParsePrefix("172.26.64.2/20")
	test.Veth(t,
		test.VethEnd{NetNS: test.NewNetNS(t), Addrs: []netip.Prefix{netip.MustParsePrefix("172.26.64.1/20")}},
		test.VethEnd{NetNS: ns, Addrs: []netip.Prefix{inside}})
	return inside.String()
}

// Whatever somebody takes away while the agent runs is noticed within seconds,
// put back, counted and told.
func TestAgentRepairsWhatSomebodyTookAway(t *testing.T) {
	n := newNode(t)
	test.Need(t, test.Tool("bpftool"))
	n.config.CgroupRoot = filepath.Join(test.NewCgroup(t).Path, "root")
	n.Datapath = redirect.New(n.config.Paths())
	mkdir := func() error { return os.Mkdir(n.config.CgroupRoot, 0o755) }
	if err := mkdir(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(n.config.CgroupRoot); err != nil {
			t.Error(err)
		}
	})
	id := numbered(1)
	ns, key := n.transparent(id)
	n.fake.answers(registered(id))
	n.run()
	n.eventually(id, api.StateManaged)

	pin := func(parts ...string) string { return filepath.Join(append([]string{n.config.PinDir}, parts...)...) }
	lookup := pin("lookups", fmt.Sprint(ns.Cookie()))
	detach := func(pin string) error {
		out, err := exec.Command("bpftool", "link", "detach", "pinned", pin).CombinedOutput()
		if err != nil {
			return fmt.Errorf("bpftool: %w: %s", err, out)
		}
		return nil
	}
	for _, c := range []struct {
		name   string
		damage func() error
	}{
		{"a program's link detached", func() error { return detach(pin("links", "weir_connect4")) }},
		{"a program's pin removed", func() error { return os.Remove(pin("links", "weir_getsockopt")) }},
		{"the lookup program detached", func() error { return detach(lookup) }},
		{"the lookup program's pin removed", func() error { return os.Remove(lookup) }},
		{"a map's pin removed", func() error { return os.Remove(pin("maps", "origins")) }},
		{"all pins removed", func() error { return os.RemoveAll(n.config.PinDir) }},
		{"the cgroup root replaced", func() error { return errors.Join(os.Remove(n.config.CgroupRoot), mkdir()) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := n.agent.Status().Counts.Repaired
			if err := c.damage(); err != nil {
				t.Fatal(err)
			}
			test.Eventually(t, func() error {
				if now := n.agent.Status().Counts.Repaired; now == before {
					return errors.New("nothing was repaired")
				}
				return n.whole(key)
			}, "the node to be whole")
		})
	}

	t.Run("the cgroup root is gone for a while", func(t *testing.T) {
		if err := os.Remove(n.config.CgroupRoot); err != nil {
			t.Fatal(err)
		}
		test.Eventually(t, func() error {
			if healthy, why := n.agent.Status().Healthy(time.Now()); healthy || !strings.Contains(why, "cgroup root") {
				return fmt.Errorf("healthy %v: %q", healthy, why)
			}
			return nil
		}, "the loss to be told")
		if err := mkdir(); err != nil {
			t.Fatal(err)
		}
		test.Eventually(t, func() error {
			if healthy, why := n.agent.Status().Healthy(time.Now()); !healthy {
				return errors.New(why)
			}
			return n.whole(key)
		}, "the node to be whole")
	})

	t.Run("the record removed", func(t *testing.T) {
		before := n.agent.Status().Counts.Added
		if err := os.RemoveAll(filepath.Join(n.config.StateDir, "workloads")); err != nil {
			t.Fatal(err)
		}
		test.Eventually(t, func() error {
			if now := n.agent.Status().Counts.Added; now == before {
				return errors.New("the record was not made anew")
			}
			return n.whole(key)
		}, "the node to be whole")
	})
}

// After a reboot libcni knows an allocation from before, whose record comes when
// Nomad adds it anew.
func TestARecordThatComesLaterIsNoProblem(t *testing.T) {
	n := newNode(t)
	id, ns := numbered(1), test.NewNetNS(t)
	n.fake.answers(registered(id))
	n.cached(id, ns.Path, transparentMesh)
	n.run()
	if found := n.eventually(id, api.StateUnprotected); !strings.Contains(fmt.Sprint(found.Problems), errRecordMissing.Error()) {
		t.Errorf("problems are %q, want the missing record", found.Problems)
	}
	err := n.Add(redirect.Attachment{Key: workload.AttachmentID{ContainerID: id, IfName: "eth0"}, NetNS: ns.Path, Request: workload.Request{
		Network: "nomad", Job: workload.Job{AllocID: id}, ProxyUID: 101, InboundPort: 20001, OutboundPort: 15001,
	}})
	if err != nil {
		t.Fatal(err)
	}
	test.Eventually(t, func() error {
		found := n.eventually(id, api.StateManaged)
		if len(found.Problems) > 0 || !found.InSync {
			return fmt.Errorf("in sync: %t, problems %q", found.InSync, found.Problems)
		}
		return nil
	}, "the allocation to be in sync without problems")
}

// A namespace that cannot be looked at may be redirected by Consul's own rules:
// what hinders the look is said at once, not that a record is missing.
func TestANamespaceThatCannotBeLookedAtIsNamed(t *testing.T) {
	n := newNode(t)
	id, file := numbered(1), filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.cached(id, filepath.Join(file, "netns"), transparentMesh)
	n.run()
	if found := n.eventually(id, api.StateUnprotected); len(found.Problems) != 1 || !strings.Contains(found.Problems[0].What, "not a directory") {
		t.Errorf("problems are %q, want that its path leads through a file", found.Problems)
	}
}

// whole reports what is wrong with the node, by a look of its own.
func (n *node) whole(key workload.AttachmentID) error {
	status, err := n.Status()
	if err != nil {
		return err
	}
	if !status.Healthy() || status.Workloads != 1 {
		return fmt.Errorf("%d workloads, problems %v", status.Workloads, status.Problems)
	}
	known, err := n.Records()
	if err != nil {
		return err
	}
	if len(known) != 1 || known[0].Key != key || known[0].Request.Mode != workload.ModeTransparent && known[0].Request.Mode != "" {
		return fmt.Errorf("on record: %+v, want %s alone", known, key)
	}
	return nil
}
