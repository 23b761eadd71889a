// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/cli"

	"github.com/weirmesh/weir/agent"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/test"
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
	status, err := agent.ReadStatus(t.Context(), environment["WEIR_STATE_DIR"])
	if err != nil || status.Consul.InStep {
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
	datapath := redirect.New(redirect.PathsFromEnv(func(name string) string { return environment[name] }))
	if after, err := datapath.Status(); err != nil || !after.Healthy() {
		t.Errorf("the data path after the agent = %+v, %v; want it healthy", after, err)
	}
	if _, err := datapath.Unload(); err != nil {
		t.Error(err)
	}
}
