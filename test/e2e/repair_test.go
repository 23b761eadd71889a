// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// What somebody else takes off the node while the agent runs is noticed within
// seconds, put back, counted and told; the mesh carries traffic again, the guard
// refuses again, and what was open stays open.
func TestAgentRepairs(t *testing.T) {
	n := newMeshNode(t, false)
	test.Need(t, test.Tool("bpftool"))
	n.config.Guard.Default = string(workload.GuardEnforce)
	n.runAgent()
	apiAlloc := n.allocate("")
	apiAlloc.startEnvoy(apiAlloc.register("api", object{"Port": 20001}))
	server := test.EchoProcess(t, apiAlloc.spec(1000), "tcp4", "0.0.0.0:8080")
	shop := n.allocate(`{"ProxyUserID":"101","ProxyInboundPort":0,"ProxyOutboundPort":15001}`)
	shop.startEnvoy(shop.register("shop", object{"Port": 20003, "Proxy": object{"Mode": "transparent"}}))
	n.intend("api", "shop", "allow")
	virtual := netip.AddrPortFrom(n.virtualIP("api"), 80).String()
	task := shop.newHeld()
	wantServed(t, task, virtual, server.Name)
	apiAlloc.wantGuard(t, workload.GuardEnforce)
	if _, err := task.say("open", virtual); err != nil {
		t.Fatal(err)
	}

	pin := func(path ...string) string { return filepath.Join(append([]string{n.config.PinDir}, path...)...) }
	detach := func(t *testing.T, path string) {
		t.Helper()
		if out, err := exec.Command("bpftool", "link", "detach", "pinned", path).CombinedOutput(); err != nil {
			t.Fatalf("detach %s: %v: %s", path, err, out)
		}
	}
	lookup := func(a *meshAlloc) string { return pin("lookups", fmt.Sprint(a.ns.Cookie())) }
	for _, c := range []struct {
		name   string
		damage func(t *testing.T)
	}{
		{"a program at the cgroup root is detached", func(t *testing.T) { detach(t, pin("links", "weir_connect4")) }},
		{"all programs at the cgroup root are detached", func(t *testing.T) {
			entries, err := os.ReadDir(pin("links"))
			if err != nil {
				t.Fatal(err)
			}
			for _, entry := range entries {
				detach(t, pin("links", entry.Name()))
			}
		}},
		{"the guard's program is detached", func(t *testing.T) { detach(t, lookup(apiAlloc)) }},
		{"the guard's program is unpinned", func(t *testing.T) {
			if err := os.Remove(lookup(apiAlloc)); err != nil {
				t.Fatal(err)
			}
		}},
		{"the maps are unpinned", func(t *testing.T) { removeFilesIn(t, pin("maps")) }},
		{"everything is unpinned", func(t *testing.T) { removeFilesIn(t, pin()) }},
		{"everything is unpinned, and the records are gone", func(t *testing.T) {
			removeFilesIn(t, pin())
			removeFilesIn(t, filepath.Join(n.config.StateDir, "workloads"))
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := n.mustStatus(t).Counts
			told := strings.Count(n.log.String(), "repaired")
			began := time.Now()
			c.damage(t)
			test.Eventually(t, func() error {
				counts := n.mustStatus(t).Counts
				if counts.Repaired <= before.Repaired && counts.Added <= before.Added {
					return errors.New("nothing was repaired")
				}
				status, err := n.Status()
				if err == nil && !status.Healthy() {
					err = fmt.Errorf("problems: %+v", status.Problems)
				}
				if err != nil {
					return err
				}
				if _, err := task.exchange(virtual); err != nil {
					return err
				}
				if _, err := test.Ask(n.outside, "tcp4", apiAlloc.at(8080).String()); !errors.Is(err, syscall.ECONNREFUSED) {
					return fmt.Errorf("dial past the guard: %w", err)
				}
				return nil
			}, "repair")
			t.Logf("repaired after %s", time.Since(began).Round(time.Millisecond))
			if strings.Count(n.log.String(), "repaired") <= told {
				t.Error("the log does not tell")
			}
			wantServed(t, task, virtual, server.Name)
			if word, err := task.say("open", virtual); err != nil || word != "still here" {
				t.Errorf("the open connection says %q, %v", word, err)
			}
			for _, a := range []*meshAlloc{apiAlloc, shop} {
				if w, err := a.workload(); err != nil || w.Guard != workload.GuardEnforce || len(w.Problems) > 0 {
					t.Errorf("the kernel has %+v, %v; want it guarded without problems", w, err)
				}
			}
		})
	}

	// A namespace that dies without a DEL, as after a node's crash.
	t.Run("a namespace dies", func(t *testing.T) {
		dead := n.allocate("")
		dead.register("dead", object{"Port": 20009})
		dead.eventually("it to be found", func(o workload.MeshConfig) bool { return o.InboundPort == 20009 })
		before, program := n.mustStatus(t).Counts.Pruned, lookup(dead)
		dead.ns.End()
		test.Eventually(t, func() error {
			if _, err := dead.known(); !errors.Is(err, store.ErrUnknown) {
				return fmt.Errorf("it is on record: %w", err)
			}
			if n.mustStatus(t).Counts.Pruned == before {
				return errors.New("it is not counted as pruned")
			}
			_, err := os.Stat(program)
			if !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("its program is still pinned: %w", err)
			}
			return nil
		}, "what belonged to it to go")
		wantServed(t, task, virtual, server.Name)
	})
}
