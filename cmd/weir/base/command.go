// SPDX-License-Identifier: MPL-2.0

// Package base is what the commands have in common: flags, help, errors, colours, and what
// names a workload.
package base

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
	"slices"
	"strings"
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

// Env is all that the program has of the world; tests give another one.
type Env struct {
	Ctx        context.Context
	UI         cli.Ui
	Getenv     func(string) string
	Terminal   bool                               // standard output is one
	Uid        int                                // effective user ID of this process
	Version    string                             // of this program
	Run        func(args []string, world Env) int // the whole program, for who asks it several things
	Open       func(store.Paths) Datapath
	Ask        func(ctx context.Context, stateDir string) (api.Status, error) // the agent, where one runs
	AskEvents  func(ctx context.Context, stateDir string, deliver func(monitor.Event) error) error
	AskFlows   func(ctx context.Context, stateDir string, query api.FlowQuery, deliver func(api.Flow) error) error
	AskGuard   func(ctx context.Context, stateDir string) (api.GuardList, error)
	AskBehind  func(ctx context.Context, stateDir string, query api.BehindQuery) (api.Behind, error)
	AskChanges func(ctx context.Context, stateDir string, since time.Time) (api.ChangeList, error)
	AskTraffic func(ctx context.Context, stateDir string, since time.Time) (api.Traffic, error)
	Clear      func()                                               // empties the terminal
	Journal    func(ctx context.Context, lines int) (string, error) // the end of the agent's log
	Unit       func() bool                                          // whether systemd is to run the agent on this node
	Executable func() (string, error)                               // this program's file
	Proc       string                                               // where processes are; empty: /proc

	Networks       func(stateDir string) ([]cni.Attached, error) // that the plugin built
	RemoveNetworks func(ctx context.Context, stateDir string) (removed, kept []string, err error)
	Leftovers      func(ended.Node) Leftovers // of ended allocations
}

// Datapath is what the commands need of redirect.Datapath.
type Datapath interface {
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

// Command is one command of the CLI. Its own part is what it does; flags,
// help and the telling of errors are common.
type Command struct {
	Env
	WorkloadName string
	Line         string // one line
	About        string // paragraphs of the help, indented by two, with an example
	Flags        *flag.FlagSet

	Usage    string // the operands in the help, as [PATH]; empty: there are none
	most     int    // how many operands it takes
	Operands []string
	Predict  complete.Predictor // what a shell offers for them

	Paths   store.Paths
	JSON    bool
	Verbose bool
	AsUser  func() bool // whether it can do its work without root
	Do      func() (code int, err error)
}

// New makes a command with the flags that all commands have.
func New(env Env, name, synopsis, about string) *Command {
	c := &Command{Env: env, WorkloadName: name, Line: synopsis, About: about, AsUser: func() bool { return false }}
	c.Flags = flag.NewFlagSet(name, flag.ContinueOnError)
	c.Flags.SetOutput(io.Discard) // Run tells errors itself
	c.Flags.Usage = func() {}
	return c
}

// WithPaths adds the flags that name one instance's state on the node.
func (c *Command) WithPaths() *Command {
	c.Flags.StringVar(&c.Paths.PinDir, "pin-dir", "", "`directory` of maps, programs and links; or WEIR_PIN_DIR (default /sys/fs/bpf/weir)")
	c.Flags.StringVar(&c.Paths.StateDir, "state-dir", "", "`directory` of the workloads' records; or WEIR_STATE_DIR (default /run/weir)")
	c.Flags.StringVar(&c.Paths.CgroupRoot, "cgroup-root", "", "`directory` of the cgroup-v2 root; or WEIR_CGROUP_ROOT (default: found)")
	c.Flags.BoolVar(&c.Verbose, "verbose", false, "print errors in full, with the kernel's verifier log")
	return c
}

// WithJSON adds the flag of commands that print data.
func (c *Command) WithJSON() *Command {
	c.Flags.BoolVar(&c.JSON, "json", false, "print JSON")
	return c
}

// WithOperands lets the command have operands, which may be left out.
func (c *Command) WithOperands(most int, usage string) *Command {
	c.most, c.Usage = most, usage
	return c
}

// Operand is the first of them; empty where none was given.
func (c *Command) Operand() string {
	if len(c.Operands) == 0 {
		return ""
	}
	return c.Operands[0]
}

// The indents of a help.
const (
	aboutIndent = 2
	usageIndent = 6
)

// Synopsis is the command's line in the list of commands.
func (c *Command) Synopsis() string { return c.Line }

// Help is the command's help, flags included.
func (c *Command) Help() string {
	var text strings.Builder
	fmt.Fprintf(&text, "Usage: weir %s [options]%s\n\n%s\n\nOptions:\n", c.WorkloadName, strings.TrimRight(" "+c.Usage, " "), c.fitted())
	c.Flags.VisitAll(func(f *flag.Flag) {
		value, usage := flag.UnquoteUsage(f)
		fmt.Fprintf(&text, "\n  -%s\n      %s\n", strings.TrimSpace(f.Name+" "+value), Indented(usage, usageIndent))
	})
	return strings.TrimRight(text.String(), "\n")
}

// fitted is About in the columns of a terminal. What is indented deeper, as an example is,
// stays as it is.
func (c *Command) fitted() string {
	paragraphs := strings.Split(c.About, "\n\n")
	for i, paragraph := range paragraphs {
		prose := !slices.ContainsFunc(strings.Split(paragraph, "\n"), func(line string) bool {
			return !strings.HasPrefix(line, "  ") || strings.HasPrefix(line, "   ")
		})
		if prose {
			paragraphs[i] = "  " + Indented(strings.Join(strings.Fields(paragraph), " "), aboutIndent)
		}
	}
	return strings.Join(paragraphs, "\n\n")
}

// Run parses the flags, does the command's work and tells its error.
func (c *Command) Run(args []string) int {
	err := c.parse(args)
	if errors.Is(err, flag.ErrHelp) {
		c.UI.Output(c.Help())
		return 0
	}
	if err != nil {
		c.UI.Error(fmt.Sprintf("weir %s: %v\nFor the options: weir %s -help", c.WorkloadName, err, c.WorkloadName))
		return 1
	}
	if c.Uid != 0 && !c.AsUser() {
		c.UI.Error(c.Paint(Red, fmt.Sprintf("weir %s: root is needed, and this is user ID %d: run it with sudo, or as root", c.WorkloadName, c.Uid)))
		return 1
	}
	code, err := c.Do()
	if err != nil {
		c.UI.Error(c.Paint(Red, fmt.Sprintf("weir %s: %v", c.WorkloadName, err)))
		if detail := detail(err); detail != "" && c.Verbose {
			c.UI.Error(detail)
		} else if detail != "" {
			c.UI.Error("The kernel's full answer: the same command with -verbose")
		}
		return 1
	}
	return code
}

// parse takes flags and operands apart, in whatever order they are given.
func (c *Command) parse(args []string) error {
	c.Operands = nil
	for {
		if err := c.Flags.Parse(args); err != nil {
			return err
		}
		if c.Flags.NArg() == 0 {
			return nil
		}
		if len(c.Operands) == c.most {
			return fmt.Errorf("unexpected argument %q", c.Flags.Arg(0))
		}
		c.Operands = append(c.Operands, c.Flags.Arg(0))
		args = c.Flags.Args()[1:]
	}
}

// Datapath opens the instance that flags and environment name.
func (c *Command) Datapath() Datapath {
	return c.Open(c.Paths.Or(store.PathsFromEnv(c.Getenv)))
}

// Agent asks the instance's agent for its view. ok is false where none answers,
// and dead then says why one should; nothing where none is there to answer: the
// data path works without.
func (c *Command) Agent() (view api.Status, ok bool, dead health.Problem) {
	const timeout = 2 * time.Second
	ctx, cancel := context.WithTimeout(c.Ctx, timeout)
	defer cancel()
	stateDir := c.StateDir()
	view, err := c.Ask(ctx, stateDir)
	none := errors.Is(err, fs.ErrNotExist) // no socket: none was started, or it ended in order
	switch {
	case err == nil:
		return view, true, dead
	case none && (stateDir != store.DefaultStateDir || !c.Unit()):
		return view, false, dead
	}
	what := fmt.Sprintf("the agent does not answer: %v", err)
	if none || errors.Is(err, api.ErrNotRunning) {
		what = "the agent does not run: nothing follows Consul, guards new allocations or repairs the data path"
	}
	return api.Status{}, false, health.NewProblem(health.ProblemAgentNotRunning,
		"see its log, 'journalctl -u weir-agent' or that of Nomad's job, and start it: 'systemctl restart weir-agent'", what)
}

// UnitEnabled reports whether systemd is to run the agent on this node.
func UnitEnabled() bool {
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		return false // another init's node
	}
	links, err := filepath.Glob("/etc/systemd/system/*.wants/" + "weir-agent.service")
	return err == nil && len(links) > 0
}

func (c *Command) StateDir() string {
	return c.Paths.Or(store.PathsFromEnv(c.Getenv)).Or(store.Paths{StateDir: store.DefaultStateDir}).StateDir
}

// Schema is the form of what commands print as JSON, told in the key "schema"
// of each object. Keys may be added to it, without another number.
const Schema = 1

// PrintJSON prints one object.
func (c *Command) PrintJSON(value any) error {
	text, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		return fmt.Errorf("render JSON: %w", err)
	}
	c.UI.Output(string(text))
	return nil
}

const (
	Red    = "31"
	Green  = "32"
	Yellow = "33"
	Bold   = "1"
)

// Paint gives text a colour where somebody can see it.
func (c *Command) Paint(code, text string) string {
	if !c.Coloured() {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// Coloured reports whether somebody can see colours and did not say no to them.
func (c *Command) Coloured() bool {
	return c.Terminal && !c.JSON && c.Getenv("NO_COLOR") == "" && c.Getenv("TERM") != "dumb"
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

// Leftovers is what the commands need of ended.Node.
type Leftovers interface {
	Find() ([]ended.Attachment, error)
	Remove(context.Context, ended.Attachment) error
}
