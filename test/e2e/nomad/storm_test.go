// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
	"github.com/weirmesh/weir/test/spawn"
)

// TestStorm starts many transparent allocations at once, four times on the same node:
// with Weir in the place of consul-cni, in cni/weir, with a plugin in the place of
// consul-cni that does nothing but call Consul's own iptables engine, and in a network
// that has loopback alone, which is the least that Nomad and Consul take for them. What
// each took is logged; nothing is asserted of it. WEIR_STORM is how many, 30 where
// it is not set: the figures that are told elsewhere are of 100.
func TestStorm(t *testing.T) {
	count := test.Scale(30)
	if text := os.Getenv("WEIR_STORM"); text != "" {
		var err error
		if count, err = strconv.Atoi(text); err != nil || count < 1 {
			t.Fatalf("WEIR_STORM is %q, want a number of allocations", text)
		}
	}
	stopwatch := filepath.Join(nomad.Build(t, ".", "./test/nomad/stopwatch"), "stopwatch")
	engine := filepath.Join(nomad.Build(t, "test/bench", "./engine"), "engine")
	node := nomad.Start(t, nomad.Options{NoDocker: true, Conflists: []string{"testdata/least.conflist"}})
	node.Command("mv", "/opt/cni/bin", "/opt/cni/real")
	for name := range strings.FieldsSeq(node.Command("ls", "/opt/cni/real")) {
		node.Command("mkdir", "-p", "/opt/cni/bin")
		node.InstallPlugin(stopwatch, name)
	}

	for _, each := range []struct {
		name, mode string
		plugins    []string // that Nomad has run for each allocation
	}{
		{"Bridge", "bridge", []string{"loopback", "bridge", "firewall", "portmap", "consul-cni"}},
		{"Weir", "cni/weir", []string{"weir"}},
		{"Reference", "bridge", []string{"loopback", "bridge", "firewall", "portmap", "consul-cni"}},
		{"Least", "cni/least", []string{"loopback"}}, // without Weir's agent, as Reference ends it
	} {
		t.Run(each.name, func(t *testing.T) {
			n := node.For(t)
			reference := each.name == "Reference"
			if reference {
				n.Agent.Stop(t) // it would be on no such node
				n.InstallPlugin(engine, "../real/consul-cni")
			}
			serveNeighbour(t, n, ":80")
			n.Command("rm", "-f", "/opt/cni/calls")
			began := time.Now()
			job := n.Run("testdata/jobs/storm.nomad.hcl", "mode", each.mode, "count", strconv.Itoa(count))
			wall := time.Since(began)
			allocs := job.Allocs()
			if len(allocs) != count {
				t.Errorf("%d allocations run, want %d", len(allocs), count)
			}
			adds := calls(t, n, "ADD")
			wantCalls(t, adds, each.plugins, count)
			if each.name != "Least" {
				wantInForce(t, n, allocs, !reference)
			}
			job.Stop()
			for _, a := range allocs {
				// One after the other, so that each has half a minute: all may take longer.
				test.Eventually(t, func() error {
					if _, err := os.Stat(namespace(n, a)); !errors.Is(err, os.ErrNotExist) {
						return fmt.Errorf("it is still there: %v", err)
					}
					return nil
				}, "the end of the namespace of "+a.ID)
			}
			n.ExpectNothingLeft()
			deletions := calls(t, n, "DEL")
			wantCalls(t, deletions, each.plugins, count)
			t.Logf("%d allocations, %s: all run after %.1f s; in CNI %s; DEL %s", count, each.name, wall.Seconds(), spent(adds), spent(deletions))
			if plugins := spentBy(adds); len(plugins) > 1 {
				t.Logf("%s: ADD, mean of each plugin: %v", each.name, plugins)
			}
		})
	}
}

// calls is what the stopwatch has written of one command.
func calls(t *testing.T, n *nomad.Node, command string) (list []wire.Call) {
	t.Helper()
	file, err := os.Open(n.Path("/opt/cni/calls"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for lines := json.NewDecoder(file); lines.More(); {
		var call wire.Call
		if err := lines.Decode(&call); err != nil {
			t.Fatalf("read calls: %v", err)
		}
		if call.Command == command {
			list = append(list, call)
		}
	}
	return list
}

// wantCalls fails where a call failed, or where one was made twice or not at all:
// Nomad tries an ADD three times.
func wantCalls(t *testing.T, list []wire.Call, plugins []string, count int) {
	t.Helper()
	made := make(map[string]map[string]int)
	for _, call := range list {
		if call.Code != 0 {
			t.Errorf("%s of %s for %s: code %d", call.Command, call.Plugin, call.Container, call.Code)
		}
		if made[call.Plugin] == nil {
			made[call.Plugin] = make(map[string]int)
		}
		made[call.Plugin][call.Container]++
	}
	for _, plugin := range plugins {
		if got := len(made[plugin]); got != count {
			t.Errorf("%s was called for %d allocations, want %d", plugin, got, count)
		}
		for container, times := range made[plugin] {
			if times != 1 {
				t.Errorf("%s was called %d times for %s, want once", plugin, times, container)
			}
		}
		delete(made, plugin)
	}
	if len(made) > 0 {
		t.Errorf("other plugins were called: %v", made)
	}
}

// wantInForce fails where an allocation reaches the neighbour: its stand-in for a
// proxy does not listen, so each connection must be refused. What Weir holds must
// be listed, and nothing else.
func wantInForce(t *testing.T, n *nomad.Node, allocs []*nomad.Alloc, weirs bool) {
	t.Helper()
	dial := func(netns string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		conn, err := spawn.Dialer(netns)(ctx, "tcp", nomad.NeighbourAddress+":80")
		if err == nil {
			conn.Close()
		}
		return err
	}
	if err := dial(n.NetNS().Path); err != nil {
		t.Fatalf("the node itself does not reach its neighbour: %v", err)
	}
	for _, a := range allocs {
		if err := dial(namespace(n, a)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("allocation %s dials its neighbour: %v, want ECONNREFUSED", a.ID, err)
		}
	}
	listed := make(map[string]nomad.Workload)
	for _, w := range n.Workloads() {
		listed[w.ID] = w
	}
	want := 0
	if weirs {
		want = len(allocs)
	}
	if len(listed) != want {
		t.Errorf("weir lists %d workloads, want %d", len(listed), want)
	}
	for _, a := range allocs {
		if w := listed[a.ID]; weirs && (w.Mode != "transparent" || len(w.Problems) > 0) {
			t.Errorf("workload of %s is %+v, want transparent, no problems", a.ID, w)
		}
	}
}

func namespace(n *nomad.Node, a *nomad.Alloc) string {
	return n.Path(filepath.Join("/run/netns", a.ID))
}

// spent tells how long plugins ran for allocations.
func spent(list []wire.Call) string {
	took := make(map[string]time.Duration)
	var all time.Duration
	first, last := list[0].Start, time.Time{}
	for _, call := range list {
		took[call.Container] += call.Took
		all += call.Took
		if call.Start.Before(first) {
			first = call.Start
		}
		if end := call.Start.Add(call.Took); end.After(last) {
			last = end
		}
	}
	var each []time.Duration
	for _, duration := range took {
		each = append(each, duration)
	}
	slices.Sort(each)
	return fmt.Sprintf("%.2f s (median %.1f ms, slowest %.1f ms), from the first to the last %.1f s",
		all.Seconds(), millis(each[len(each)/2]), millis(each[len(each)-1]), last.Sub(first).Seconds())
}

// spentBy is the mean of each plugin's calls.
func spentBy(list []wire.Call) map[string]string {
	took, made := make(map[string]time.Duration), make(map[string]int)
	for _, call := range list {
		took[call.Plugin] += call.Took
		made[call.Plugin]++
	}
	told := make(map[string]string)
	for plugin, all := range took {
		told[plugin] = fmt.Sprintf("%.1f ms", millis(all/time.Duration(made[plugin])))
	}
	return told
}

func millis(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
