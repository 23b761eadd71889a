// SPDX-License-Identifier: MPL-2.0

// Bench measures Weir side by side with no redirection, with both of Consul's own
// engines and with the least that could redirect, on this machine, and prints a table. It must run as root:
// it makes network namespaces and cgroups, loads Weir into a bpffs of its own,
// and takes all of it away again. run.sh builds and starts it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test/bench/peer"
	"golang.org/x/sys/unix"
)

type options struct {
	rounds    int
	quick     bool
	only      string
	json      string
	engine    string
	nftables  string
	plugin    string
	weir      string
	consul    string
	plugins   string
	readme    string
	revision  string
	before    string
	proxies   int
	workloads int
	minutes   int
}

// A part is the measurements of one table.
type part struct {
	name         string // of the table's marks in docs/benchmarks.md
	note         string // what a reader must know to judge it
	measurements []measurement
}

func (b *bench) parts() []part {
	all := append(b.traffic(), b.setups()...)
	return []part{
		{"bench", comparisonNote, append(all, b.memory(), b.unrelated())},
		{"bench-storm", stormNote, []measurement{b.storm(0), b.storm(mappedPorts)}},
		{"bench-agent", agentNote, []measurement{b.agent()}},
		{"bench-recorded", recordedNote, []measurement{b.recording()}},
		{"bench-scale", scaleNote, []measurement{b.scale()}},
		{"bench-commands", commandsNote, []measurement{b.commands()}},
	}
}

func main() {
	if len(os.Args) == 3 && slices.Contains([]string{"serve", "dial", "hold"}, os.Args[1]) {
		if err := runWorker(os.Args[1], os.Args[2]); err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", os.Args[1], err)
			os.Exit(1)
		}
		return
	}
	if filepath.Base(os.Args[0]) == interfaceName {
		if err := interfacePlugin(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	var o options
	flag.IntVar(&o.rounds, "rounds", 0, "rounds of each comparison (default 21, with -quick 2)")
	flag.BoolVar(&o.quick, "quick", false, "measure as little as shows that everything can be measured")
	flag.StringVar(&o.only, "only", "", "only these, separated by commas: connect connect2 rate churn stream requests\nrequests16 inbound setup process first memory foreign storm storm-ports agent recorded scale commands")
	flag.StringVar(&o.json, "json", "", "write all samples to this file too")
	flag.StringVar(&o.engine, "engine", "", "the program of ./engine")
	flag.StringVar(&o.nftables, "nftables", "", "the program of ./nftables")
	flag.StringVar(&o.plugin, "plugin", "", "weir-cni")
	flag.StringVar(&o.weir, "weir", "", "weir")
	flag.StringVar(&o.consul, "consul", "", "consul")
	flag.StringVar(&o.plugins, "cni", "", "directory of the reference CNI plugins")
	flag.StringVar(&o.readme, "readme", "", "write the tables between their marks in this file too")
	flag.StringVar(&o.before, "before", "", "a directory with weir and weir-cni of an earlier revision, for the agent beside it")
	flag.IntVar(&o.proxies, "proxies", 0, "proxies beside the agent (default 1000, with -quick 20)")
	flag.IntVar(&o.workloads, "workloads", 0, "workloads of the fullest node that scale measures (default 5000, with -quick 5)")
	flag.IntVar(&o.minutes, "minutes", 0, "minutes that the agent is watched for when calm (default 5)")
	flag.StringVar(&o.revision, "revision", "unknown", "what is measured, for the table")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, o, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintf(os.Stderr, "\nbench: %v\n", err)
		os.Exit(1)
	}
}

// run measures and prints the table to stdout, progress to stderr.
func run(ctx context.Context, o options, stdout, stderr io.Writer) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("make network namespaces: must be root")
	}
	if o.rounds == 0 {
		o.rounds = 21
		if o.quick {
			o.rounds = 2
		}
	}
	b := &bench{
		size: fullSizes(o.rounds), engine: o.engine, nftables: o.nftables, plugin: o.plugin, weir: o.weir, consul: o.consul, plugins: o.plugins, progress: stderr,
	}
	if o.quick {
		b.size = quickSizes(o.rounds)
	}
	b.before = o.before
	if o.proxies > 0 {
		b.size.proxies = o.proxies
	}
	if o.workloads > 0 {
		b.size.scale = slices.DeleteFunc(b.size.scale, func(count int) bool { return count > o.workloads })
	}
	if o.minutes > 0 {
		b.size.minutes = o.minutes
	}
	undo, err := b.prepare()
	defer func() { err = errors.Join(err, undo()) }()
	if err != nil {
		return err
	}
	about, err := describeMachine(b.cpus, filepath.Dir(b.task), o.nftables, o.revision)
	if err != nil {
		return err
	}
	chosen, err := choose(b.parts(), o.only)
	if err != nil {
		return err
	}
	for i, p := range chosen {
		var rows []row
		for _, m := range p.measurements {
			measured, err := b.measure(ctx, m)
			if err != nil {
				return err
			}
			rows = append(rows, measured...)
		}
		r := newReport(about, o.quick, rows)
		r.Note = p.note
		if err := r.publish(p, i == 0, o, stdout); err != nil {
			return err
		}
	}
	return nil
}

// prepare makes what all measurements share. undo takes it away, also when
// prepare did not come to its end.
func (b *bench) prepare() (undo func() error, err error) {
	var steps []func() error
	undo = func() error {
		var errs []error
		for i := range steps {
			errs = append(errs, steps[len(steps)-1-i]())
		}
		return errors.Join(errs...)
	}
	if b.cpus, err = cpuList(); err != nil {
		return undo, err
	}
	dir, err := os.MkdirTemp("", "weir-bench-")
	if err != nil {
		return undo, err
	}
	steps = append(steps, func() error { return os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		return undo, err
	}
	b.netns = filepath.Join(dir, "netns")
	bpffs, state, path := filepath.Join(dir, "bpf"), filepath.Join(dir, "state"), filepath.Join(dir, "path")
	for _, made := range []string{b.netns, bpffs, state, path} {
		if err := os.Mkdir(made, 0o755); err != nil {
			return undo, err
		}
	}
	// Of the same kind as /sys/fs/bpf and /run, where they are on a node.
	for mounted, kind := range map[string]string{bpffs: "bpf", state: "tmpfs"} {
		if err := unix.Mount(kind, mounted, kind, 0, "mode=0700"); err != nil {
			return undo, fmt.Errorf("mount %s: %w", kind, err)
		}
		steps = append(steps, func() error { return unix.Unmount(mounted, unix.MNT_DETACH) })
	}
	b.paths = store.Paths{PinDir: filepath.Join(bpffs, "weir"), StateDir: filepath.Join(state, "weir")}
	// Workers run under ordinary users, who may not reach the build's directory.
	b.program = filepath.Join(dir, "worker")
	if err := copyProgram(b.program); err != nil {
		return undo, err
	}
	if err := preferNFT(path); err != nil {
		return undo, err
	}
	if b.peer, err = peer.Start(b.nftables); err != nil {
		return undo, err
	}
	steps = append(steps, b.peer.Stop)
	root, err := cgroupRoot()
	if err != nil {
		return undo, err
	}
	for name, cgroup := range map[string]*string{"task": &b.task, "proxy": &b.proxy, "foreign": &b.foreign} {
		*cgroup = filepath.Join(root, filepath.Base(dir)+"-"+name)
		if err := os.Mkdir(*cgroup, 0o755); err != nil {
			return undo, fmt.Errorf("make cgroup: %w", err)
		}
		steps = append(steps, func() error { return os.Remove(*cgroup) })
	}
	return undo, nil
}

func copyProgram(path string) error {
	text, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	return os.WriteFile(path, text, 0o755)
}

// cgroupRoot is where the root of the cgroup-v2 hierarchy is mounted.
func cgroupRoot() (string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		_, filesystem, found := strings.Cut(line, " - ")
		if found && len(fields) > 4 && fields[3] == "/" && strings.HasPrefix(filesystem, "cgroup2 ") {
			return fields[4], nil
		}
	}
	return "", errors.New("find root of cgroup v2: not mounted")
}
