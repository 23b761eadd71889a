// SPDX-License-Identifier: MPL-2.0

package soak

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/consul"
	"golang.org/x/sys/unix"
)

// node is a machine of its own on this one: a namespace that stands for the host's, pins,
// records, cgroups, and an agent that reaches Consul and Docker by sockets which can be
// made to misbehave.
type node struct {
	t             *testing.T
	dir           string
	paths         store.Paths
	host          *test.NetNS
	cgroup        *test.Cgroup
	consul        *consul.Server
	askedOfConsul *flaky
	askedOfDocker *flaky
	installed     version // plugin and command
	running       version // the agent
	agent         *exec.Cmd
	agentEnded    chan struct{}
	allocs        int
}

// stateSize is what the directory of records has room for.
const stateSize = 4 << 20

func newNode(t *testing.T) *node {
	t.Helper()
	test.Need(t, test.Root, test.CgroupV2, test.BPF, test.Tool("bpftool"), test.CNIPlugins)
	dir := t.TempDir()
	n := &node{t: t, dir: dir, host: test.NewNetNS(t), cgroup: test.NewCgroup(t), consul: consul.Start(t, false)}
	n.paths = store.Paths{PinDir: filepath.Join(test.BPFFS(t), "weir"), StateDir: filepath.Join(dir, "state"), CgroupRoot: n.cgroup.Path}
	for _, name := range []string{"state", "bin", "netns"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mount("tmpfs", n.paths.StateDir, "tmpfs", 0, fmt.Sprintf("size=%d", stateSize)); err != nil {
		t.Fatalf("mount the directory of records: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(n.paths.StateDir, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount the directory of records: %v", err)
		}
	})
	n.host.Do(func() {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644); err != nil {
			t.Error(err)
		}
	})
	n.askedOfConsul = newFlaky(t, "consul.sock", func() (net.Conn, error) { return net.Dial("tcp", n.consul.Address) })
	docker := fakeDocker(t)
	n.askedOfDocker = newFlaky(t, "docker.sock", func() (net.Conn, error) { return net.Dial("unix", docker) })
	config := fmt.Sprintf(`pin_dir = %q
state_dir = %q
cgroup_root = %q
consul { address = "unix://%s" }
cni {
  cache_dir = %q
  netns_dir = %q
}
docker { socket = %q }
guard { default = "enforce" }
`, n.paths.PinDir, n.paths.StateDir, n.paths.CgroupRoot, n.askedOfConsul.path, n.cacheDir(), filepath.Join(dir, "netns"), n.askedOfDocker.path)
	if err := os.WriteFile(n.configFile(), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	// The first plugin of the chain: the test has made the interface already, and this
	// tells so.
	script := "#!/bin/sh\n[ \"$CNI_COMMAND\" = ADD ] && exec cat \"$CNI_NETNS.result\"\nexit 0\n"
	if err := os.WriteFile(filepath.Join(dir, "bin", "made"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := redirect.New(n.paths).Unload(); err != nil {
			t.Errorf("unload: %v", err)
		}
		if text, err := os.ReadFile(n.logFile()); err == nil && t.Failed() {
			t.Logf("the end of the agent's log:\n%s", text[max(0, len(text)-8000):])
		}
	})
	return n
}

func (n *node) configFile() string { return filepath.Join(n.dir, "weir.hcl") }
func (n *node) logFile() string    { return filepath.Join(n.dir, "agent.log") }
func (n *node) cacheDir() string   { return filepath.Join(n.dir, "cni") }

// fakeDocker is no Docker: it runs no container, says so to whoever lists them, and has no news.
func fakeDocker(t *testing.T) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "engine.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if strings.HasSuffix(r.URL.Path, "/events") {
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
			return
		}
		_, _ = w.Write([]byte("[]\n"))
	})}
	go func() { _ = server.Serve(listener) }()
	t.Cleanup(func() { server.Close() })
	return path
}

// env is what makes a command one of this node's.
func (n *node) env() []string {
	return []string{
		"PATH=" + os.Getenv("PATH"), "WEIR_PIN_DIR=" + n.paths.PinDir, "WEIR_STATE_DIR=" + n.paths.StateDir, "WEIR_CGROUP_ROOT=" + n.paths.CgroupRoot,
	}
}

// command runs a command of the version on the node.
func (n *node) command(v version, args ...string) (string, error) {
	cmd := exec.Command(v.weir(), args...)
	cmd.Env = n.env()
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	var err error
	n.host.Do(func() { err = cmd.Run() })
	if err != nil {
		err = fmt.Errorf("weir %s of %s: %w: %s", args[0], v.name, err, out.String())
	}
	return out.String(), err
}

// install puts the version's plugin in the place of the one that is there, as "weir
// install" does: in one step.
func (n *node) install(t *testing.T, v version) {
	t.Helper()
	for _, name := range []string{"weir", "consul-cni"} {
		path := filepath.Join(n.dir, "bin", name)
		if err := os.Symlink(v.plugin(), path+".new"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	n.installed = v
}

// startAgent runs the version's agent, and waits until the node is healthy.
func (n *node) startAgent(t *testing.T, v version) {
	t.Helper()
	log, err := os.OpenFile(n.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(v.weir(), "agent", "-config", n.configFile())
	cmd.Stdout, cmd.Stderr = log, log
	n.host.Do(func() { err = cmd.Start() })
	if err != nil {
		t.Fatalf("start the agent of %s: %v", v.name, err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait() // it is ended by a signal
		close(ended)
	}()
	n.agent, n.agentEnded, n.running = cmd, ended, v
	n.t.Cleanup(func() {
		if n.agent == cmd {
			n.endAgent(n.t, unix.SIGKILL)
		}
	})
	n.wantHealthy(t)
}

func (n *node) endAgent(t *testing.T, signal unix.Signal) {
	t.Helper()
	if err := n.agent.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("end the agent: %v", err)
	}
	<-n.agentEnded
	n.agent = nil
}

// wantHealthy waits until "weir status" of the running version has nothing to say.
func (n *node) wantHealthy(t *testing.T) {
	t.Helper()
	test.Eventually(t, func() error {
		select {
		case <-n.agentEnded:
			t.Fatal("the agent has ended by itself")
		default:
		}
		text, err := n.command(n.running, "status")
		if err == nil && !strings.Contains(text, "agent: ") {
			err = fmt.Errorf("no agent answers: %s", text)
		}
		return err
	}, "a healthy node")
}

// fillDisk takes what is left of the directory of records, until free.
func (n *node) fillDisk(t *testing.T) (free func()) {
	t.Helper()
	path := filepath.Join(n.paths.StateDir, "ballast")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for err == nil {
		_, err = file.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("fill the disk: %v, want %v", err, unix.ENOSPC)
	}
	return func() {
		if err := os.Remove(path); err != nil {
			t.Errorf("free the disk: %v", err)
		}
	}
}

// wantNothingLeft checks that nothing of any allocation is left, and after an unload
// nothing at all.
func (n *node) wantNothingLeft(t *testing.T) {
	t.Helper()
	test.Eventually(t, func() error {
		var problems []error
		for what, pattern := range map[string]string{
			"record": "state/workloads/*", "record of a network": "state/networks/*", "lease": "state/leases/*/1*", "result of CNI": "cni/results/*",
		} {
			if left, _ := filepath.Glob(filepath.Join(n.dir, pattern)); len(left) > 0 {
				problems = append(problems, fmt.Errorf("%s: %q", what, left))
			}
		}
		if left, _ := filepath.Glob(filepath.Join(n.paths.Lookups(), "*")); len(left) > 0 {
			problems = append(problems, fmt.Errorf("program of a namespace: %q", left))
		}
		status, err := redirect.New(n.paths).Status()
		for _, table := range status.Maps {
			if table.Counted && table.Rows > 0 && table.Name != "control" {
				problems = append(problems, fmt.Errorf("%d rows in %s", table.Rows, table.Name))
			}
		}
		links, _ := n.onHost("ip", "-o", "link", "show", "type", "veth")
		for line := range strings.Lines(links) {
			if !strings.Contains(line, ": "+madeLink) {
				problems = append(problems, fmt.Errorf("interface: %s", line))
			}
		}
		if rules, _ := n.onHost("nft", "list", "ruleset"); strings.Contains(rules, "172.26.") {
			problems = append(problems, fmt.Errorf("rules: %s", rules))
		}
		return errors.Join(append(problems, err)...)
	}, "nothing of any allocation to be left")
	if n.agent != nil {
		n.endAgent(t, unix.SIGTERM)
	}
	if _, err := n.command(n.installed, "unload"); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(n.paths.PinDir); err == nil && len(left) > 0 {
		t.Errorf("pins are left: %v", left)
	}
	if out, err := exec.Command("bpftool", "cgroup", "show", n.cgroup.Path).CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("programs are left on the cgroup: %v: %s", err, out)
	}
}

// onHost runs a command in the namespace of the host.
func (n *node) onHost(name string, args ...string) (text string, err error) {
	n.host.Do(func() {
		var out []byte
		out, err = exec.Command(name, args...).CombinedOutput()
		text = string(out)
	})
	return text, err
}
