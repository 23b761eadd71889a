// SPDX-License-Identifier: MPL-2.0

package cluster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

// weir is how the machines came to it: the leader by "weir install", the members by
// the package, by the system job, and by a migration that is a scene.
type weir struct {
	system                           *nomad.Job // of bySystem
	byPackage, bySystem, byMigration *nomad.Node
}

const systemFile = "../../deploy/weir.nomad.hcl"

// gate is the agents' default; other tests of nodes start without.
const gate = "gate {\n  timeout = \"30s\"\n}\n"

func startWeir(t *testing.T, engine string) *cluster {
	test.Need(t, test.Tool("dpkg"))
	first, second := nomad.BuildVersion(t, "v1.0.0"), nomad.BuildVersion(t, "v1.1.0")
	c := &cluster{leader: nomad.Start(t, nomad.Options{NoDocker: true, Agent: gate}), weir: new(weir)}
	c.weir.byPackage = c.leader.Join(nomad.Options{NoDocker: true, Agent: gate, Package: makePackage(t, second)})
	c.weir.bySystem = c.leader.Join(nomad.Options{NoDocker: true, NoWeir: true, Client: "node_pool = \"system\""})
	c.weir.byMigration = c.leader.Join(nomad.Options{NoDocker: true, Agent: gate, Plugin: engine})
	c.members = []*nomad.Node{c.weir.byPackage, c.weir.bySystem, c.weir.byMigration}

	for dir, built := range map[string]string{"/opt/weir/first": first, "/opt/weir/second": second} {
		for _, name := range []string{"weir", "weir-cni"} {
			program, err := os.ReadFile(filepath.Join(built, name))
			if err != nil {
				t.Fatal(err)
			}
			c.weir.bySystem.Write(filepath.Join(dir, name), string(program), 0o755)
		}
	}
	c.weir.system = c.leader.Run(systemFile, "weir_dir", "/opt/weir/first", "node_pool", "system")
	c.weir.bySystem.Nomad.Restart(t) // it looks for plugins when it starts
	return c
}

// makePackage makes the package of programs that were built.
func makePackage(t *testing.T, built string) string {
	t.Helper()
	out := t.TempDir()
	if text, err := exec.Command("../../deploy/package.sh", built, out).CombinedOutput(); err != nil {
		t.Fatalf("make the package: %v: %s", err, text)
	}
	found, err := filepath.Glob(filepath.Join(out, "*.deb"))
	if err != nil || len(found) != 1 {
		t.Fatalf("make the package: found %q, %v", found, err)
	}
	return found[0]
}

func agents(t *testing.T, c *cluster) {
	nodes := []*nomad.Node{c.leader, c.weir.byPackage, c.weir.byMigration} // the system job's is another scene
	c.each(t, nodes, func(n *nomad.Node) *nomad.Daemon { return n.Agent })
}

// systemJob upgrades Weir by the job that runs it, and takes it back.
func systemJob(t *testing.T, c *cluster) {
	for _, to := range []struct{ version, dir string }{{"v1.1.0", "/opt/weir/second"}, {"v1.0.0", "/opt/weir/first"}} {
		c.weir.system.Update(systemFile, "weir_dir", to.dir, "node_pool", "system")
		test.EventuallyIn(t, patience, func() error {
			return saysVersion(c.weir.bySystem, "/usr/local/bin/weir", to.version)
		}, "version "+to.version)
		c.weir.system.Await()
		c.answered()
	}
}

// migration puts Weir in the place of consul-cni on a machine that runs instances, moves
// those away, has new ones there, and takes all of that back.
func migration(t *testing.T, c *cluster) {
	n := c.fill(t, c.weir.byMigration)
	n.Command("weir", "install", "-replace")
	n.Nomad.Restart(t)
	c.answered()
	c.protected(t, n, false)
	c.drain(t, n)
	c.fill(t, n)
	c.protected(t, n, true)
	c.answered()

	c.drain(t, n)
	n.Agent.Stop(t)
	// Nomad ends an allocation's network a moment after its tasks.
	test.Eventually(t, func() error {
		_, err := n.Try("weir", "uninstall")
		return err
	}, "weir to be uninstalled")
	n.Nomad.Restart(t)
	c.fill(t, n)
	c.answered()
}

// protected wants Weir to redirect the instances on a machine, or Consul's rules.
func (c *cluster) protected(t *testing.T, n *nomad.Node, want bool) {
	t.Helper()
	list := make(map[string]bool)
	for _, w := range n.Workloads() {
		list[w.ID] = w.Mode == "transparent"
	}
	for id, node := range c.servers() {
		if node == n.Name() && list[id] != want {
			t.Errorf("instance %s on %s is redirected by Weir: %v, want %v", id, node, list[id], want)
		}
	}
}

func saysVersion(n *nomad.Node, program, version string) error {
	text, err := n.Try(program, "version")
	if err == nil && !strings.Contains(text, version) {
		err = fmt.Errorf("%s is %s, want %s", program, text, version)
	}
	return err
}
