// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// A mesh is a transparent client and server of one job, of which the tests of a
// life cycle ask the same again and again.
type mesh struct {
	id             string
	job            *nomad.Job
	client, server *nomad.Alloc
	url            string
	docker         bool          // its tasks and namespaces are Docker's
	health         *nomad.Health // what Consul held against its server meanwhile; nil: it has no excuse
}

// runMesh runs life-mesh.nomad.hcl, or a job like it, in a network mode.
func runMesh(n *nomad.Node, file, id, mode string) *mesh {
	speaksHTTP(n, id+"-server", id+"-client")
	m := &mesh{id: id, docker: strings.HasSuffix(file, "-docker.nomad.hcl"), job: n.Run(file, "id", id, "mode", mode), url: "http://" + id + "-server.virtual.consul/"}
	m.refresh()
	return m
}

// refresh asks Nomad for the allocations of now.
func (m *mesh) refresh() { m.client, m.server = m.job.Alloc("client"), m.job.Alloc("server") }

// on is the mesh for another test.
func (m *mesh) on(n *nomad.Node) *mesh {
	other := *m
	other.job = m.job.For(n)
	other.refresh()
	return &other
}

func allOn(n *nomad.Node, meshes []*mesh) (list []*mesh) {
	for _, m := range meshes {
		list = append(list, m.on(n))
	}
	return list
}

// everyAlloc is all that the meshes run.
func everyAlloc(meshes []*mesh) (list []*nomad.Alloc) {
	for _, m := range meshes {
		list = append(list, m.client, m.server)
	}
	return list
}

// wantWorks waits for an answer, and wants the next one to be redirected and to come
// through both proxies, with the client's identity.
func (m *mesh) wantWorks(t *testing.T) {
	t.Helper()
	m.client.EventuallyGet("client", m.url, nil)
	var got wire.Outcome
	grown := counted(m.client, func() { got = m.client.Get("client", m.url) })
	wantMesh(t, got, m.server, m.id+"-client")
	if grown["redirected"] != 1 {
		t.Errorf("%s: verdicts grew by %v, want redirected 1", m.id, grown)
	}
}

// inMesh tells an answer that came through both proxies.
func (m *mesh) inMesh(got wire.Outcome) bool {
	return got.OK() && got.Reply != nil && strings.HasPrefix(got.Reply.Remote, "127.0.0.1:") &&
		strings.Contains(got.Reply.ClientCert, "/svc/"+m.id+"-client")
}

// isConsuls reports whether an attempt was lost for what Consul's catalog said.
func (m *mesh) isConsuls(lost wire.Outcome) bool {
	return m.health != nil && m.health.Explains(m.id+"-server", lost)
}

// wantNothingLost wants each attempt answered through the mesh.
func (m *mesh) wantNothingLost(t *testing.T, what string, outcomes []wire.Outcome) {
	t.Helper()
	lost := slices.DeleteFunc(slices.Clone(outcomes), m.inMesh)
	if all := len(lost); all > 0 {
		if lost = slices.DeleteFunc(lost, m.isConsuls); len(lost) < all {
			t.Logf("%s: %d requests had no healthy server in Consul's catalog", what, all-len(lost))
		}
	}
	if len(lost) > 0 {
		t.Errorf("%s: %d of %d requests lost, the first: %s, the last: %s", what, len(lost), len(outcomes), lost[0], lost[len(lost)-1])
	}
	t.Logf("%s: %d requests, none lost", what, len(outcomes))
}

// life is what stays the same of an allocation that lives on.
type life struct {
	ID     string
	NetNS  uint64
	PIDs   map[string]int
	Cookie string
}

func lifeOf(t *testing.T, a *nomad.Alloc, tasks ...string) life {
	t.Helper()
	l := life{ID: a.ID, PIDs: make(map[string]int), Cookie: a.Workload().Cookie}
	for _, task := range tasks {
		l.PIDs[task] = a.PID(task)
	}
	l.NetNS = inode(t, a.NetNS(tasks[0]))
	return l
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Sys().(*syscall.Stat_t).Ino
}

func (m *mesh) lives(t *testing.T) []life {
	t.Helper()
	return []life{
		lifeOf(t, m.client, "client", "connect-proxy-"+m.id+"-client"),
		lifeOf(t, m.server, "server", "connect-proxy-"+m.id+"-server"),
	}
}

// wantSameLives wants processes, namespaces and workloads to be those of before.
func (m *mesh) wantSameLives(t *testing.T, before []life) {
	t.Helper()
	m.refresh()
	for i, after := range m.lives(t) {
		if b := before[i]; b.ID != after.ID || b.NetNS != after.NetNS || b.Cookie != after.Cookie || !maps.Equal(b.PIDs, after.PIDs) {
			t.Errorf("%s: allocation was %+v, is %+v", m.id, b, after)
		}
	}
}

// wantOnly waits until the node holds the state of these allocations and of no
// others: namespaces, interfaces, leases, results, records, programs.
func wantOnly(t *testing.T, n *nomad.Node, allocs ...*nomad.Alloc) {
	t.Helper()
	wantOnlyMeshes(t, n, nil, allocs...)
}

// wantOnlyMeshes is wantOnly for meshes and more allocations, which are not Docker's.
func wantOnlyMeshes(t *testing.T, n *nomad.Node, meshes []*mesh, more ...*nomad.Alloc) {
	t.Helper()
	want, made := make(map[string]bool), make(map[string]bool) // made: by Nomad, not by Docker
	for _, a := range more {
		want[a.ID], made[a.ID] = true, true
	}
	for _, m := range meshes {
		for _, a := range []*nomad.Alloc{m.client, m.server} {
			want[a.ID] = true
			if !m.docker {
				made[a.ID] = true
			}
		}
	}
	test.Eventually(t, func() error {
		problems := []error{
			onlyThese("namespaces", files(n, "/run/netns/*"), made),
			onlyThese("results", files(n, "/var/lib/cni/results/*"), want),
			onlyThese("records", files(n, "/run/weir/workloads/*.json"), want),
			onlyThese("leases", leases(n), want),
		}
		if got := len(files(n, "/sys/fs/bpf/weir/lookups/*")); got != len(want) {
			problems = append(problems, fmt.Errorf("%d pinned lookups, want %d", got, len(want)))
		}
		if got := strings.Count(n.Command("ip", "-o", "link", "show", "type", "veth"), "master "); got != len(want) {
			problems = append(problems, fmt.Errorf("%d bridge ports, want %d", got, len(want)))
		}
		return errors.Join(problems...)
	}, "nothing of other allocations to be left")
}

func files(n *nomad.Node, pattern string) []string {
	list, err := filepath.Glob(n.Path(pattern))
	if err != nil {
		return []string{err.Error()}
	}
	for i, file := range list {
		list[i] = filepath.Base(file)
	}
	return list
}

// leaseOf is the file of the allocation's lease in the plugin's own network.
func leaseOf(t *testing.T, n *nomad.Node, a *nomad.Alloc) string {
	t.Helper()
	list, err := filepath.Glob(n.Path("/run/weir/leases/*/*.*.*.*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range list {
		if text, err := os.ReadFile(file); err == nil && strings.Contains(string(text), a.ID) {
			return file
		}
	}
	t.Fatalf("no lease of %s among %q", a.ID, list)
	return ""
}

// inside runs a program in the network namespace of a task.
func inside(t *testing.T, a *nomad.Alloc, task string, command ...string) {
	t.Helper()
	if out, err := exec.Command("nsenter", append([]string{"--net=" + a.NetNS(task)}, command...)...).CombinedOutput(); err != nil {
		t.Fatalf("%q in %s: %v: %s", command, a.ID, err, out)
	}
}

// leases are the owners in the files that are named by an address.
func leases(n *nomad.Node) (owners []string) {
	for _, dir := range []string{"/run/cni/*/*.*.*.*", "/var/lib/cni/networks/*/*.*.*.*", "/run/weir/leases/*/*.*.*.*", "/srv/*/leases/*/*.*.*.*"} {
		list, err := filepath.Glob(n.Path(dir))
		if err != nil {
			return []string{err.Error()}
		}
		for _, file := range list {
			text, err := os.ReadFile(file)
			if err == nil {
				owners = append(owners, string(text))
			}
		}
	}
	return owners
}

var allocID = regexp.MustCompile(`[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}`)

// onlyThese wants each allocation named once, and no other.
func onlyThese(what string, names []string, want map[string]bool) error {
	seen := make(map[string]bool)
	for _, name := range names {
		id := allocID.FindString(name)
		if !want[id] || seen[id] {
			return fmt.Errorf("%s: %q is one too many", what, name)
		}
		seen[id] = true
	}
	if len(seen) != len(want) {
		return fmt.Errorf("%s of %d allocations, want %d", what, len(seen), len(want))
	}
	return nil
}
