// SPDX-License-Identifier: MPL-2.0

package main

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weirmesh/weir/deploy"
	"github.com/weirmesh/weir/redirect"
)

// What an uninstallation takes from allocations that run, by what Weir does
// for them.
const (
	loseTransparent = "new connections of its tasks do not reach Envoy any more: virtual addresses and Consul's DNS stop " +
		"answering, all else goes past the mesh, and its ports take connections from outside without Envoy"
	loseGuard   = "its ports take connections from outside that the guard counted or refused"
	loseNetwork = "Nomad can no longer check or end its network, whose device, address and host ports stay behind"
)

// affected is an allocation that runs and that an uninstallation strips.
type affected struct {
	ID    string `json:"id"`
	Job   string `json:"job"`
	Group string `json:"group"`
	Loses string `json:"loses"`
}

func newUninstall(env env) *command {
	c := newCommand(env, "uninstall", "Take Weir off this node", `  Undoes weir install: brings back the consul-cni that was set aside, removes the
  plugin, the conflists, the data path with every record, and the other files that
  were installed, by any version. A file that was changed since stays, and it says
  so: the configuration is such a file once you edit it.

  It refuses while it protects allocations that run, names them and says what they
  would lose; and while the agent runs, which would put everything back. Drain the
  node first: nomad node drain -enable -self.

  With -force those allocations run on without redirect or guard.`).withPaths().withJSON()
	node, layout := c.withNode()
	force := c.flags.Bool("force", false, "go on although allocations that run lose their redirect and guard")
	dryRun := c.flags.Bool("dry-run", false, "say what would be done and change nothing")
	c.do = func() (int, error) {
		if err := layout(); err != nil {
			return 1, err
		}
		plan, err := node.PlanRemoval()
		if err != nil {
			return 1, err
		}
		stripped, err := c.affected()
		if err != nil && !*force {
			return 1, err
		}
		if *dryRun {
			return 0, c.tellInstall(installReport{DryRun: true, Steps: append(plan.Called, plan.Rest...), Workloads: stripped,
				Remarks: remarksOn(stripped)})
		}
		if _, running, _ := c.agent(); running {
			return 1, errors.New("the agent runs and would put everything back: stop it first, " +
				"with 'systemctl disable --now weir-agent' or 'nomad job stop weir'")
		}
		if len(stripped) > 0 && !*force {
			return 1, refusal(stripped)
		}
		report := installReport{Workloads: stripped}
		err = c.uninstall(plan, *force, &report)
		return 0, errors.Join(err, c.tellInstall(report))
	}
	return c
}

// uninstall does it: first nobody can be added any more, then the kernel's part
// goes, then the files that are left.
func (c *command) uninstall(plan deploy.Removal, force bool, report *installReport) error {
	done, err := plan.Called.Run()
	report.Steps = done
	if err != nil {
		return err
	}
	if !force {
		late, err := c.affected()
		if err == nil && len(late) > 0 {
			err = fmt.Errorf("an allocation was started meanwhile; the plugin is removed, the data path is not: %w", refusal(late))
		}
		if err != nil {
			return err
		}
	}
	report.Kernel, err = c.datapath().Unload()
	if err != nil {
		return err
	}
	networks, err := c.removeNetworks(c.stateDir())
	report.Kernel = append(report.Kernel, networks...)
	if err != nil {
		return err
	}
	done, err = plan.Rest.Run()
	report.Steps = append(report.Steps, done...)
	return errors.Join(err, c.removeStateDir())
}

// removeStateDir removes the lock, the last of what a data path leaves. What
// else is in the directory is somebody else's.
func (c *command) removeStateDir() error {
	dir := c.stateDir()
	if err := os.Remove(filepath.Join(dir, "lock")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove lock: %w", err)
	}
	_ = os.Remove(dir) // not empty: it is not only ours
	return nil
}

// affected are the allocations on record whose namespace lives: those that are
// redirected or guarded, then those that only have their network from the plugin.
// A record that cannot be read comes back in the error.
func (c *command) affected() (list []affected, err error) {
	known, err := c.datapath().Known()
	for _, k := range known {
		if _, gone := redirect.Cookie(k.NetNS); errors.Is(gone, redirect.ErrNetNSGone) {
			continue
		}
		a := affected{
			ID: cmp.Or(k.Request.Job.AllocID, k.Key.ContainerID), Job: k.Request.Job.ID, Group: k.Request.Job.Group, Loses: loseGuard,
		}
		if k.Request.Mode == redirect.ModeTransparent || k.Request.Mode == "" {
			a.Loses = loseTransparent
		}
		list = append(list, a)
	}
	networks, unread := c.networks(c.stateDir())
	for _, n := range networks {
		redirected := func(k redirect.Known) bool { return k.Key == n.Key }
		if _, gone := redirect.Cookie(n.NetNS); errors.Is(gone, redirect.ErrNetNSGone) || slices.ContainsFunc(known, redirected) {
			continue
		}
		list = append(list, affected{
			ID: cmp.Or(n.Job.AllocID, n.Key.ContainerID), Job: n.Job.ID, Group: n.Job.Group, Loses: loseNetwork,
		})
	}
	return list, errors.Join(err, unread)
}

func (a affected) String() string {
	return fmt.Sprintf("%s (job %s, group %s)", a.ID, orDash(a.Job), orDash(a.Group))
}

func remarksOn(list []affected) (remarks []string) {
	for _, a := range list {
		remarks = append(remarks, fmt.Sprintf("%s runs: it would be refused; with -force %s", a, a.Loses))
	}
	return remarks
}

// refusal names who would lose what.
func refusal(list []affected) error {
	var text strings.Builder
	fmt.Fprintf(&text, "%s run under Weir:\n", countOf(len(list), "allocation"))
	losses := map[string]bool{}
	for _, a := range list {
		fmt.Fprintf(&text, "  %s\n", a)
	}
	for _, a := range list {
		if !losses[a.Loses] {
			losses[a.Loses] = true
			kind := "a transparent one"
			switch a.Loses {
			case loseGuard:
				kind = "any other"
			case loseNetwork:
				kind = "one without a mesh"
			}
			fmt.Fprintf(&text, "With -force they run on, but of %s %s.\n", kind, a.Loses)
		}
	}
	text.WriteString("Drain the node instead: nomad node drain -enable -self\nOne that ended and left its namespace: weir gc")
	return errors.New(text.String())
}
