// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
)

// recorded is Weir beside an agent that records flows. It is compared with Weir beside an
// agent that does not.
const recorded = "recorded"

// recordedNote says what the figures of recording are worth.
const recordedNote = `
"Weir" is beside an agent with flows { enabled = false }, "recorded" beside one that records every connection. Each round
measures both, in random order and in namespaces of their own; both ends and what the programs do are on one core, the
agent wherever the kernel puts it. x1.02 is the median of the ratios of the rounds.
`

// recording measures what it costs a connection that it is recorded.
func (b *bench) recording() measurement {
	first := b.cpus[:1]
	t := trial{client: dialSpec{Task: taskConnect, Count: b.size.connections, Warmup: 200}, clientCPUs: first, proxyCPUs: first}
	byName := map[string]variant{}
	for name, record := range map[string]bool{weir: false, recorded: true} {
		var agent *exec.Cmd
		byName[name] = variant{
			name: name, outbound: addrPort(remote), redirect: true,
			install: func(s *site) (err error) {
				if err := b.installWeir(s); err != nil {
					return err
				}
				agent, err = b.startRecorder(record)
				return err
			},
			remove: func(s *site) error { return errors.Join(endRecorder(agent), b.removeWeir(s)) },
		}
	}
	return measurement{
		name: "recorded", about: "connect beside an agent that records it", rounds: b.size.rounds, variants: []string{weir, recorded},
		rows: []row{
			{ID: "recorded.p50", Name: "connect p50, one core, flows recorded", Unit: "us", Floor: weir, target: atMostTimes(1.03, recorded, weir)},
			{ID: "recorded.p99", Name: "connect p99, one core, flows recorded", Unit: "us", Floor: weir},
			{ID: "recorded.cpu", Name: "CPU per connection, one core, flows recorded", Unit: "us", Floor: weir},
		},
		run: func(ctx context.Context, name string) (figures, error) {
			o, err := b.try(ctx, byName[name], t)
			if err != nil {
				return nil, err
			}
			return figures{"recorded.p50": micros(o.P50), "recorded.p99": micros(o.P99), "recorded.cpu": micros(o.CPU) / float64(o.Done)}, nil
		},
	}
}

// startRecorder starts an agent that has no Consul, and waits until it reads events, where
// it is to.
func (b *bench) startRecorder(record bool) (*exec.Cmd, error) {
	dir := filepath.Dir(b.netns)
	conf := filepath.Join(dir, "recorder.hcl")
	text := fmt.Sprintf("consul {\n  enabled = false\n}\nflows {\n  enabled = %t\n}\ncni {\n  cache_dir = %q\n}\n", record, filepath.Join(dir, "no-cache"))
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(dir, "recorder.log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	agent := exec.Command(b.weir, "agent", "-config", conf)
	agent.Env = append(os.Environ(), "WEIR_PIN_DIR="+b.paths.PinDir, "WEIR_STATE_DIR="+b.paths.StateDir)
	agent.Stdout, agent.Stderr = log, log
	agent.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := agent.Start(); err != nil {
		return nil, fmt.Errorf("start agent: %w", err)
	}
	ready := func() error {
		if _, err := b.readStatus(context.Background()); err != nil {
			return err
		}
		tables, err := bpfmap.OpenTablesToRead(b.paths.Maps())
		if err != nil {
			return err
		}
		defer tables.Close()
		var node bpfmap.BpfControl
		if _, err := tables.Get("control", uint32(0), &node); err != nil {
			return err
		}
		if reads := node.EventsUntilNs != 0; reads != record {
			return fmt.Errorf("the agent reads events: %t, want %t", reads, record)
		}
		return nil
	}
	if err := until(context.Background(), 30*time.Second, 20*time.Millisecond, ready); err != nil {
		return nil, errors.Join(fmt.Errorf("start agent: %w", err), endRecorder(agent))
	}
	return agent, nil
}

func endRecorder(agent *exec.Cmd) error {
	if agent == nil {
		return nil
	}
	if err := agent.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop agent: %w", err)
	}
	return agent.Wait()
}
