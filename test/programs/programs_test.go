// SPDX-License-Identifier: MPL-2.0

// Package programs runs ordinary programs in allocations that may talk through their
// proxies alone, on a node of test/nomad.
package programs

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// root is where test/tools/setup.sh unpacks Debian's packages.
const root = "../../.tools/programs/root"

// The places that the programs ask. What nobody serves is out of the mesh.
const (
	url     = "http://prog-api.virtual.consul/"
	name    = "prog-api.virtual.consul"
	outside = nomad.NeighbourAddress
)

// program is a command line of a program in the client's container.
type program struct {
	name string
	args []string
	fail bool // it is to fail
	// want are in what it writes. meshed says that the first line is what the server
	// says of the request, which has to have come by both proxies.
	want   []string
	meshed bool
	// verdicts are those that grow. A refusal that is not among them may not.
	verdicts []bpfmap.Verdict
}

func programs() []program {
	const java = "/usr/lib/jvm/java-17-openjdk-amd64/bin/java"
	redirected, dns, refused := bpfmap.Redirected, bpfmap.ToDNS, bpfmap.RefusedEgress
	return []program{
		{name: "curl", args: []string{"curl", "-sS", url}, meshed: true, verdicts: []bpfmap.Verdict{dns, redirected}},
		{name: "JVM", args: []string{java, "/programs/Client.java", url, outside, "9999"}, meshed: true,
			want: []string{"Network is unreachable"}, verdicts: []bpfmap.Verdict{dns, redirected, refused}},
		{name: "node", args: []string{"node", "/programs/client.js", url, outside, "9999"}, meshed: true,
			want: []string{"ENETUNREACH"}, verdicts: []bpfmap.Verdict{dns, redirected, refused}},
		{name: "Go", args: []string{"/usr/local/bin/app", "check", url}, want: []string{`"status":200`}, verdicts: []bpfmap.Verdict{dns, redirected}},
		{name: "Go, UDP", args: []string{"/usr/local/bin/app", "dial", "udp", outside + ":9999"}, want: []string{"network is unreachable"}, verdicts: []bpfmap.Verdict{refused}},
		{name: "Redis, write", args: []string{"redis-cli", "-h", "prog-redis.virtual.consul", "set", "weir", "holds"}, want: []string{"OK"}, verdicts: []bpfmap.Verdict{dns, redirected}},
		{name: "Redis, read", args: []string{"redis-cli", "-h", "prog-redis.virtual.consul", "get", "weir"}, want: []string{"holds"}, verdicts: []bpfmap.Verdict{dns, redirected}},
		{name: "DNS", args: []string{"dig", "+noedns", name}, want: []string{"status: NOERROR", "240.0.0."}, verdicts: []bpfmap.Verdict{dns}},
		{name: "DNS, EDNS", args: []string{"dig", "+edns=0", "+bufsize=4096", name}, want: []string{"status: NOERROR", "EDNS: version: 0", "240.0.0."}, verdicts: []bpfmap.Verdict{dns}},
		{name: "DNS, TCP", args: []string{"dig", "+tcp", name}, want: []string{"status: NOERROR", "240.0.0.", "(TCP)"}, verdicts: []bpfmap.Verdict{dns}},
		{name: "DNS of another resolver", args: []string{"dig", "+tries=1", "+time=2", "@" + outside, name}, fail: true, want: []string{"network unreachable"}, verdicts: []bpfmap.Verdict{refused}},
		{name: "ping", args: []string{"ping", "-c", "1", "-W", "2", outside}, fail: true, want: []string{"Operation not permitted"}, verdicts: []bpfmap.Verdict{bpfmap.RefusedEgressSocket}},
		{name: "NTP, its port excluded", args: ntp("123"), want: []string{"System clock wrong by"}, verdicts: []bpfmap.Verdict{bpfmap.PortExcluded}},
		{name: "NTP by another port", args: ntp("124"), fail: true, want: []string{"Timeout reached"}, verdicts: []bpfmap.Verdict{refused}},
	}
}

// ntp asks the node for the time, once, and sets no clock.
func ntp(port string) []string {
	return []string{"chronyd", "-Q", "-t", "8", "-u", "root", "cmdport 0", "pidfile /tmp/client.pid",
		"server " + nomad.NodeAddress + " port " + port + " iburst maxsamples 1"}
}

// TestPrograms: programs as people run them work through the proxy and need not know of
// it, and what does not go through the proxy fails as docs/guard.md says.
func TestPrograms(t *testing.T) {
	if _, err := os.Stat(root); err != nil {
		test.Need(t, test.Tool(root)) // run test/tools/setup.sh programs
	}
	n := nomad.Start(t, nomad.Options{})
	makeImage(t, n)
	n.ConfigEntry(map[string]any{"Kind": "service-defaults", "Name": "prog-api", "Protocol": "http"})
	n.ConfigEntry(map[string]any{"Kind": "service-defaults", "Name": "prog-client", "Protocol": "http"})
	n.Command("docker", "run", "--detach", "--name", "ntp", "--network", "host", "programs:node",
		"chronyd", "-x", "-d", "-u", "root", "cmdport 0", "pidfile /tmp/server.pid", "local stratum 1", "allow all")
	job := n.Run("testdata/programs.nomad.hcl")
	client, server, redis := job.Alloc("client"), job.Alloc("api"), job.Alloc("redis")
	unseen := probe.Families() != nil // which is told of each allocation
	for _, a := range []*nomad.Alloc{client, server, redis} {
		a.EventuallyWorkload("the guard", func(w nomad.Workload) bool {
			unknown := slices.DeleteFunc(w.Problems, func(p health.Problem) bool { return unseen && p.Code == health.ProblemFamiliesOpen.String() })
			return w.Guard == "enforce" && w.Proxy.Listeners > 0 && len(unknown) == 0
		})
	}
	client.EventuallyGet("client", url, nil)
	for _, p := range programs() {
		t.Run(p.name, func(t *testing.T) { p.run(t, n, client, server) })
	}
	t.Run("Redis from outside", func(t *testing.T) {
		// Redis says "-ERR" or hangs up, its proxy hangs up: who took it is in the verdicts.
		before := redis.Verdicts()["inbound"]
		got := n.Get(n.NetNS(), "http://"+redis.Workload().Addresses[0]+":6379/")
		if after := redis.Verdicts()["inbound"]; got.Error == "" || after != before+1 {
			t.Errorf("the node asks Redis past the mesh: %s, inbound %d, then %d; want it handed to the proxy", got, before, after)
		}
	})
	t.Run("Told", func(t *testing.T) { told(t, n, client) })
	n.Command("docker", "rm", "--force", "ntp")
	job.Stop()
	if !t.Failed() {
		n.ExpectNothingLeft()
	}
}

// makeImage gives Docker the image programs:node: the unpacked packages, the test
// program, and what the packages' scripts would have made.
func makeImage(t *testing.T, n *nomad.Node) {
	t.Helper()
	packages, err := filepath.Abs(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"Client.java", "client.js"} {
		text, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			t.Fatal(err)
		}
		n.Write("/opt/image/programs/"+name, string(text), 0o644)
	}
	n.Command("mkdir", "-p", "/opt/image/tmp", "/opt/image/run/chrony", "/opt/image/proc")
	n.Command("bash", "-c", `set -o pipefail; tar -c -C "$0" . -C /opt/task usr/local/bin/app etc/passwd etc/group -C /opt/image programs tmp run proc |
		docker import --change 'ENV PATH=/usr/sbin:/usr/bin' - programs:node`, packages)
}

func (p program) run(t *testing.T, n *nomad.Node, client, server *nomad.Alloc) {
	before := client.Verdicts()
	out, err := n.Try("bash", append([]string{"-c", `exec docker exec "$@" 2>&1`, "bash", "client-" + client.ID}, p.args...)...)
	if err != nil {
		out += err.Error()
	}
	grown := client.Verdicts()
	for verdict := range grown {
		if grown[verdict] -= before[verdict]; grown[verdict] == 0 {
			delete(grown, verdict)
		}
	}
	t.Logf("%q: %v\n%s", p.args, grown, out)
	if (err != nil) != p.fail {
		t.Errorf("it ends with %v, want it to fail: %t", err, p.fail)
	}
	for _, want := range p.want {
		if !strings.Contains(out, want) {
			t.Errorf("its output lacks %q", want)
		}
	}
	if p.meshed {
		line, _, _ := strings.Cut(out, "\n")
		got := wire.Outcome{}.Told([]byte(line))
		if got.Reply == nil || got.Reply.Alloc != server.ID || !strings.Contains(got.Reply.ClientCert, "/svc/prog-client") {
			t.Errorf("it was answered %s, want the server's word that its proxy saw the client's certificate", got)
		}
	}
	wanted := make(map[string]bool)
	for _, verdict := range p.verdicts {
		if wanted[verdict.String()] = true; grown[verdict.String()] == 0 {
			t.Errorf("verdict %s did not grow", verdict)
		}
	}
	for verdict := range grown {
		if strings.HasPrefix(verdict, "refused_") && !wanted[verdict] {
			t.Errorf("verdict %s grew", verdict)
		}
	}
}

// told: who was refused, by which protocol and to where, and what lets it out.
func told(t *testing.T, n *nomad.Node, client *nomad.Alloc) {
	test.Eventually(t, func() error {
		var list api.GuardList
		if err := n.Weir(&list, "guard", "-egress", "-json", client.ID); err != nil {
			return err
		}
		for _, want := range []api.EgressEntry{
			{Command: "ping", Transport: "icmp", Verdict: bpfmap.RefusedEgressSocket.String(), Remedy: `exclude_uids = ["0"]`},
			{Command: "chronyd", Transport: "udp", Destination: nomad.NodeAddress, Port: 124, Verdict: bpfmap.RefusedEgress.String(), Remedy: `exclude_outbound_ports = ["124"]`},
		} {
			if !slices.ContainsFunc(list.Egress, func(e api.EgressEntry) bool {
				return e.AllocID == client.ID && e.Task == "client" && e.Command == want.Command && e.Transport == want.Transport &&
					e.Destination == want.Destination && e.Port == want.Port && e.Verdict == want.Verdict && e.Remedy == want.Remedy
			}) {
				return fmt.Errorf("weir guard -egress lacks %+v: %+v", want, list.Egress)
			}
		}
		return nil
	}, "weir guard -egress to name what was refused")
	t.Log(n.Command("weir", "guard", "-egress", client.ID))
}
