// SPDX-License-Identifier: MPL-2.0

// Command weir is what an operator asks and tells the data path with. The
// CNI plugin is another program, weir-cni; in a cni_path it is a file of this
// name, so weir answers a CNI call with an error that says so.
package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"

	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/cmd/weir/look"
	"github.com/weirmesh/weir/cmd/weir/maintain"
	"github.com/weirmesh/weir/cmd/weir/traffic"
	"github.com/weirmesh/weir/cni"
	"github.com/weirmesh/weir/cni/ended"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/store"
	"golang.org/x/sys/unix"
)

func main() { os.Exit(onOtherThreads(command)) }

// onOtherThreads does work on other threads than the caller's, which is the process's
// first one. Who asks for the tasks of a namespace looks at first threads: this one never
// enters a workload's, as the others do for a moment.
func onOtherThreads(work func() int) int {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	code := make(chan int)
	go func() { code <- work() }()
	return <-code
}

func command() int {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	_, notTerminal := unix.IoctlGetTermios(int(os.Stdout.Fd()), unix.TCGETS)
	defer stop()
	return run(os.Args[1:], base.Env{
		Ctx:        ctx,
		UI:         &cli.BasicUi{Reader: os.Stdin, Writer: os.Stdout, ErrorWriter: os.Stderr},
		Getenv:     os.Getenv,
		Terminal:   notTerminal == nil,
		Uid:        os.Geteuid(),
		Open:       func(paths store.Paths) base.Datapath { return redirect.New(paths).Until(ctx) },
		Ask:        api.ReadStatus,
		AskEvents:  api.ReadEvents,
		AskFlows:   api.ReadFlows,
		AskGuard:   api.ReadGuard,
		AskBehind:  api.ReadBehind,
		AskChanges: api.ReadChanges,
		AskTraffic: api.ReadTraffic,
		Clear:      traffic.ClearTerminal(os.Stdout),
		Journal:    maintain.Journal,
		Unit:       base.UnitEnabled,
		Executable: os.Executable,

		Networks:       cni.Networks,
		RemoveNetworks: cni.RemoveNetworks,
		Leftovers: func(node ended.Node) base.Leftovers {
			node.Notes = os.Stderr
			return node
		},
	})
}

// run is the whole program. It returns the exit code: 0; 1 when a command could
// not do its work or when status has found something wrong; 127 where there is no
// such command.
func run(args []string, world base.Env) int {
	world.UI, world.Version, world.Run = base.Printable{Ui: world.UI}, version, run
	if command := world.Getenv("CNI_COMMAND"); command != "" {
		world.UI.Output(cniError(command, world.Getenv("CNI_CONTAINERID")))
		return 1
	}
	// "weir version" is a command; the flag is the habit of other tools.
	if len(args) == 1 && (args[0] == "-version" || args[0] == "--version" || args[0] == "-v") {
		args = []string{"version"}
	}
	list := commands(world)
	var usage bytes.Buffer
	program := &cli.CLI{
		Name:         "weir",
		Args:         args,
		Commands:     list,
		Autocomplete: true,
		HelpFunc:     help,
		HelpWriter:   &cli.UiWriter{Ui: world.UI},
		ErrorWriter:  &usage,
	}
	code, err := program.Run()
	if err != nil {
		world.UI.Error(fmt.Sprintf("weir: %v", err))
		return 1
	}
	name, operands := program.Subcommand(), program.SubcommandArgs()
	if code == 1 && list[name] == nil && len(operands) > 0 && !strings.HasPrefix(operands[0], "-") {
		name, code = name+" "+operands[0], noSuchCommand // "config" has commands below it, and this is none
	}
	switch {
	case code == noSuchCommand && name != "":
		world.UI.Error(unknownCommand(name, slices.Collect(maps.Keys(list))))
	case usage.Len() > 0:
		world.UI.Error(strings.TrimRight(usage.String(), "\n"))
	}
	return code
}

// noSuchCommand is the exit code where no command was named, or none of that name is there. A shell
// and the library have the same.
const noSuchCommand = 127

// help is the list of commands. The library has no line for one that only has others below it.
func help(list map[string]cli.CommandFactory) string {
	list = maps.Clone(list)
	list["config"] = func() (cli.Command, error) {
		return &cli.MockCommand{SynopsisText: "Check configuration files: config validate"}, nil
	}
	return cli.BasicHelpFunc("weir")(list)
}

func unknownCommand(name string, names []string) string {
	text := fmt.Sprintf("weir: no command is named %q", name)
	if guess := base.Closest(name, names); guess != "" {
		text += fmt.Sprintf(": did you mean %q?", guess)
	}
	return text + "\nFor the list of commands: weir -help"
}

// commands is the grammar: nouns read, verbs change.
func commands(world base.Env) map[string]cli.CommandFactory {
	factories := map[string]cli.CommandFactory{}
	for _, build := range []func(base.Env) *base.Command{
		maintain.NewAgent, maintain.NewInstall, maintain.NewUninstall, maintain.NewLoad, maintain.NewUnload, maintain.NewGC, look.NewStatus, look.NewWorkloads,
		traffic.NewVerdicts, look.NewExplain, look.NewDump, traffic.NewEvents, traffic.NewFlows, traffic.NewChanges, traffic.NewTop, maintain.NewDebug, maintain.NewConfigValidate, traffic.NewGuard, maintain.NewDoctor, maintain.NewVersion,
	} {
		command := build(world)
		factories[command.WorkloadName] = func() (cli.Command, error) { return command, nil }
	}
	return factories
}

// version is set by the linker; see VERSION in the Makefile.
var version = "v0.0.0-unknown"
