// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

// promptly is how long an operator waits for an answer without noticing, in seconds.
const promptly = 0.5

// A question is one command of the CLI, as an operator asks it on a node that is full.
type question struct {
	id   string
	args []string
}

// questions are about the node, and about one allocation in its middle.
func (f *fleet) questions() []question {
	a := f.list[len(f.list)-1]
	return []question{
		{"status", []string{"status"}},
		{"workloads", []string{"workloads"}},
		{"workloads JOB", []string{"workloads", a.service()}},
		{"explain ALLOC", []string{"explain", a.id}},
		{"explain ALLOC ADDR:PORT", []string{"explain", a.id, remote}},
		{"flows -last 100", []string{"flows", "-last", "100"}},
		{"flows -last 100 JOB", []string{"flows", "-last", "100", a.service()}},
		{"verdicts", []string{"verdicts"}},
		{"guard", []string{"guard"}},
	}
}

// commands measures what an operator waits for.
func (b *bench) commands() measurement {
	m := measurement{
		name: "commands", about: fmt.Sprintf("the commands beside %d proxies", b.size.proxies), rounds: 1,
		variants: []string{weir}, run: func(ctx context.Context, _ string) (figures, error) { return b.askAll(ctx) },
	}
	for _, q := range (&fleet{list: []*allocation{{}}}).questions() {
		about := fmt.Sprintf("%d proxies: `%s`", b.size.proxies, q.id)
		m.rows = append(m.rows,
			row{ID: q.id, Name: about + ", median", Unit: "s", target: atMost(promptly, "s")},
			row{ID: q.id + ".cpu", Name: about + ", CPU of the command and of the agent", Unit: "s"})
	}
	return m
}

// commandsNote says what the figures of the commands are worth.
const commandsNote = `
The node of the table before, with the agent. Each command is a process of its own, as an operator starts it, from its
start to its end; the agent has recorded forty connections of each transparent allocation. CPU is that of the process,
user and system, and what the agent spent meanwhile.
`

func (b *bench) askAll(ctx context.Context) (got figures, err error) {
	dir, err := os.MkdirTemp(filepath.Dir(b.netns), "commands-")
	if err != nil {
		return nil, err
	}
	consul, err := startConsul(ctx, b.consul, filepath.Join(dir, "consul.log"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, consul.stop()) }()
	f, err := b.newFleet(ctx, consul, dir, b.size.proxies, true)
	defer func() { err = errors.Join(err, f.close(), b.unload(), b.settle(ctx)) }()
	if err != nil {
		return nil, err
	}
	daemon, err := f.startAgent(ctx, figures{}, "commands")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, daemon.stop()) }()
	if err := f.dialOut(); err != nil {
		return nil, err
	}
	if err := wait(ctx, b.size.rest); err != nil {
		return nil, err
	}
	got = figures{}
	for _, q := range f.questions() {
		if err := daemon.ask(ctx, q, got); err != nil {
			return nil, fmt.Errorf("weir %s: %w", q.id, err)
		}
	}
	return got, nil
}

// dialOut makes each transparent allocation connect to something.
func (f *fleet) dialOut() error {
	const each = 40
	for _, a := range f.list {
		if !a.transparent {
			continue
		}
		err := inNetNS(a.site.inside, func() error {
			for range each {
				conn, err := net.Dial("tcp4", remote)
				if err != nil {
					return err
				}
				conn.Close()
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("dial out of allocation %d: %w", a.number, err)
		}
	}
	return nil
}

// ask runs one command several times.
func (d *daemon) ask(ctx context.Context, q question, got figures) error {
	var walls []float64
	var cpu time.Duration
	before, err := processCPU(d.cmd.Process.Pid)
	if err != nil {
		return err
	}
	for range d.bench.size.asked {
		cmd := exec.CommandContext(ctx, d.bench.weir, q.args...)
		cmd.Env = append(os.Environ(), "WEIR_PIN_DIR="+d.bench.paths.PinDir, "WEIR_STATE_DIR="+d.bench.paths.StateDir)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		start := time.Now()
		err := cmd.Run()
		walls = append(walls, time.Since(start).Seconds())
		// That something is wrong, or that a connection would fail, is an answer too.
		var exit *exec.ExitError
		if err != nil && (!errors.As(err, &exit) || slices.Contains([]int{-1, 127}, exit.ExitCode())) {
			return fmt.Errorf("%w: %s", err, out.Bytes())
		}
		cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	}
	after, err := processCPU(d.cmd.Process.Pid)
	got[q.id] = summarize(walls).Median
	got[q.id+".cpu"] = (cpu + after - before).Seconds() / float64(len(walls))
	return err
}
