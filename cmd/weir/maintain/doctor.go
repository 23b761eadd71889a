// SPDX-License-Identifier: MPL-2.0

package maintain

import (
	"cmp"
	"fmt"
	"os"
	"strings"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog/preflight"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/readiness"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/deploy"
	"github.com/weirmesh/weir/redirect/health"
)

// DoctorReport is what doctor prints as JSON.
type DoctorReport struct {
	Schema int            `json:"schema"`
	Checks []health.Check `json:"checks"`
}

// doctor is one run of the command.
type doctor struct {
	*base.Command
	node   deploy.Node
	before bool // Weir is not installed yet
	config configfile.Config
	valid  bool // ... is as the files have it
	checks []health.Check
}

func NewDoctor(env base.Env) *base.Command {
	c := base.New(env, "doctor", "Check whether this node is ready for Weir", `  Checks all that Weir needs of a node: the kernel's features by asking for each,
  cgroup v2, bpffs, programs of others on the same hooks, Nomad's plugins and
  networks, the address of Consul and each right of the agent's token, clocks,
  versions, and whether each allocation of the mesh is under Weir. With -pre it
  leaves out what only an installation brings, so that it can be asked before.

  It attaches nothing and changes nothing. What is not in order has its remedy
  below it, and its heading in docs/runbook.md. -verbose lists each check.

  The exit code is 0, or 2 where something is at fault. A warning is no fault.

  Before the first installation, and after it:

      $ weir doctor -pre
      $ weir doctor`).WithPaths().WithJSON()
	before := c.Flags.Bool("pre", false, "check a node on which Weir is not installed yet")
	path := c.Flags.String("config", "", "`path` of the agent's configuration (default /etc/weir.d where it is there)")
	cniPath := c.Flags.String("cni-path", "", "`directory` of Nomad's cni_path (default: the installation's, or /opt/cni/bin)")
	cniConfig := c.Flags.String("cni-config-dir", "", "`directory` that is Nomad's cni_config_dir (default: the installation's, or /opt/cni/config)")
	c.Do = func() (int, error) {
		d := &doctor{Command: c, before: *before, node: deploy.Node{Layout: deploy.DefaultLayout()}}
		manifest, err := d.node.ReadManifest()
		if err != nil {
			return 1, err
		}
		if manifest != nil {
			d.node.Layout = manifest.Layout
		}
		d.node.Layout.CNIPath = cmp.Or(*cniPath, d.node.Layout.CNIPath, deploy.DefaultLayout().CNIPath)
		d.node.Layout.CNIConfig = cmp.Or(*cniConfig, d.node.Layout.CNIConfig, deploy.DefaultLayout().CNIConfig)
		d.examine(*path)
		code := 0
		if d.count(health.ResultFault) > 0 {
			code = 2
		}
		if c.JSON {
			return code, c.PrintJSON(DoctorReport{Schema: 1, Checks: d.checks})
		}
		c.UI.Output(d.render())
		return code, nil
	}
	return c
}

// examine makes all checks.
func (d *doctor) examine(path string) {
	d.readConfig(path)
	d.Paths = d.Paths.Or(d.config.Paths())
	datapath := d.Open(d.Paths)
	d.checks = append(d.checks, datapath.Readiness()...)
	view, running := d.weir(datapath)
	d.checks = append(d.checks, d.node.Readiness(d.Ctx, cmp.Or(d.Proc, "/proc"), d.before)...)
	var services []byte
	if d.valid {
		var checks []health.Check
		checks, services = preflight.Consul(d.Ctx, *d.config.Consul)
		d.checks = append(d.checks, checks...)
	}
	if running {
		d.checks = append(d.checks, allocationsSeen(view)...)
		return
	}
	known, _ := datapath.Records() // what cannot be read of them is told of the data path
	d.checks = append(d.checks, readiness.Allocations(d.config, known, services, d.before)...)
}

// readConfig reads the agent's configuration; the defaults where it is not valid.
func (d *doctor) readConfig(path string) {
	checks := &health.Checks{Group: "configuration"}
	if path == "" {
		if dir := cmp.Or(d.node.Layout.Config, deploy.DefaultLayout().Config); isDirectory(dir) {
			path = dir
		}
	}
	config, err := configfile.ReadConfig(path, d.Getenv)
	if err == nil {
		err = config.Validate()
	}
	switch {
	case err != nil:
		config = configfile.DefaultConfig()
		checks.Fault("configuration", fmt.Sprintf("correct it; 'weir config validate %s' shows the line", path), "the agent's configuration is not valid: %v", err)
	case path == "":
		checks.OK("configuration", "the agent has no configuration file: every key has its default")
	default:
		checks.OK("configuration", "the agent's configuration in %s is valid", path)
	}
	d.config, d.valid = config, err == nil
	d.checks = append(d.checks, checks.List...)
}

func isDirectory(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// weir checks what an installation brought to life. It returns the agent's view
// where one runs.
func (d *doctor) weir(datapath base.Datapath) (view api.Status, running bool) {
	view, running, dead := d.Agent()
	if d.before {
		return view, running
	}
	checks := &health.Checks{Group: "weir"}
	status, err := datapath.Status()
	if err != nil {
		checks.Fault("data-path", "see the error", "the data path cannot be looked at: %v", err)
	}
	for _, problem := range status.Problems {
		checks.Fault("data-path", problem.Remedy, "%s", problem.What)
	}
	if len(checks.List) == 0 {
		checks.OK("data-path", "the data path is loaded and in force: %s", base.CountOf(status.Workloads, "workload"))
	}
	switch {
	case dead.What != "":
		checks.Fault("agent", dead.Remedy, "%s", dead.What)
	case !running:
		checks.Warn("agent", base.StartAgent, "no agent runs: nothing follows Consul, and only allocations with transparent_proxy are under Weir")
	default:
		checks.OK("agent", "the agent runs")
	}
	d.checks = append(d.checks, checks.List...)
	return view, running
}

// allocationsSeen are the allocations of the mesh that are not under Weir, as the
// running agent sees them.
func allocationsSeen(view api.Status) []health.Check {
	checks := &health.Checks{Group: "allocations"}
	for _, w := range view.Workloads {
		who := "allocation " + base.WorkloadName(w.Job, w.Group, w.Key)
		switch w.State {
		case api.StateConsul:
			checks.Warn("allocation-consul", "nothing, it goes on as it is; 'nomad alloc stop' it for one that is under Weir",
				"%s was redirected by consul-cni: its own rules hold until Nomad starts a new one in its place", who)
		case api.StateUnprotected:
			problem := health.NewProblem(health.ProblemUnprotected, "see the agent's log", "no reason is known yet")
			if len(w.Problems) > 0 {
				problem = w.Problems[0]
			}
			checks.Fault("allocation-unprotected", problem.Remedy, "%s is in the mesh and not under Weir: %s", who, problem.What)
		}
	}
	if len(checks.List) == 0 {
		checks.OK("allocation-unprotected", "no allocation of the mesh on this node is without Weir")
	}
	return checks.List
}

func (d *doctor) count(result health.Result) (count int) {
	for _, check := range d.checks {
		if check.Result == result {
			count++
		}
	}
	return count
}

// render says first whether the node is ready, then what was found, in groups.
func (d *doctor) render() string {
	var text strings.Builder
	faults, warnings := d.count(health.ResultFault), d.count(health.ResultWarning)
	switch {
	case faults > 0 && warnings > 0:
		fmt.Fprintln(&text, d.Paint(base.Red, fmt.Sprintf("not ready: %s, %s", base.CountOf(faults, "fault"), base.CountOf(warnings, "warning"))))
	case faults > 0:
		fmt.Fprintln(&text, d.Paint(base.Red, "not ready: "+base.CountOf(faults, "fault")))
	case warnings > 0:
		fmt.Fprintln(&text, d.Paint(base.Yellow, "ready, with "+base.CountOf(warnings, "warning")))
	default:
		fmt.Fprintln(&text, d.Paint(base.Green, "ready: "+base.CountOf(len(d.checks), "check")))
	}
	group := ""
	for rest := d.checks; len(rest) > 0; {
		check := rest[0]
		same := 1 // checks of one code that are all in order are one line
		for same < len(rest) && rest[same].Code == check.Code && rest[same].Result == check.Result {
			same++
		}
		if check.Group != group {
			group = check.Group
			fmt.Fprintf(&text, "\n%s\n", d.Paint(base.Bold, strings.ToUpper(group[:1])+group[1:]))
		}
		if check.Result == health.ResultOK && same > 3 && !d.Verbose {
			check.What = fmt.Sprintf("%s: %d are in order, -verbose lists them", check.Code, same)
			rest = rest[same:]
		} else {
			rest = rest[1:]
		}
		text.WriteString(d.renderCheck(check))
	}
	return strings.TrimRight(text.String(), "\n")
}

func (d *doctor) renderCheck(check health.Check) string {
	mark := d.Paint(base.Green, "✓")
	switch check.Result {
	case health.ResultWarning:
		mark = d.Paint(base.Yellow, "‼")
	case health.ResultFault:
		mark = d.Paint(base.Red, "✗")
	}
	text := "  " + mark + " " + wrapped(check.What) + "\n"
	if check.Result != health.ResultOK {
		text += "    " + wrapped("remedy: "+check.Remedy) + "\n    see docs/runbook.md#" + check.Code + "\n"
	}
	return text
}

// wrapped fits text behind an indent of four.
func wrapped(text string) string { return base.Indented(text, 4) }
