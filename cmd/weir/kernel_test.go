// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/cni/ended"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// All commands on a node of the test's own: what an operator sees from load
// to unload, with one allocation whose proxy does not run.
func TestOnAKernel(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	environment := map[string]string{
		"WEIR_PIN_DIR":   filepath.Join(test.BPFFS(t), "weir"),
		"WEIR_STATE_DIR": t.TempDir(),
	}
	weir := func(ctx context.Context, args ...string) (code int, ui *cli.MockUi) {
		ui = cli.NewMockUi()
		return weirTo(ctx, ui, environment, args...), ui
	}
	first := func(code int, ui *cli.MockUi) string {
		line, _, _ := strings.Cut(ui.OutputWriter.String()+ui.ErrorWriter.String(), "\n")
		return fmt.Sprintf("%d %s", code, line)
	}
	expect := func(want string, args ...string) {
		t.Helper()
		if got := first(weir(t.Context(), args...)); got != want {
			t.Errorf("weir %s: got %q, want %q", strings.Join(args, " "), got, want)
		}
	}

	expect("1 not healthy: 1 problem; no agent answers, so plain connect jobs are not guarded", "status")
	if got := first(weir(t.Context(), "load")); !strings.HasPrefix(got, "0 created ") {
		t.Errorf("weir load: got %q, want what it created", got)
	}
	t.Cleanup(func() { weir(context.Background(), "unload", "-force") })
	expect("0 nothing to do: the data path is loaded and of this version", "load")
	expect("0 healthy: 0 workloads; no agent runs, so plain connect jobs are not guarded", "status")

	ns := test.NewNetNS(t)
	getenv := func(name string) string { return environment[name] }
	err := redirect.New(store.PathsFromEnv(getenv)).Add(redirect.Attachment{
		Key:   workload.AttachmentID{ContainerID: "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01", IfName: "eth0"},
		NetNS: ns.Path,
		Request: workload.Request{
			Network: "nomad", Job: workload.Job{ID: "demo", Group: "web"},
			Mode: workload.ModeTransparent, ProxyUID: 101, InboundPort: 20000, OutboundPort: 15001,
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	expect("0 healthy: 1 workload; no agent runs, so plain connect jobs are not guarded", "status")

	ctx, stop := context.WithCancel(t.Context())
	events := cli.NewMockUi()
	ended := make(chan int, 1)
	go func() { ended <- weirTo(ctx, events, environment, "events", "-f", "-json") }()
	origin := netip.MustParseAddrPort("192.0.2.1:8080")
	test.Eventually(t, func() error {
		if _, err := test.Ask(ns, "tcp4", origin.String()); !errors.Is(err, syscall.ECONNREFUSED) {
			return fmt.Errorf("dial = %w, want ECONNREFUSED", err)
		}
		for line := range strings.Lines(events.OutputWriter.String()) {
			var event monitor.Event
			if err := json.Unmarshal([]byte(line), &event); err != nil {
				return err
			}
			if event.Origin == origin && event.Name == bpfmap.RefusedNoProxy.String() && event.PID != 0 {
				return nil
			}
		}
		return fmt.Errorf("no event of it in %q", events.OutputWriter.String())
	}, "an event of a dial")
	stop()
	if code := <-ended; code != 0 {
		t.Errorf("events -f ended with code %d: %s", code, events.ErrorWriter.String())
	}

	_, ui := weir(t.Context(), "verdicts")
	for _, want := range []string{"demo/web/0b5d0c1e\n", "  refused_no_proxy "} {
		if !strings.Contains(ui.OutputWriter.String(), want) {
			t.Errorf("verdicts: no %q in:\n%s", want, ui.OutputWriter.String())
		}
	}
	_, ui = weir(t.Context(), "workloads")
	if line := "0b5d0c1e  demo  web    yes        redirect  down   off    -\n"; !strings.Contains(ui.OutputWriter.String(), line) {
		t.Errorf("workloads: no %q in:\n%s", line, ui.OutputWriter.String())
	}

	topOnAKernel(t, weir, ns)
	archive := filepath.Join(t.TempDir(), "debug.tar.gz")
	if code, ui := weir(t.Context(), "debug", "-o", archive, "-config", t.TempDir()); code != 0 {
		t.Errorf("weir debug = %d: %s", code, ui.ErrorWriter.String())
	}
	debugOnAKernel(t, archive, store.PathsFromEnv(getenv))
	expect("1 weir unload: 1 allocation run under Weir:", "unload")
	expect("0 removed workload 0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01-eth0", "unload", "-force")
	expect("0 nothing to do: nothing is loaded", "unload")
	expect("1 not healthy: 1 problem; no agent answers, so plain connect jobs are not guarded", "status")
}

// weirTo runs the program on the kernel and shows what it says on ui.
func weirTo(ctx context.Context, ui cli.Ui, environment map[string]string, args ...string) int {
	return run(args, base.Env{
		Ctx:    ctx,
		UI:     ui,
		Getenv: func(name string) string { return environment[name] },
		Open:   func(paths store.Paths) base.Datapath { return redirect.New(paths) }, Ask: api.ReadStatus, AskEvents: api.ReadEvents, AskFlows: api.ReadFlows, AskBehind: api.ReadBehind, AskTraffic: api.ReadTraffic, AskChanges: api.ReadChanges, AskGuard: api.ReadGuard,
		Journal:   func(context.Context, int) (string, error) { return "", nil },
		Leftovers: func(ended.Node) base.Leftovers { return &node{} },
	})
}
