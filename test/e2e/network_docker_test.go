// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test"
)

// startDocker runs a Docker engine of its own in the node's namespace, with its
// rules on, and waits until it answers. restart ends it and starts it again.
func (n *networkNode) startDocker(t *testing.T) (restart func()) {
	t.Helper()
	test.Need(t, test.Tool("dockerd"), test.Tool("docker"), test.Tool("iptables"))
	dir, err := os.MkdirTemp("", "weir-docker-") // short: it holds sockets
	if err != nil {
		t.Fatal(err)
	}
	socket := "unix://" + filepath.Join(dir, "sock")
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	var engine *exec.Cmd
	start := func() {
		t.Helper()
		engine = exec.Command("dockerd", "--data-root", dir+"/data", "--exec-root", dir+"/exec", "--pidfile", dir+"/pid",
			"-H", socket, "--bip", "172.31.255.1/24")
		engine.Stdout, engine.Stderr = log, log
		n.host.Do(func() { err = engine.Start() })
		if err != nil {
			t.Fatalf("start dockerd: %v", err)
		}
		test.Eventually(t, func() error {
			if out, err := exec.Command("docker", "-H", socket, "version").CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		}, "Docker to answer")
	}
	stop := func() {
		if engine.Process != nil {
			_ = engine.Process.Signal(unix.SIGTERM)
			_ = engine.Wait()
		}
	}
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("dockerd said:\n%s", text)
		}
		mounts, _ := filepath.Glob(dir + "/exec/netns/*")
		for _, mount := range mounts {
			_ = unix.Unmount(mount, unix.MNT_DETACH)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Errorf("remove what Docker left: %v", err)
		}
	})
	start()
	return func() { stop(); start() }
}

// Docker makes the node drop what it forwards when it finds it not forwarding. It starts
// anew while allocations run: what goes on goes on, and everybody is reached at once.
func TestOwnNetworkBesideDocker(t *testing.T) {
	n := newNetworkNode(t)
	outside := test.NewNetNS(t)
	joinNode(t, n.host, outside)
	run := func(name string, args ...string) string {
		var out []byte
		var err error
		n.host.Do(func() { out, err = exec.Command(name, args...).CombinedOutput() })
		if err != nil {
			t.Fatalf("%s %q: %v: %s", name, args, err, out)
		}
		return string(out)
	}
	run("sysctl", "-qw", "net.ipv4.ip_forward=0")
	restart := n.startDocker(t)
	before := run("iptables", "-S")
	if !strings.Contains(before, "-P FORWARD DROP") || !strings.Contains(before, "DOCKER-USER") {
		t.Fatalf("Docker's rules do not drop what the node forwards:\n%s", before)
	}
	server, client := test.NewBareNetNS(t), test.NewBareNetNS(t)
	ports := map[string]string{"runtimeConfig": `{"portMappings":[{"hostPort":8080,"containerPort":80,"protocol":"tcp"}]}`}
	for id, a := range map[string]*test.NetNS{"server": server, "client": client} {
		stdin := map[string]string{}
		if a == server {
			stdin = ports
		}
		if answer := n.call(t, "ADD", id, a.Path, "", stdin); answer.exit != 0 {
			t.Fatalf("ADD: %+v", answer)
		}
	}
	test.Echo(t, server, "tcp", ":80")
	test.Echo(t, outside, "tcp", "192.0.2.2:81")
	ways := map[string]struct {
		ns   *test.NetNS
		addr string
	}{
		"an allocation to the world":               {client, "192.0.2.2:81"},
		"the world to a host port":                 {outside, "192.0.2.1:8080"},
		"an allocation to a neighbour's host port": {client, "192.0.2.1:8080"},
		"an allocation to its own host port":       {server, "192.0.2.1:8080"},
		"the node to a host port":                  {n.host, "192.0.2.1:8080"},
	}
	kept := make(map[string]*net.TCPConn)
	for who, way := range ways {
		if err := test.DialErr(t, way.ns, way.addr); err != nil {
			t.Fatalf("%s, %s: %v", who, way.addr, err)
		}
		way.ns.Do(func() {
			conn, err := net.Dial("tcp", way.addr)
			if err != nil {
				t.Fatalf("%s, %s: %v", who, way.addr, err)
			}
			kept[who] = conn.(*net.TCPConn)
		})
		t.Cleanup(func() { kept[who].Close() })
	}
	restart()
	for who, way := range ways {
		if _, err := test.AskAgain(kept[who]); err != nil {
			t.Errorf("%s, connected before Docker's restart: %v", who, err)
		}
		if err := test.DialErr(t, way.ns, way.addr); err != nil {
			t.Errorf("%s after Docker's restart, %s: %v", who, way.addr, err)
		}
	}
	wantSilence(t, n.call(t, "DEL", "server", server.Path, "", ports))
	wantSilence(t, n.call(t, "DEL", "client", client.Path, "", nil))
	if after := run("iptables", "-S"); after != before {
		t.Errorf("iptables after the last DEL:\n%s\nwant, as before the first ADD:\n%s", after, before)
	}
}

// joinNode gives the node a way out, to a namespace that stands for the world.
func joinNode(t *testing.T, host, outside *test.NetNS) {
	t.Helper()
	test.Veth(t,
		test.VethEnd{NetNS: host, Name: "uplink", DefaultRoute: true, Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}},
		test.VethEnd{NetNS: outside, Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24")}})
}
