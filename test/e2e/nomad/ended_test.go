// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

// TestEndedWhileNomadWasDown: Nomad makes no DEL for an allocation that it finds ended
// when its client starts, as where the client dies while a job stops. Its network
// stays, and on Nomad's bridge a new allocation with the same static port gets no
// connections, until "weir gc" takes the old one away.
func TestEndedWhileNomadWasDown(t *testing.T) {
	n := nomad.Start(t, nomad.Options{})
	ports := map[string]string{"bridge": "28101", "exec": "28102", "docker": "28103"}
	url := func(group string) string { return "http://" + nomad.NodeAddress + ":" + ports[group] + "/" }

	old := n.Run("testdata/jobs/ended.nomad.hcl", "id", "ended-old", "delay", "5s")
	ids := make(map[string]string)
	for group := range ports {
		a := old.Alloc(group)
		ids[group] = a.ID
		wantReply(t, n.Get(n.Neighbour(), url(group)), a)
	}
	n.Command("nomad", "job", "stop", "-detach", old.ID)
	test.Eventually(t, func() error { // the client has begun to end them
		var services map[string]struct{}
		n.ConsulGet("/v1/agent/services", &services)
		for service := range services {
			if strings.Contains(service, old.ID) {
				return fmt.Errorf("Consul still has %s", service)
			}
		}
		return nil
	}, "the end of the services")
	n.Nomad.Kill(t)
	n.Nomad.Start(t)
	test.Eventually(t, func() error {
		var list []struct{ ID, ClientStatus string }
		n.NomadGet("/v1/job/"+old.ID+"/allocations", &list)
		for _, a := range list {
			if a.ClientStatus != "complete" {
				return fmt.Errorf("allocation %s is %s", a.ID, a.ClientStatus)
			}
		}
		return nil
	}, "the end of the allocations")
	for _, want := range []struct{ pattern, id string }{
		{"/run/netns/*", ids["bridge"]},
		{"/run/netns/*", ids["exec"]},
		{"/run/weir/workloads/*.json", ids["exec"]},
		{"/run/weir/networks/*.json", ids["exec"]},
		{"/run/weir/networks/*.json", ids["docker"]},
		{"/var/lib/cni/results/*", ids["docker"]},
	} {
		if list := files(n, want.pattern); !slices.ContainsFunc(list, func(file string) bool { return strings.Contains(file, want.id) }) {
			t.Errorf("%s has nothing of %s: %q; does Nomad make a DEL by now?", want.pattern, want.id, list)
		}
	}

	again := n.Run("testdata/jobs/ended.nomad.hcl", "id", "ended-new", "delay", "0s")
	for _, group := range []string{"exec", "docker"} { // of Weir's own network: the port went over to the new one
		wantReply(t, n.Get(n.Neighbour(), url(group)), again.Alloc(group))
	}
	if got := n.Get(n.Neighbour(), url("bridge")); got.Reply != nil {
		t.Errorf("the new allocation on Nomad's bridge is reached: %s; docs/limits.md says that it is not", got)
	}
	test.Eventually(t, func() error {
		if text := n.Command("weir", "workloads"); !strings.Contains(text, "ended-old/docker/"+ids["docker"][:8]+"\n  it has ended") {
			return fmt.Errorf("it shows\n%s", text)
		}
		return nil
	}, "the agent to name the allocation that is over")
	status, err := n.Try("weir", "status")
	if err == nil {
		t.Errorf("status is content although a service cannot be reached:\n%s", status)
	}
	status = strings.Join(strings.Fields(status), " ") // whatever line a word is on
	lines := []string{
		"the network of 1 allocation that is over", "the namespace of 2 allocations",
		fmt.Sprintf("ended-old/bridge/%s: it has no process any more and still holds host port %s/tcp of ended-new/bridge/%s, which runs",
			ids["bridge"][:8], ports["bridge"], again.Alloc("bridge").ID[:8]),
		"run 'weir gc -empty " + ids["bridge"][:8] + "'",
	}
	for _, line := range lines {
		if !strings.Contains(status, line) || strings.Contains(status, "not under Weir") {
			t.Errorf("status does not say %q:\n%s", line, status)
		}
	}
	for _, group := range []string{"exec", "docker"} {
		if strings.Contains(status, "ended-old/"+group+"/"+ids[group][:8]+" has no process any more and still holds") {
			t.Errorf("status says that the old allocation of group %s holds the port of the new one, which has it:\n%s", group, status)
		}
	}

	before := networksOn(n)
	would := n.Command("weir", "gc", "-dry-run")
	if diff := cmp.Diff(before, networksOn(n)); diff != "" {
		t.Errorf("-dry-run changed the node (-before +after):\n%s", diff)
	}
	did := n.Command("weir", "gc")
	if strings.ReplaceAll(would, "would remove", "removed") != did {
		t.Errorf("gc -dry-run said\n%s\ngc did\n%s", would, did)
	}
	for group, what := range map[string]string{"bridge": "kept", "exec": "kept", "docker": "removed"} {
		if line := what + " ended-old/" + group + "/" + ids[group][:8] + " from network "; !strings.Contains(did, line) {
			t.Errorf("gc does not say %q:\n%s", line, did)
		}
	}
	if strings.Contains(did, "ended-new") {
		t.Errorf("gc names allocations that run:\n%s", did)
	}
	n.Command("weir", "gc", "-empty", ids["bridge"][:8]+","+ids["exec"])
	if text := n.Command("weir", "gc", "-empty", "all"); !strings.HasPrefix(text, "nothing to do") {
		t.Errorf("gc still does\n%s", text)
	}

	living := make(map[string]bool)
	for group := range ports {
		a := again.Alloc(group)
		living[a.ID] = true
		wantReply(t, n.Get(n.Neighbour(), url(group)), a)
	}
	left := errors.Join(
		onlyThese("results", files(n, "/var/lib/cni/results/*"), living),
		onlyThese("records", files(n, "/run/weir/workloads/*.json"), living),
		onlyThese("leases", leases(n), living))
	if left != nil {
		t.Error(left)
	}
	again.Stop()
	n.ExpectNothingLeft()
}

// networksOn is all that a node has of its allocations' networks.
func networksOn(n *nomad.Node) []string {
	return slices.Concat(files(n, "/run/netns/*"), files(n, "/var/lib/cni/results/*"), files(n, "/run/weir/*/*"), leases(n),
		files(n, "/sys/fs/bpf/weir/lookups/*"), []string{n.Command("ip", "-o", "link"), n.Command("nft", "-s", "list", "ruleset")})
}
