// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad/wire"
	"github.com/weirmesh/weir/test/spawn"
)

// Options says how a node differs from the usual one. The zero value is a node
// with Weir in the place of consul-cni and its agent running.
type Options struct {
	// Plugin is the file of this machine that is consul-cni; Weir's where empty.
	Plugin string
	// Package is a .deb of this machine that Weir comes from; its programs in
	// /opt/tools where empty.
	Package string
	// NoAgent leaves Weir's agent out, NoDocker Docker, NoWeir all of Weir but its
	// programs in /opt/tools.
	NoAgent, NoDocker, NoWeir bool
	// Conflists are files of this machine that the client finds in its
	// cni_config_dir, beside those that Weir installs.
	Conflists []string
	// Secure runs Consul and Nomad as production does: see secure.go. A node that joins
	// a secure one has to be it too.
	Secure bool
	// DockerRules lets Docker write its own rules and set FORWARD to DROP.
	DockerRules bool
	// DockerArgs are more arguments of Docker's daemon.
	DockerArgs []string
	// ConsulDNS is the address of Consul's DNS; NodeAddress where empty.
	ConsulDNS string
	// Client, Server, Consul and Agent are more HCL for the client block and the
	// server block of Nomad, for Consul and for Weir's agent.
	Client, Server, Consul, Agent string
}

// Node is a running node. The test that [Start] was given owns it; others use it
// by [Node.For].
type Node struct {
	// Consul, Docker, Server, Nomad (the client) and Agent (Weir's) can each be
	// stopped, killed and started again.
	Consul, Docker, Server, Nomad, Agent *Daemon

	tb      testing.TB
	options Options
	machine *machine
	parts   parts
	leader  *Node // whose servers it uses; nil: it has its own
	// datacenter is Consul's.
	datacenter string
	members    map[string]*Node // those of the cluster, by name; the leader is one
	// authority is the directory of what signs a secure cluster's certificates.
	authority string
	api       *clients
	ids       *identities
}

// identities are what a node leaves its name on, in trees that it shares with the
// machine.
type identities struct{ allocs, containers map[string]bool }

// Start starts a node that ends with the test. Without root or one of the
// programs the test is skipped.
func Start(tb testing.TB, options Options) *Node {
	tb.Helper()
	test.Need(tb, test.Root, test.CgroupV2, test.BPF, test.Tool("nsenter"), test.Tool("iptables"))
	if !options.NoDocker {
		test.Need(tb, test.Tool("dockerd"))
	}
	n := newNode(tb, options, findParts(tb), "dc1")
	n.members["node"] = n
	n.run()
	return n
}

func newNode(tb testing.TB, options Options, parts parts, datacenter string) *Node {
	n := &Node{
		tb: tb, options: options, parts: parts, datacenter: datacenter, members: make(map[string]*Node),
		ids: &identities{allocs: make(map[string]bool), containers: make(map[string]bool)},
	}
	tb.Cleanup(func() { n.removeCgroups() })
	n.machine = newMachine(tb, parts.tools())
	return n
}

// run boots the machine and starts its services.
func (n *Node) run() {
	tb, began := n.tb, time.Now()
	tb.Helper()
	tb.Cleanup(func() {
		if tb.Failed() {
			n.report()
		}
		n.rememberIdentities()
	})
	n.machine.start(tb)
	n.api = newClients(n)
	n.furnish(n.parts)
	n.defineDaemons()
	n.startDaemons(func() {
		if !n.options.NoDocker {
			n.makeImages()
		}
	})
	tb.Logf("node: %s is up after %s", n.machine.name, time.Since(began).Round(time.Millisecond))
}

// For is the node for another test, such as a subtest: it fails and logs there,
// and what that test runs on the node ends with it.
func (n *Node) For(tb testing.TB) *Node {
	other := *n
	other.tb = tb
	tb.Cleanup(func() {
		if tb.Failed() {
			other.report()
		}
	})
	return &other
}

func (n *Node) startDaemons(meanwhile func()) {
	n.tb.Helper()
	began := time.Now()
	// Together: each takes a second or two, and only the client needs others.
	n.Consul.Launch(n.tb)
	if n.Server != nil {
		n.Server.Launch(n.tb)
	}
	if n.Docker != nil {
		if n.options.DockerRules {
			n.forwardNothing()
		}
		n.Docker.Launch(n.tb)
		n.Docker.AwaitReady(n.tb)
	}
	meanwhile()
	n.Consul.AwaitReady(n.tb)
	if n.options.Secure && n.leader == nil {
		n.setUpACLs()
	}
	if n.Server != nil {
		n.Server.AwaitReady(n.tb)
	}
	n.Nomad.Launch(n.tb)
	if n.Agent != nil {
		n.Agent.Start(n.tb)
	}
	n.Nomad.AwaitReady(n.tb)
	n.tb.Logf("node: all services are ready after %s", time.Since(began).Round(time.Millisecond))
}

// forwardNothing makes the node what it is before Docker comes: only where Docker
// itself turns forwarding on does it drop what it has not asked for.
func (n *Node) forwardNothing() {
	n.machine.net.Do(func() {
		if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0o644); err != nil {
			n.tb.Errorf("turn forwarding off: %v", err)
		}
	})
}

// Reboot takes the power away and boots: what lies on the disk stays (the data of
// Consul, Nomad and Docker, /var/lib/cni, /etc, /opt), the rest goes (processes,
// namespaces, /run, /tmp, the bpffs and with it every program of Weir's).
func (n *Node) Reboot() {
	n.tb.Helper()
	n.PowerOff()
	n.PowerOn()
}

// PowerOff is the first half of [Node.Reboot], PowerOn the second.
func (n *Node) PowerOff() {
	n.tb.Helper()
	n.rememberIdentities()
	n.machine.cut(n.tb)
	n.removeCgroups() // those of a machine's own kernel go with it
}

func (n *Node) PowerOn() {
	n.tb.Helper()
	n.machine.start(n.tb)
	n.startDaemons(func() {})
}

// Path is where the test sees a file of the node. The name must not lead through
// an absolute symbolic link, as /var/run/... does: write /run/...
func (n *Node) Path(name string) string { return n.machine.path(name) }

// NetNS is the node's own network namespace, Neighbour that of a machine on the
// same network, at NeighbourAddress.
func (n *Node) NetNS() *test.NetNS     { return n.machine.net }
func (n *Node) Neighbour() *test.NetNS { return n.machine.neighbour }

// Write makes a file of the node.
func (n *Node) Write(name, text string, mode os.FileMode) {
	n.tb.Helper()
	path := n.Path(name)
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, []byte(text), mode)
	}
	if err != nil {
		n.tb.Fatalf("write %s: %v", name, err)
	}
}

// InstallPlugin puts a file of this machine into the node's cni_path under the
// given names, as an operator does: the new file is renamed over the old one.
// Nomad reads versions when its client starts.
func (n *Node) InstallPlugin(file string, names ...string) {
	n.tb.Helper()
	for _, name := range names {
		target := n.Path(filepath.Join("/opt/cni/bin", name))
		err := copyFile(file, target+".new", 0o755)
		if err == nil {
			err = os.Rename(target+".new", target)
		}
		if err != nil {
			n.tb.Fatalf("install plugin %s: %v", name, err)
		}
	}
}

// Command runs a program inside the node and returns what it wrote. A failure
// fails the test.
func (n *Node) Command(name string, args ...string) string {
	n.tb.Helper()
	out, err := n.Try(name, args...)
	if err != nil {
		n.tb.Fatal(err)
	}
	return out
}

// Try is Command for programs that may fail: the error carries what the program
// wrote to standard error.
func (n *Node) Try(name string, args ...string) (string, error) {
	cmd := n.machine.command(n.tb.Context(), name, args...)
	if n.options.Secure {
		cmd.Env = append(cmd.Env, "NOMAD_TOKEN="+managementToken, "NOMAD_ADDR=https://127.0.0.1:4646", "NOMAD_CACERT="+authorityFile,
			"NOMAD_CLIENT_CERT="+ClientCert, "NOMAD_CLIENT_KEY="+clientKey)
	}
	return n.output(cmd)
}

func (n *Node) output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := n.machine.run(cmd); err != nil {
		return "", fmt.Errorf("run %q: %w", cmd.Args, err)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return stdout.String(), &CommandError{Code: exit.ExitCode(), Text: stderr.String(), Args: cmd.Args}
	}
	return stdout.String(), err
}

// CommandError is a program that ended with a code other than 0.
type CommandError struct {
	Code int
	Text string // what it wrote to standard error
	Args []string
}

func (e *CommandError) Error() string {
	return fmt.Sprintf("run %q: code %d: %s", e.Args, e.Code, e.Text)
}

// Get asks a URL, as a process of this machine in one of the node's namespaces.
func (n *Node) Get(from *test.NetNS, target string) (outcome wire.Outcome) {
	n.tb.Helper()
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: spawn.Dialer(from.Path)}}
	response, err := client.Get(target)
	if err != nil {
		return outcome.Fail(err)
	}
	defer response.Body.Close()
	outcome.Status = response.StatusCode
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return outcome.Fail(err)
	}
	return outcome.Told(text)
}

// AddNeighbourAddress gives the neighbour one more address, until the node ends.
func (n *Node) AddNeighbourAddress(address string) string {
	n.tb.Helper()
	args := []string{"--net=" + n.machine.neighbour.Path, "--", "ip", "address", "replace", address + "/24", "dev", "eth0"}
	if strings.Contains(address, ":") {
		args = []string{"--net=" + n.machine.neighbour.Path, "--", "ip", "address", "replace", address + "/64", "dev", "eth0", "nodad"}
	}
	if out, err := exec.Command("nsenter", args...).CombinedOutput(); err != nil {
		n.tb.Fatalf("add address of the neighbour: %v: %s", err, out)
	}
	return address
}

// RouteNeighbour lets the neighbour reach allocations by their own addresses: it
// gets a route to the subnet by the node, until the node ends.
func (n *Node) RouteNeighbour(subnet string) {
	n.tb.Helper()
	by := NodeAddress
	if strings.Contains(subnet, ":") {
		by = NodeAddress6
	}
	if out, err := exec.Command("nsenter", "--net="+n.machine.neighbour.Path, "--", "ip", "route", "replace", subnet, "via", by).CombinedOutput(); err != nil {
		n.tb.Fatalf("add route of the neighbour: %v: %s", err, out)
	}
}
