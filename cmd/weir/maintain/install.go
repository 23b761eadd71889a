// SPDX-License-Identifier: MPL-2.0

// Package maintain has the commands that run, change or check the node.
package maintain

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/deploy"
)

// InstallReport is what install and uninstall print as JSON.
type InstallReport struct {
	Schema    int          `json:"schema"`
	DryRun    bool         `json:"dry_run"`
	Steps     deploy.Steps `json:"steps"`
	Workloads []affected   `json:"workloads,omitempty"` // of an uninstallation: what loses its redirect
	Kernel    []string     `json:"kernel,omitempty"`    // what was removed beside files
	Remarks   []string     `json:"remarks,omitempty"`
	Next      []string     `json:"next,omitempty"`
}

func NewInstall(env base.Env) *base.Command {
	c := base.New(env, "install", "Put the plugin and all that belongs to it on this node", `  Puts the plugin into Nomad's cni_path as weir and as consul-cni, the conflists
  into its cni_config_dir, this program, the systemd unit and a default
  configuration to their places. Each file is replaced in one step. It may be run
  again at any time, as for another version: what is in place stays, and an
  existing configuration is never changed.

  A consul-cni that is not Weir's is in the way: -replace keeps it aside, and
  weir uninstall brings it back. Allocations that it redirected go on untouched.

  The last installation's directories are the defaults of the next. A directory
  given as "" leaves its part out. Where this program comes from a package, which
  has the program, unit and configuration in their places, those are left out.

  See what an installation in the place of consul-cni would change:

      $ weir install -replace -dry-run`).WithJSON()
	node, layout := withNode(c)
	plugin := c.Flags.String("plugin", "", "`file` of weir-cni (default: beside this program, or in ../lib/weir)")
	replace := c.Flags.Bool("replace", false, "keep files of others that are in the way aside, as NAME.weir-saved")
	dryRun := c.Flags.Bool("dry-run", false, "say what would be done and change nothing")
	c.AsUser = func() bool { return node.Root != "" || *dryRun }
	c.Do = func() (int, error) {
		if c.Uid != 0 && node.Root == "" {
			c.UI.Warn(fmt.Sprintf("note: this is user ID %d: the installation itself needs root", c.Uid))
		}
		source, packaged, err := source(c, *plugin)
		if err != nil {
			return 1, err
		}
		if packaged {
			node.Layout.Bin, node.Layout.Units, node.Layout.Config = "", "", ""
		}
		if err := layout(); err != nil {
			return 1, err
		}
		steps, err := node.PlanInstall(source, *replace)
		if err != nil {
			return 1, err
		}
		report := InstallReport{DryRun: *dryRun, Steps: steps, Remarks: node.Remarks()}
		if !*dryRun {
			report.Steps, err = steps.Run()
		}
		if err == nil {
			report.Next = AfterInstall(c, node, report, packaged)
		}
		return 0, errors.Join(err, tellInstall(c, report))
	}
	return c
}

// withNode adds the flags that say where on a node things go. The function that
// it returns applies them: flags over the last installation over the defaults.
func withNode(c *base.Command) (node *deploy.Node, apply func() error) {
	node = &deploy.Node{Layout: deploy.DefaultLayout()}
	c.Flags.StringVar(&node.Root, "root", "", "`directory` that is the node's / (for packaging and tests)")
	c.Flags.StringVar(&node.ManifestDir, "manifest-dir", "", "`directory` that remembers the installation (default "+deploy.DefaultManifestDir+")")
	fields := map[string]func(*deploy.Layout) *string{
		"cni-path":       func(l *deploy.Layout) *string { return &l.CNIPath },
		"cni-config-dir": func(l *deploy.Layout) *string { return &l.CNIConfig },
		"bin-dir":        func(l *deploy.Layout) *string { return &l.Bin },
		"unit-dir":       func(l *deploy.Layout) *string { return &l.Units },
		"config-dir":     func(l *deploy.Layout) *string { return &l.Config },
	}
	for name, usage := range map[string]string{
		"cni-path":       "`directory` of Nomad's cni_path",
		"cni-config-dir": "`directory` that is Nomad's cni_config_dir",
		"bin-dir":        "`directory` of this program",
		"unit-dir":       "`directory` of the systemd unit",
		"config-dir":     "`directory` of the agent's configuration",
	} {
		c.Flags.String(name, "", fmt.Sprintf("%s (default %s)", usage, *fields[name](&node.Layout)))
	}
	return node, func() error {
		manifest, err := node.ReadManifest()
		if err != nil {
			return err
		}
		if manifest != nil {
			node.Layout = manifest.Layout
		}
		c.Flags.Visit(func(f *flag.Flag) {
			if field, ok := fields[f.Name]; ok {
				*field(&node.Layout) = f.Value.String()
			}
		})
		return node.Layout.Validate()
	}
}

// source finds what to install. packaged says that this program lies where a
// package puts it, which then owns all but Nomad's directories.
func source(c *base.Command, plugin string) (source deploy.Source, packaged bool, err error) {
	source.Version = c.Version
	if source.CLI, err = c.Executable(); err != nil {
		return source, false, fmt.Errorf("find this program: %w", err)
	}
	if source.CLI, err = filepath.EvalSymlinks(source.CLI); err != nil {
		return source, false, fmt.Errorf("find this program: %w", err)
	}
	beside := filepath.Join(filepath.Dir(source.CLI), "weir-cni")
	library := filepath.Join(filepath.Dir(source.CLI), "../lib/weir/weir-cni")
	switch {
	case plugin != "":
		source.Plugin = plugin
	case isFile(beside):
		source.Plugin = beside
	case isFile(library):
		source.Plugin, packaged = library, true
	default:
		return source, false, fmt.Errorf("find the plugin: neither %s nor %s is there: name it with -plugin", beside, library)
	}
	return source, packaged, nil
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}

// AfterInstall is what is left for the operator: also where nothing was to be done,
// as after an installation that was made and never started.
func AfterInstall(c *base.Command, node *deploy.Node, report InstallReport, packaged bool) (next []string) {
	changed := report.Steps.Changes()
	switch {
	case node.Root != "":
		return nil
	case report.DryRun && changed:
		return []string{"the same command without -dry-run"}
	case changed && node.Layout.CNIPath != "":
		next = append(next, "restart Nomad's client (from Nomad 1.11.2 on a SIGHUP will do): it looks at plugins when it starts; what runs goes on")
	}
	enabled := c.Unit()
	switch {
	case packaged && enabled && changed:
		next = append(next, "systemctl restart weir-agent")
	case packaged && !enabled:
		next = append(next, "systemctl enable --now weir-agent")
	case !packaged && node.Layout.Units != "" && (changed || !enabled):
		next = append(next, "systemctl daemon-reload && systemctl enable weir-agent && systemctl restart weir-agent")
	}
	return append(next, "weir status")
}

// tellInstall prints a report. What is in place already is told only where
// nothing else is.
func tellInstall(c *base.Command, report InstallReport) error {
	if c.JSON {
		if report.Steps == nil {
			report.Steps = deploy.Steps{}
		}
		report.Schema = base.Schema
		return c.PrintJSON(report)
	}
	would := ""
	if report.DryRun {
		would = "would "
	}
	for _, step := range report.Steps {
		if step.Do == deploy.Keep {
			c.UI.Output(step.String())
		} else {
			c.UI.Output(would + step.String())
		}
	}
	for _, what := range report.Kernel {
		c.UI.Output("removed " + what)
	}
	if !report.Steps.Changes() && len(report.Kernel) == 0 {
		c.UI.Output("nothing to do")
	}
	for _, remark := range report.Remarks {
		c.UI.Warn("note: " + remark)
	}
	if len(report.Next) > 0 {
		c.UI.Output("next:\n  " + strings.Join(report.Next, "\n  "))
	}
	return nil
}
