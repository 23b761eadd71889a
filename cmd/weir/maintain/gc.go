// SPDX-License-Identifier: MPL-2.0

package maintain

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/cni/ended"
	"github.com/weirmesh/weir/deploy"
	"github.com/weirmesh/weir/redirect/store"
)

// gcReport is what gc prints as JSON.
type gcReport struct {
	Schema  int                `json:"schema"`
	DryRun  bool               `json:"dry_run"`
	Removed []ended.Attachment `json:"removed"` // with -dry-run: what would be
	Kept    []ended.Attachment `json:"kept"`    // not in use, but not to be removed without -empty, or not to be removed at all
}

func NewGC(env base.Env) *base.Command {
	c := base.New(env, "gc", "Remove networks of ended allocations", `  Finds networks of allocations that nothing uses any more, and ends them as Nomad
  would have: it calls DEL of their plugins, and removes address, device, host
  ports, record, programs and namespace. Nomad does not, for an allocation that it
  finds ended when its client starts, and a new allocation with the same static
  port gets no connections until somebody does.

  An allocation of which a process runs is never touched, whatever became of the
  path to its namespace. Where no namespace is left, its network is taken away.
  Where the namespace is there and nothing runs in it, the allocation is over, or
  about to start a task, and only Nomad can tell: it is shown, and taken away
  where -empty names it.

  Run it where all processes of the node are to be seen, not in a container.

  End the network of an allocation that Nomad says has ended:

      $ weir gc -empty 0b5d0c1e`).WithPaths().WithJSON()
	node := ended.Node{}
	empty := c.Flags.String("empty", "", "allocations that Nomad says have ended, as `ID,…` of eight characters or more, or \"all\": take them away although their namespaces are there")
	dryRun := c.Flags.Bool("dry-run", false, "say what would be done and change nothing")
	c.Flags.StringVar(&node.CNIPath, "cni-path", "", "`directories` of Nomad's cni_path (default: where Weir is installed, and "+ended.DefaultCNIPath+")")
	c.Flags.StringVar(&node.CacheDir, "cni-cache-dir", ended.DefaultCacheDir, "`directory` of libcni's results")
	c.Flags.StringVar(&node.NetNSDir, "netns-dir", ended.DefaultNetNSDir, "`directory` of the namespaces that Nomad makes")
	c.Do = func() (int, error) {
		named, err := parseEmpty(*empty)
		if err != nil {
			return 1, err
		}
		node.Paths = c.Paths.Or(store.PathsFromEnv(c.Getenv))
		if node.CNIPath == "" {
			if node.CNIPath, err = installedPath(); err != nil {
				return 1, err
			}
		}
		on := c.Leftovers(node)
		list, err := on.Find()
		problems := []error{err, named.unknown(list)}
		report := gcReport{Schema: base.Schema, DryRun: *dryRun, Removed: []ended.Attachment{}, Kept: []ended.Attachment{}}
		for _, a := range list {
			if a.State == ended.Empty && !named.has(a) {
				report.Kept = append(report.Kept, a)
				continue
			}
			if !*dryRun {
				if err := on.Remove(c.Ctx, a); err != nil {
					problems = append(problems, fmt.Errorf("remove network of %s: %w", base.AttachmentName(a), err))
					report.Kept = append(report.Kept, a)
					continue
				}
			}
			report.Removed = append(report.Removed, a)
		}
		err = errors.Join(problems...)
		return 0, errors.Join(tellGC(c, report, err != nil), err)
	}
	return c
}

// tellGC prints a report, a line for each allocation.
func tellGC(c *base.Command, report gcReport, failed bool) error {
	if c.JSON {
		return c.PrintJSON(report)
	}
	removed := "removed"
	if report.DryRun {
		removed = "would remove"
	}
	for _, a := range report.Removed {
		why := "no namespace of it is left"
		if a.State == ended.Empty {
			why = "nothing runs in " + a.NetNS
		}
		c.UI.Output(fmt.Sprintf("%s %s%s: %s", removed, base.AttachmentName(a), ofNetwork(a), why))
	}
	for _, a := range report.Kept {
		if a.State == ended.Empty {
			id := base.Short(a.Key.ContainerID)
			c.UI.Output(fmt.Sprintf("kept %s%s: nothing runs in %s; where 'nomad alloc status %s' says that it ended: weir gc -empty %s",
				base.AttachmentName(a), ofNetwork(a), a.NetNS, id, id))
		}
	}
	if len(report.Removed)+len(report.Kept) == 0 && !failed {
		c.UI.Output("nothing to do: no allocation that is over has left anything")
	}
	return nil
}

func ofNetwork(a ended.Attachment) string {
	if a.Network == "" {
		return ""
	}
	return " from network " + a.Network
}

// installedPath is where Weir's plugin was put, and Nomad's own default.
func installedPath() (string, error) {
	manifest, err := deploy.Node{}.ReadManifest()
	if err != nil || manifest == nil || manifest.Layout.CNIPath == "" {
		return ended.DefaultCNIPath, err
	}
	return manifest.Layout.CNIPath + string(filepath.ListSeparator) + ended.DefaultCNIPath, nil
}

// emptyOnes are the allocations that -empty names.
type emptyOnes struct {
	all bool
	ids []string // beginnings
}

func parseEmpty(text string) (named emptyOnes, err error) {
	const least = 8 // as Nomad shortens IDs
	if text == "" || text == "all" {
		return emptyOnes{all: text == "all"}, nil
	}
	for id := range strings.SplitSeq(text, ",") {
		if len(id) < least {
			return named, fmt.Errorf("-empty %s: want at least %d characters of an allocation's ID", id, least)
		}
		named.ids = append(named.ids, id)
	}
	return named, nil
}

func (e emptyOnes) has(a ended.Attachment) bool {
	for _, id := range e.ids {
		if strings.HasPrefix(a.Key.ContainerID, id) {
			return true
		}
	}
	return e.all
}

// unknown is an error where one that was named is not there.
func (e emptyOnes) unknown(list []ended.Attachment) error {
	var problems []error
	for _, id := range e.ids {
		one := emptyOnes{ids: []string{id}}
		if !slices.ContainsFunc(list, one.has) {
			problems = append(problems, fmt.Errorf("-empty %s: nothing is left of such an allocation, or something runs there", id))
		}
	}
	return errors.Join(problems...)
}
