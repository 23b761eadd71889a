// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/hashicorp/cli"
	"github.com/posener/complete"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cni"
	"github.com/weirmesh/weir/cni/ended"
	"github.com/weirmesh/weir/redirect/dump"
	"github.com/weirmesh/weir/redirect/explain"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/loader"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/program/runstats"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// env is all that the program has of the world; tests give another one.
type env struct {
	ctx        context.Context
	ui         cli.Ui
	getenv     func(string) string
	terminal   bool // standard output is one
	uid        int  // effective user ID of this process
	open       func(store.Paths) datapath
	ask        func(ctx context.Context, stateDir string) (api.Status, error) // the agent, where one runs
	askEvents  func(ctx context.Context, stateDir string, deliver func(monitor.Event) error) error
	askFlows   func(ctx context.Context, stateDir string, query api.FlowQuery, deliver func(api.Flow) error) error
	askGuard   func(ctx context.Context, stateDir string) (api.GuardList, error)
	askBehind  func(ctx context.Context, stateDir string, query api.BehindQuery) (api.Behind, error)
	askChanges func(ctx context.Context, stateDir string, since time.Time) (api.ChangeList, error)
	askTraffic func(ctx context.Context, stateDir string, since time.Time) (api.Traffic, error)
	clear      func()                                               // empties the terminal
	journal    func(ctx context.Context, lines int) (string, error) // the end of the agent's log
	unit       func() bool                                          // whether systemd is to run the agent on this node
	executable func() (string, error)                               // this program's file
	proc       string                                               // where processes are; empty: /proc

	networks       func(stateDir string) ([]cni.Attached, error) // that the plugin built
	removeNetworks func(ctx context.Context, stateDir string) (removed, kept []string, err error)
	leftovers      func(ended.Node) leftovers // of ended allocations
}

// datapath is what the commands need of redirect.Datapath.
type datapath interface {
	Load() (loader.Result, error)
	Unload() (removed []program.Removal, err error)
	Status() (inspect.Status, error)
	Readiness() []health.Check
	Records() ([]inspect.Record, error)
	Workloads(keys ...workload.AttachmentID) ([]inspect.WorkloadStatus, error)
	NameOthers([]inspect.Other)
	Verdicts() ([]inspect.WorkloadVerdicts, error)
	Explain(workload.AttachmentID, explain.Connection) (explain.Explanation, error)
	Settings(workload.AttachmentID) (settings []explain.Setting, silent bool, err error)
	Dump(workload.AttachmentID) ([]dump.Row, error)
	Events(ctx context.Context, deliver func(monitor.Event) error) error
	CountRunTime() (io.Closer, error)
	RunTimes() ([]runstats.RunTime, error)
}

// command is one command of the CLI. Its own part is what it does; flags,
// help and the telling of errors are common.
type command struct {
	env
	name     string
	synopsis string // one line
	about    string // paragraphs of the help, indented by two, with an example
	flags    *flag.FlagSet

	usage    string // the operands in the help, as [PATH]; empty: there are none
	most     int    // how many operands it takes
	operands []string
	predict  complete.Predictor // what a shell offers for them

	paths   store.Paths
	json    bool
	verbose bool
	asUser  func() bool // whether it can do its work without root
	do      func() (code int, err error)
}

// newCommand makes a command with the flags that all commands have.
func newCommand(env env, name, synopsis, about string) *command {
	c := &command{env: env, name: name, synopsis: synopsis, about: about, asUser: func() bool { return false }}
	c.flags = flag.NewFlagSet(name, flag.ContinueOnError)
	c.flags.SetOutput(io.Discard) // Run tells errors itself
	c.flags.Usage = func() {}
	return c
}

// withPaths adds the flags that name one instance's state on the node.
func (c *command) withPaths() *command {
	c.flags.StringVar(&c.paths.PinDir, "pin-dir", "", "`directory` of maps, programs and links; or WEIR_PIN_DIR (default /sys/fs/bpf/weir)")
	c.flags.StringVar(&c.paths.StateDir, "state-dir", "", "`directory` of the workloads' records; or WEIR_STATE_DIR (default /run/weir)")
	c.flags.StringVar(&c.paths.CgroupRoot, "cgroup-root", "", "`directory` of the cgroup-v2 root; or WEIR_CGROUP_ROOT (default: found)")
	c.flags.BoolVar(&c.verbose, "verbose", false, "print errors in full, with the kernel's verifier log")
	return c
}

// withJSON adds the flag of commands that print data.
func (c *command) withJSON() *command {
	c.flags.BoolVar(&c.json, "json", false, "print JSON")
	return c
}

// withOperands lets the command have operands, which may be left out.
func (c *command) withOperands(most int, usage string) *command {
	c.most, c.usage = most, usage
	return c
}

// operand is the first of them; empty where none was given.
func (c *command) operand() string {
	if len(c.operands) == 0 {
		return ""
	}
	return c.operands[0]
}

// Synopsis is the command's line in the list of commands.
func (c *command) Synopsis() string { return c.synopsis }

// Help is the command's help, flags included.
func (c *command) Help() string {
	var text strings.Builder
	fmt.Fprintf(&text, "Usage: weir %s [options]%s\n\n%s\n\nOptions:\n", c.name, strings.TrimRight(" "+c.usage, " "), c.about)
	c.flags.VisitAll(func(f *flag.Flag) {
		value, usage := flag.UnquoteUsage(f)
		fmt.Fprintf(&text, "\n  -%s\n      %s\n", strings.TrimSpace(f.Name+" "+value), usage)
	})
	return strings.TrimRight(text.String(), "\n")
}

// Run parses the flags, does the command's work and tells its error.
func (c *command) Run(args []string) int {
	err := c.parse(args)
	if errors.Is(err, flag.ErrHelp) {
		c.ui.Output(c.Help())
		return 0
	}
	if err != nil {
		c.ui.Error(fmt.Sprintf("weir %s: %v\nFor the options: weir %s -help", c.name, err, c.name))
		return 1
	}
	if c.uid != 0 && !c.asUser() {
		c.ui.Error(c.paint(red, fmt.Sprintf("weir %s: root is needed, and this is user ID %d: run it with sudo, or as root", c.name, c.uid)))
		return 1
	}
	code, err := c.do()
	if err != nil {
		c.ui.Error(c.paint(red, fmt.Sprintf("weir %s: %v", c.name, err)))
		if detail := detail(err); detail != "" && c.verbose {
			c.ui.Error(detail)
		} else if detail != "" {
			c.ui.Error("The kernel's full answer: the same command with -verbose")
		}
		return 1
	}
	return code
}

// parse takes flags and operands apart, in whatever order they are given.
func (c *command) parse(args []string) error {
	c.operands = nil
	for {
		if err := c.flags.Parse(args); err != nil {
			return err
		}
		if c.flags.NArg() == 0 {
			return nil
		}
		if len(c.operands) == c.most {
			return fmt.Errorf("unexpected argument %q", c.flags.Arg(0))
		}
		c.operands = append(c.operands, c.flags.Arg(0))
		args = c.flags.Args()[1:]
	}
}

// datapath opens the instance that flags and environment name.
func (c *command) datapath() datapath {
	return c.open(c.paths.Or(store.PathsFromEnv(c.getenv)))
}

// agent asks the instance's agent for its view. ok is false where none answers,
// and dead then says why one should; nothing where none is there to answer: the
// data path works without.
func (c *command) agent() (view api.Status, ok bool, dead health.Problem) {
	const timeout = 2 * time.Second
	ctx, cancel := context.WithTimeout(c.ctx, timeout)
	defer cancel()
	stateDir := c.stateDir()
	view, err := c.ask(ctx, stateDir)
	none := errors.Is(err, fs.ErrNotExist) // no socket: none was started, or it ended in order
	switch {
	case err == nil:
		return view, true, dead
	case none && (stateDir != store.DefaultStateDir || !c.unit()):
		return view, false, dead
	}
	what := fmt.Sprintf("the agent does not answer: %v", err)
	if none || errors.Is(err, api.ErrNotRunning) {
		what = "the agent does not run: nothing follows Consul, guards new allocations or repairs the data path"
	}
	return api.Status{}, false, health.NewProblem(health.ProblemAgentNotRunning,
		"see its log, 'journalctl -u weir-agent' or that of Nomad's job, and start it: 'systemctl restart weir-agent'", what)
}

// unitEnabled reports whether systemd is to run the agent on this node.
func unitEnabled() bool {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return false // another init's node
	}
	links, err := filepath.Glob("/etc/systemd/system/*.wants/" + "weir-agent.service")
	return err == nil && len(links) > 0
}

func (c *command) stateDir() string {
	return c.paths.Or(store.PathsFromEnv(c.getenv)).Or(store.Paths{StateDir: store.DefaultStateDir}).StateDir
}

// jsonSchema is the form of what commands print as JSON, told in the key "schema"
// of each object. Keys may be added to it, without another number.
const jsonSchema = 1

// printJSON prints one object.
func (c *command) printJSON(value any) error {
	text, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return fmt.Errorf("render JSON: %w", err)
	}
	c.ui.Output(string(text))
	return nil
}

const (
	red    = "31"
	green  = "32"
	yellow = "33"
	bold   = "1"
)

// paint gives text a colour where somebody can see it.
func (c *command) paint(code, text string) string {
	if !c.coloured() {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// coloured reports whether somebody can see colours and did not say no to them.
func (c *command) coloured() bool {
	return c.terminal && !c.json && c.getenv("NO_COLOR") == "" && c.getenv("TERM") != "dumb"
}

// table aligns rows in columns. The first row is the heading.
func table(indent string, rows [][]string) string {
	var text strings.Builder
	writer := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		cells := make([]string, len(row))
		for i := range row {
			cells[i] = cell(row[i])
		}
		fmt.Fprintln(writer, indent+strings.Join(cells, "\t"))
	}
	writer.Flush() // a strings.Builder takes everything
	lines := strings.Split(strings.TrimRight(text.String(), "\n"), "\n")
	for i, line := range lines {
		lines[i] = strings.TrimRight(line, " ")
	}
	return strings.Join(lines, "\n")
}

// detail finds an error in err's tree that has more to say under %+v, as the
// verifier's has.
func detail(err error) string {
	if formatter, ok := err.(fmt.Formatter); ok {
		return fmt.Sprintf("%+v", formatter)
	}
	switch err := err.(type) { //nolint:errorlint // it walks the tree itself
	case interface{ Unwrap() error }:
		if inner := err.Unwrap(); inner != nil {
			return detail(inner)
		}
	case interface{ Unwrap() []error }:
		for _, inner := range err.Unwrap() {
			if text := detail(inner); text != "" {
				return text
			}
		}
	}
	return ""
}

// short is the first part of an allocation's ID, as Nomad prints it.
func short(id string) string {
	if len(id) > 8 {
		return id[:8]
	}
	return id
}

// orDash shows an empty field.
func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}
