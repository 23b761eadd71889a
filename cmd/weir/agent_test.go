// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// The agent tells systemd when it is ready and that it goes on, and ends when it
// is told to, with the data path left in place. There is no Consul.
func TestAgentTellsItsManager(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	dir := t.TempDir()
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "notify"))
	environment := map[string]string{
		"WEIR_PIN_DIR": filepath.Join(test.BPFFS(t), "weir"), "WEIR_STATE_DIR": filepath.Join(dir, "state"),
		"WEIR_CGROUP_ROOT": test.NewCgroup(t).Path, "CONSUL_HTTP_ADDR": "127.0.0.1:1",
	}
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan int, 1)
	ui := cli.NewMockUi()
	go func() { ended <- weirTo(ctx, ui, environment, "agent") }()
	await := func(want string) {
		t.Helper()
		if err := manager.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
		for buffer := make([]byte, 100); ; {
			n, err := manager.Read(buffer)
			if err != nil {
				t.Fatalf("wait for %s: %v; the agent wrote: %s", want, err, ui.OutputWriter)
			}
			if string(buffer[:n]) == want {
				return
			}
		}
	}
	await("READY=1")
	await("WATCHDOG=1")
	status, err := api.ReadStatus(t.Context(), environment["WEIR_STATE_DIR"])
	if err != nil || status.Consul.InSync {
		t.Errorf("status = %+v, %v; want it to know that there is no Consul", status, err)
	}
	stop()
	await("STOPPING=1")
	if code := <-ended; code != 0 {
		t.Errorf("exit code %d: %s", code, ui.ErrorWriter)
	}
	if !strings.Contains(ui.OutputWriter.String(), "msg=ready") {
		t.Errorf("log: %s", ui.OutputWriter)
	}
	datapath := redirect.New(store.PathsFromEnv(func(name string) string { return environment[name] }))
	if after, err := datapath.Status(); err != nil || !after.Healthy() {
		t.Errorf("the data path after the agent = %+v, %v; want it healthy", after, err)
	}
	if _, err := datapath.Unload(); err != nil {
		t.Error(err)
	}
}

// SIGHUP has the agent read its configuration anew within its process. What it
// cannot use it logs once, and goes on with what it has. A workload that runs
// keeps its programs, its rows and a connection through all of it.
func TestAgentReloads(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	dir := t.TempDir()
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "notify"))
	paths := store.Paths{PinDir: filepath.Join(test.BPFFS(t), "weir"), StateDir: filepath.Join(dir, "state"), CgroupRoot: test.NewCgroup(t).Path}
	datapath := redirect.New(paths)
	t.Cleanup(func() {
		if _, err := datapath.Unload(); err != nil {
			t.Error(err)
		}
	})
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// Who records flows renews its lease in a map each second: writes are counted here.
	write("1.hcl", fmt.Sprintf("pin_dir = %q\nstate_dir = %q\ncgroup_root = %q\nconsul {\n enabled = false\n}\ndocker {\n socket = \"\"\n}\n"+
		"flows {\n enabled = false\n}\n",
		paths.PinDir, paths.StateDir, paths.CgroupRoot))
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan int, 1)
	ui := cli.NewMockUi()
	told := func() []string { // by systemd's rules, without the sign of life
		t.Helper()
		for buffer := make([]byte, 200); ; {
			if err := manager.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
				t.Fatal(err)
			}
			n, err := manager.Read(buffer)
			if err != nil {
				t.Fatalf("wait for the agent: %v; it wrote: %s", err, ui.OutputWriter)
			}
			if text := string(buffer[:n]); text != "WATCHDOG=1" {
				return strings.Split(text, "\n")
			}
		}
	}
	wantTold := func(want string) {
		t.Helper()
		if got := told(); got[0] != want {
			t.Fatalf("the agent tells %q, want %s; it wrote: %s", got, want, ui.OutputWriter)
		}
	}
	reload := func() {
		t.Helper()
		if err := unix.Kill(os.Getpid(), unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
		got := told()
		if len(got) < 2 || got[0] != "RELOADING=1" || !strings.HasPrefix(got[1], "MONOTONIC_USEC=") {
			t.Fatalf("the agent tells %q, want that it reloads, with the time", got)
		}
		wantTold("READY=1")
	}
	health := func(address string) bool {
		answer, err := http.Get("http://" + address + "/health")
		return err == nil && answer.Body.Close() == nil && answer.StatusCode == http.StatusOK
	}
	free := func() string {
		t.Helper()
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		return listener.Addr().String()
	}
	first, second, third := free(), free(), free()
	listen := func(address string) string { return fmt.Sprintf("telemetry {\n listen = %q\n}\n", address) }
	// Whoever records asks the kernel for events, by a map, and a gate is its process' own.
	write("3.hcl", "flows {\n enabled = false\n}\ngate {\n timeout = \"0s\"\n}\n")
	write("2.hcl", listen(first))
	go func() { ended <- weirTo(ctx, ui, nil, "agent", "-config", dir) }()
	wantTold("READY=1")
	ns := test.NewNetNS(t)
	key := workload.AttachmentID{ContainerID: "alloc", IfName: "eth0"}
	if err := datapath.Add(redirect.Attachment{Key: key, NetNS: ns.Path, Request: workload.Request{
		Network: "nomad", Mode: workload.ModeTransparent, ProxyUID: 101, InboundPort: 20000, OutboundPort: 15001}}); err != nil {
		t.Fatal(err)
	}
	before, err := datapath.Workloads()
	if err != nil || len(before) != 1 {
		t.Fatalf("workloads are %+v, %v", before, err)
	}
	writes := test.CountMapWrites(t)
	running := func(want, gone string) {
		t.Helper()
		if !health(want) {
			t.Errorf("nothing answers at %s; the agent wrote: %s", want, ui.OutputWriter)
		}
		if gone != "" && health(gone) {
			t.Errorf("there is still an answer at %s", gone)
		}
		if _, err := api.ReadStatus(t.Context(), paths.StateDir); err != nil {
			t.Errorf("the local API: %v", err)
		}
	}
	running(first, "")
	write("2.hcl", listen(second))
	reload()
	running(second, first)

	for _, c := range []struct{ what, text, want string }{
		{"no HCL", "telemetry {", "2.hcl:1"},
		{"a wrong value", listen(third) + `log_level = "loud"`, "log_level"},
		{"other pins", listen(third) + `pin_dir = "/sys/fs/bpf/other"`, "a reload cannot change it"},
	} {
		t.Run(c.what, func(t *testing.T) {
			earlier := len(ui.OutputWriter.String())
			write("2.hcl", c.text)
			reload()
			running(second, third)
			written := ui.OutputWriter.String()[earlier:]
			if strings.Count(written, "level=ERROR") != 1 || !strings.Contains(written, c.want) {
				t.Errorf("the agent wrote %q, want one error with %q", written, c.want)
			}
		})
	}

	// What only shows when it begins: somebody else has the address.
	taken, err := net.Listen("tcp", third)
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	write("2.hcl", listen(third))
	reload()
	running(second, "")
	if written := ui.OutputWriter.String(); !strings.Contains(written, "goes on with the former") || !strings.Contains(written, "address already in use") {
		t.Errorf("the agent wrote: %s", written)
	}

	after, err := datapath.Workloads()
	if diff := cmp.Diff(before, after, cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{})); err != nil || diff != "" {
		t.Errorf("the workload changed, %v (-before +after):\n%s", err, diff)
	}
	if seen := writes.Seen(); len(seen) > 0 {
		t.Errorf("reloads wrote to maps: %v", seen)
	}
	stop()
	wantTold("STOPPING=1")
	if code := <-ended; code != 0 {
		t.Errorf("exit code %d: %s", code, ui.ErrorWriter)
	}
}
