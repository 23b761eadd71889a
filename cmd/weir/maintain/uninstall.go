// SPDX-License-Identifier: MPL-2.0

package maintain

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/cni"
	"github.com/weirmesh/weir/deploy"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// What an uninstallation takes from allocations that run, by what Weir does
// for them.
const (
	LoseTransparent = "new connections of its tasks do not reach Envoy any more: virtual addresses and Consul's DNS stop " +
		"answering, all else goes past the mesh, and its ports take connections from outside without Envoy"
	LoseGuard = "virtual addresses of its upstreams stop answering, and its ports take connections from outside that the " +
		"guard counted or refused"
	LoseNetwork = "Nomad can no longer check or end its network: it gives the allocation up as failed when its client starts again, in cni/* with tasks that run on, " +
		"and its address and host ports stay taken until Weir is installed again and weir gc frees them"
)

// nomadsBridge is the name of the network of mode "bridge".
const nomadsBridge = "nomad"

// affected is an allocation that runs and that an uninstallation strips.
type affected struct {
	ID    string `json:"id"`
	Job   string `json:"job"`
	Group string `json:"group"`
	workload.NomadNames
	Loses []string `json:"loses"`
}

func NewUninstall(env base.Env) *base.Command {
	c := base.New(env, "uninstall", "Take Weir off this node", `  Undoes weir install: brings back the consul-cni that was set aside, removes the
  plugin, the conflists, the data path with every record, and the other files that
  were installed, by any version. A file that was changed since stays, and it says
  so: the configuration is such a file once you edit it.

  It refuses while it protects allocations that run, names them and says what they
  would lose; and while the agent runs, which would put everything back. Drain the
  node first: nomad node drain -enable -self.

  With -force those allocations run on without redirect or guard. Of networks that
  Weir was called for, Nomad can no longer take care: it gives such an allocation up
  as failed when its client starts again, unless a consul-cni that is brought back sees
  to it; in cni/* its tasks run on, until somebody ends them. What is left of networks
  weir gc takes away then, once Weir is installed again.

  See what would be taken off the node:

      $ weir uninstall -dry-run`).WithPaths().WithJSON()
	node, layout := withNode(c)
	force := c.Flags.Bool("force", false, "go on although allocations that run lose their redirect, their guard and the care for their networks")
	dryRun := c.Flags.Bool("dry-run", false, "say what would be done and change nothing")
	c.AsUser = func() bool { return node.Root != "" }
	c.Do = func() (int, error) {
		if err := layout(); err != nil {
			return 1, err
		}
		plan, err := node.PlanRemoval()
		if err != nil {
			return 1, err
		}
		stripped, err := listAffected(c, leavesConsul(plan))
		if err != nil && !*force {
			return 1, err
		}
		if *dryRun {
			return 0, tellInstall(c, InstallReport{DryRun: true, Steps: append(plan.Called, plan.Rest...), Workloads: stripped,
				Remarks: remarksOn(stripped)})
		}
		if _, running, _ := c.Agent(); running {
			return 1, errors.New("the agent runs and would put everything back: stop it first, " +
				"with 'systemctl disable --now weir-agent' or 'nomad job stop weir'")
		}
		if len(stripped) > 0 && !*force {
			return 1, refusal(stripped)
		}
		report := InstallReport{Workloads: stripped}
		err = uninstall(c, plan, *force, &report)
		return 0, errors.Join(err, tellInstall(c, report))
	}
	return c
}

// leavesConsul reports a removal after which there is a consul-cni that is not ours.
func leavesConsul(plan deploy.Removal) bool {
	return slices.ContainsFunc(plan.Called, func(s deploy.Step) bool {
		return filepath.Base(s.Path) == "consul-cni" && (s.Do == deploy.Restore || s.Do == deploy.Keep)
	})
}

// uninstall does it: first nobody can be added any more, then the kernel's part
// goes, then the files that are left.
func uninstall(c *base.Command, plan deploy.Removal, force bool, report *InstallReport) error {
	done, err := plan.Called.Run()
	report.Steps = done
	if err != nil {
		return err
	}
	if !force {
		late, err := listAffected(c, false)
		if err == nil && len(late) > 0 {
			err = fmt.Errorf("an allocation was started meanwhile; the plugin is removed, the data path is not: %w", refusal(late))
		}
		if err != nil {
			return err
		}
	}
	removed, err := c.Datapath().Unload()
	for _, what := range removed {
		report.Kernel = append(report.Kernel, what.String())
	}
	if err != nil {
		return err
	}
	networks, kept, err := c.RemoveNetworks(c.Ctx, c.StateDir())
	report.Kernel = append(report.Kernel, networks...)
	for _, what := range kept {
		report.Remarks = append(report.Remarks, fmt.Sprintf("%s has Weir's mark, but no record in %s tells that it was made from there, so it stays: "+
			"remove it with 'ip link del' unless another instance uses it", what, c.StateDir()))
	}
	if err != nil {
		return err
	}
	done, err = plan.Rest.Run()
	report.Steps = append(report.Steps, done...)
	return errors.Join(err, removeStateDir(c))
}

// removeStateDir removes the lock, the last of what a data path leaves. What
// else is in the directory is somebody else's.
func removeStateDir(c *base.Command) error {
	dir := c.StateDir()
	if err := os.Remove(filepath.Join(dir, "lock")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove lock: %w", err)
	}
	_ = os.Remove(dir) // not empty: it is not only ours
	return nil
}

// affected are the allocations on record whose namespace lives: those that are
// redirected or guarded, then those that only have their network from the plugin.
// Where Consul's plugin is brought back, it ends what was asked for on Nomad's own
// bridge. A record that cannot be read comes back in the error.
func listAffected(c *base.Command, consul bool) (list []affected, err error) {
	known, err := c.Datapath().Records()
	networks, unread := c.Networks(c.StateDir())
	for _, k := range known {
		if _, gone := host.Cookie(k.NetNS); errors.Is(gone, host.ErrNetNSGone) {
			continue
		}
		a := withoutDataPath(k)
		built := slices.ContainsFunc(networks, func(n cni.Attached) bool { return n.Key == k.Key })
		called := false // by Nomad, in a chain
		if k.Request.Mode == workload.ModeTransparent || k.Request.Mode == "" {
			called = !consul || k.Request.Network != nomadsBridge
		}
		if built || called {
			a.Loses = append(a.Loses, LoseNetwork)
		}
		list = append(list, a)
	}
	for _, n := range networks {
		redirected := func(k inspect.Record) bool { return k.Key == n.Key }
		if _, gone := host.Cookie(n.NetNS); errors.Is(gone, host.ErrNetNSGone) || slices.ContainsFunc(known, redirected) {
			continue
		}
		list = append(list, affected{
			ID: cmp.Or(n.Job.AllocID, n.Key.ContainerID), Job: n.Job.ID, Group: n.Job.Group, NomadNames: n.Job.Names(n.Key), Loses: []string{LoseNetwork},
		})
	}
	return list, errors.Join(err, unread)
}

// redirected are the allocations on record whose namespace lives, with what they
// lose when the data path goes: their networks stay. A record that cannot be read
// comes back in the error.
func redirected(c *base.Command) (list []affected, err error) {
	known, err := c.Datapath().Records()
	for _, k := range known {
		if _, gone := host.Cookie(k.NetNS); !errors.Is(gone, host.ErrNetNSGone) {
			list = append(list, withoutDataPath(k))
		}
	}
	return list, err
}

// withoutDataPath is an allocation with what the data path does for it.
func withoutDataPath(k inspect.Record) affected {
	a := affected{
		ID: cmp.Or(k.Request.Job.AllocID, k.Key.ContainerID), Job: k.Request.Job.ID, Group: k.Request.Job.Group, NomadNames: k.Request.Job.Names(k.Key), Loses: []string{LoseGuard},
	}
	if k.Request.Mode == workload.ModeTransparent || k.Request.Mode == "" {
		a.Loses = []string{LoseTransparent}
	}
	return a
}

func (a affected) String() string {
	return fmt.Sprintf("%s (job %s, group %s)", a.ID, base.OrDash(a.Job), base.OrDash(a.Group))
}

func remarksOn(list []affected) (remarks []string) {
	for _, a := range list {
		remarks = append(remarks, fmt.Sprintf("%s runs: it would be refused; with -force %s", a, strings.Join(a.Loses, "; ")))
	}
	return remarks
}

// refusal names who would lose what.
func refusal(list []affected) error {
	var text strings.Builder
	fmt.Fprintf(&text, "%s run under Weir:\n", base.CountOf(len(list), "allocation"))
	for _, a := range list {
		fmt.Fprintf(&text, "  %s\n", a)
	}
	for _, each := range []struct{ kind, loss string }{
		{"a transparent one", LoseTransparent},
		{"one that is guarded alone", LoseGuard},
		{"one whose network Weir is called for", LoseNetwork},
	} {
		if slices.ContainsFunc(list, func(a affected) bool { return slices.Contains(a.Loses, each.loss) }) {
			fmt.Fprintf(&text, "With -force they run on, but of %s %s.\n", each.kind, each.loss)
		}
	}
	text.WriteString("Drain the node instead: nomad node drain -enable -self\nOne that ended and left its namespace: weir gc")
	return errors.New(text.String())
}
