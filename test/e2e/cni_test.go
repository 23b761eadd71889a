// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/cni"
	"github.com/weirmesh/weir/test"
)

// Walk 2, a CNI ADD: what Nomad does with one allocation from its start to its
// end, by the requests that a real Nomad sent.
func TestWalkOfACNIAdd(t *testing.T) {
	n := newCNINode(t).loaded(t)
	add := recordedFor(t, "tproxy-plain", "")
	check, del := recordedFor(t, "restart-check", add.id()), recordedFor(t, "stop", add.id())
	const inbound = "23435"
	first := n.allocate(t, add)

	if line := n.run(t, cniRequest{}); line.exit != 0 || !strings.HasPrefix(line.stdout, "consul-cni v1.") {
		t.Errorf("run without a command: %+v: want a version on stdout", line)
	}
	for range 3 {
		wantAnswer(t, first.run(t, add), first.in(add.ConsulStdout))
	}
	first.wantRedirected(t, inbound)
	wantSilence(t, first.run(t, check))
	if now := localRoutes(t, first.ns); slices.Equal(first.routes, now) {
		t.Errorf("local routes %v: want more than before the ADD", now)
	}

	t.Run("CHECK after the pins were lost", func(t *testing.T) {
		removeFilesIn(t, n.paths.PinDir)
		answer := first.run(t, check)
		wantSilence(t, answer)
		if !strings.Contains(answer.stderr, "repaired") {
			t.Errorf("stderr %q: want to hear what was repaired", answer.stderr)
		}
	})
	first.wantRedirected(t, inbound)

	t.Run("CHECK after the pins and the record were lost", func(t *testing.T) {
		removeFilesIn(t, n.paths.PinDir)
		removeFilesIn(t, filepath.Join(n.paths.StateDir, "workloads"))
		wantSilence(t, first.run(t, check))
	})
	first.wantRedirected(t, inbound)

	t.Run("CHECK in a namespace that came back empty", func(t *testing.T) {
		removeFilesIn(t, filepath.Join(n.paths.StateDir, "workloads"))
		empty := *first
		empty.ns = test.NewNetNS(t)
		wantRefusal(t, empty.run(t, check), 8, add.id(), first.addr.String())
		wantSilence(t, first.run(t, check))
		wantRefusal(t, empty.run(t, check), 8, add.id(), "replaced")
	})

	second := n.allocate(t, add)
	t.Run("ADD of the known ID with a new namespace", func(t *testing.T) {
		wantAnswer(t, second.run(t, add), second.in(add.ConsulStdout))
		want := map[string]string{add.Env["CNI_CONTAINERID"]: second.ns.Path}
		if diff := cmp.Diff(want, n.workloads(t)); diff != "" {
			t.Errorf("workloads (-want +got):\n%s", diff)
		}
	})
	second.wantRedirected(t, inbound)

	if del.Env["CNI_ARGS"] != "" {
		t.Fatal("the recorded DEL has arguments")
	}
	for range 2 {
		wantSilence(t, second.run(t, del))
	}
	wantSilence(t, second.run(t, del.configured(map[string]string{"prevResult": ""})))
	wantSilence(t, second.run(t, del.with(map[string]string{"CNI_NETNS": "/var/run/netns/gone"})))
	wantSilence(t, second.run(t, del.with(map[string]string{"CNI_NETNS": ""})))
	second.wantRoutesBack(t)
	n.wantIdle(t)
}

// Every recorded request runs, those that consul-cni fails too, and what
// consul-cni answers is our answer.
func TestRecordedCNIRequests(t *testing.T) {
	n := newCNINode(t).loaded(t)
	all := recordings(t)
	for _, scenario := range slices.Sorted(maps.Keys(all)) {
		for _, add := range all[scenario] {
			if add.Command != "ADD" {
				continue
			}
			t.Run(scenario+" "+add.id(), func(t *testing.T) {
				a := n.allocate(t, add)
				answer := a.run(t, add)
				if scenario == "user-args" {
					wantRefusal(t, answer, 4, add.id(), "ProxyUserID")
				} else {
					wantAnswer(t, answer, a.in(add.Stdin["prevResult"]))
					wantSilence(t, a.run(t, add.with(map[string]string{"CNI_COMMAND": "CHECK"})))
				}
				mesh := strings.Contains(add.Env["CNI_ARGS"], "CONSUL_") && scenario != "user-args"
				if _, known := n.workloads(t)[add.id()]; known != mesh {
					t.Errorf("workload on record: %v: want %v", known, mesh)
				}
				wantSilence(t, a.run(t, add.with(map[string]string{"CNI_COMMAND": "DEL", "CNI_ARGS": ""})))
				a.wantRoutesBack(t)
				n.wantIdle(t)
			})
		}
	}
}

func TestEveryCNIVersion(t *testing.T) {
	n := newCNINode(t).loaded(t)
	add := recordedFor(t, "tproxy-plain", "")
	for _, version := range cni.Versions().SupportedVersions() {
		t.Run(version, func(t *testing.T) {
			a := n.allocate(t, add)
			quoted := fmt.Sprintf("%q", version)
			request := add.configured(map[string]string{
				"cniVersion": quoted,
				"prevResult": strings.Replace(string(add.Stdin["prevResult"]), `"0.4.0"`, quoted, 1),
			})
			command := func(name string) cniRequest { return request.with(map[string]string{"CNI_COMMAND": name}) }
			wantAnswer(t, a.run(t, request), a.in(request.Stdin["prevResult"]))
			if version == "0.3.1" { // which has no CHECK
				wantRefusal(t, a.run(t, command("CHECK")), 1)
			} else {
				wantSilence(t, a.run(t, command("CHECK")))
			}
			if version == "1.1.0" {
				wantSilence(t, a.run(t, command("STATUS")))
				wantRefusal(t, a.run(t, command("GC")), 7, "cni.dev/valid-attachments")
			} else {
				wantRefusal(t, a.run(t, command("STATUS")), 1)
			}
			wantSilence(t, a.run(t, command("DEL")))
			n.wantIdle(t)
		})
	}
}

func TestCNIGarbageCollection(t *testing.T) {
	n := newCNINode(t).loaded(t)
	stale, valid, foreign := recordedFor(t, "tproxy-plain", ""), recordedFor(t, "tproxy-nodns", ""), recordedFor(t, "cni-mode-tproxy-args", "")
	for _, add := range []cniRequest{stale, valid, foreign} {
		a := n.allocate(t, add)
		wantAnswer(t, a.run(t, add), a.in(add.ConsulStdout))
	}
	gc := func(list string) cniAnswer {
		return n.run(t, cniRequest{}.with(map[string]string{"CNI_COMMAND": "GC", "CNI_PATH": "/opt/cni/bin"}).configured(map[string]string{
			"cniVersion": `"1.1.0"`, "name": `"nomad"`, "type": `"consul-cni"`, "cni.dev/valid-attachments": list,
		}))
	}
	wantSilence(t, gc(fmt.Sprintf(`[{"containerID":%q,"ifname":"eth0"}]`, valid.id())))
	if got, want := slices.Sorted(maps.Keys(n.workloads(t))), slices.Sorted(slices.Values([]string{valid.id(), foreign.id()})); !slices.Equal(got, want) {
		t.Errorf("workloads %v: want %v", got, want)
	}
	wantSilence(t, gc("[]"))
	if got := slices.Sorted(maps.Keys(n.workloads(t))); !slices.Equal(got, []string{foreign.id()}) {
		t.Errorf("workloads %v: want the other network's %s alone", got, foreign.id())
	}
}

func TestBadCNIRequestLeavesNothingBehind(t *testing.T) {
	n := newCNINode(t).loaded(t)
	add := recordedFor(t, "tproxy-plain", "")
	a := n.allocate(t, add)
	args := func(from, to string) cniRequest {
		changed := strings.Replace(add.Env["CNI_ARGS"], from, to, 1)
		if changed == add.Env["CNI_ARGS"] {
			t.Fatalf("%s is not in the recorded arguments", from)
		}
		return add.with(map[string]string{"CNI_ARGS": changed})
	}
	for name, tt := range map[string]struct {
		request cniRequest
		code    uint
		part    string
	}{
		"user name":              {args(`"1101"`, `"envoy"`), 4, "ProxyUserID"},
		"port beyond range":      {args(`23435`, `65536`), 4, "ProxyInboundPort"},
		"CIDR":                   {args(`"ExcludeOutboundCIDRs":null`, `"ExcludeOutboundCIDRs":["10/8"]`), 4, "ExcludeOutboundCIDRs"},
		"no JSON":                {args(`{`, `[`), 6, "CONSUL_IPTABLES_CONFIG"},
		"no IPAM plugin":         {add.configured(map[string]string{"prevResult": "", "ipam": `{"type":"no-such-ipam"}`}), cni.CodeMissing, "no-such-ipam"},
		"the plugin's namespace": {add.with(map[string]string{"CNI_NETNS": "/proc/self/ns/net"}), 8, "namespace"},
		"a namespace gone":       {add.with(map[string]string{"CNI_NETNS": "/var/run/netns/gone"}), 8, "namespace"},
		"not a namespace":        {add.with(map[string]string{"CNI_NETNS": "/proc/self/ns/mnt"}), 8, "/proc/self/ns/mnt"},
	} {
		t.Run(name, func(t *testing.T) {
			wantRefusal(t, a.run(t, tt.request), tt.code, add.id(), tt.part)
			a.wantRoutesBack(t)
			n.wantIdle(t)
		})
	}
}

// Consul's own rules in the namespace: from before us, or from a second plugin.
func TestCNIBesideConsulsOwnRules(t *testing.T) {
	test.Need(t, test.Tool("iptables"))
	n := newCNINode(t).loaded(t)
	add := recordedFor(t, "tproxy-plain", "")
	a := n.allocate(t, add)
	for _, rule := range []string{
		"-N CONSUL_PROXY_OUTPUT", "-N CONSUL_PROXY_REDIRECT",
		"-A CONSUL_PROXY_REDIRECT -p tcp -j REDIRECT --to-port 15001",
		"-A OUTPUT -p tcp -j CONSUL_PROXY_OUTPUT",
		"-A CONSUL_PROXY_OUTPUT -j CONSUL_PROXY_REDIRECT",
	} {
		var out []byte
		var err error
		a.ns.Do(func() {
			out, err = exec.Command("iptables", append([]string{"-t", "nat"}, strings.Fields(rule)...)...).CombinedOutput()
		})
		if err != nil {
			t.Fatalf("iptables %s: %v\n%s", rule, err, out)
		}
	}
	wantRefusal(t, a.run(t, add), cni.CodeConsulRules, add.id(), "Consul")
	wantSilence(t, a.run(t, recordedFor(t, "restart-check", add.id())))
	a.wantRoutesBack(t)
	n.wantIdle(t)
}

// The first ADDs of a node come at once, and each may be the one that loads.
func TestFirstCNIAddsLoadTheDataPath(t *testing.T) {
	n := newCNINode(t)
	var adds []cniRequest
	for _, scenario := range []string{"tproxy-plain", "tproxy-nodns", "tproxy-upstreams-expose", "custom-sidecar-port"} {
		adds = append(adds, recordedFor(t, scenario, ""))
	}
	unmeshed := recordedFor(t, "cni-mode-no-tproxy", "")
	a := n.allocate(t, unmeshed)
	wantAnswer(t, a.run(t, unmeshed), a.in(unmeshed.Stdin["prevResult"]))
	wantSilence(t, a.run(t, unmeshed.with(map[string]string{"CNI_COMMAND": "DEL", "CNI_ARGS": ""})))
	if _, err := os.Stat(n.paths.PinDir); err == nil {
		t.Error("an allocation without a mesh argument loaded the data path")
	}

	answers := make([]cniAnswer, len(adds))
	allocations := make([]*cniAllocation, len(adds))
	for i, add := range adds {
		allocations[i] = n.allocate(t, add)
	}
	var done sync.WaitGroup
	for i, add := range adds {
		done.Go(func() { answers[i] = allocations[i].run(t, add) })
	}
	done.Wait()
	for i, add := range adds {
		wantAnswer(t, answers[i], allocations[i].in(add.Stdin["prevResult"]))
	}
	if got := n.workloads(t); len(got) != len(adds) {
		t.Errorf("workloads %v: want %d", got, len(adds))
	}
	allocations[0].wantRedirected(t, "23435")
}
