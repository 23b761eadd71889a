// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect"
	"golang.org/x/sys/unix"
)

// setups are the measurements of what it costs to redirect one workload.
func (b *bench) setups() []measurement {
	return []measurement{
		{
			name: "setup", about: "redirect set-up in process", rounds: b.size.setups,
			variants: []string{weir, consul, nftables},
			rows: []row{
				{ID: "setup.add", Name: "set-up in process, wall", Unit: "ms", target: shareOf(0.12, nftables)},
				{ID: "setup.cpu", Name: "set-up in process, CPU with children", Unit: "ms"},
				{ID: "setup.remove", Name: "removal in process, wall", Unit: "ms"},
			},
			begin: b.load, end: b.unload, run: b.setupOnce,
		},
		{
			name: "process", about: "a whole plugin process", rounds: b.size.setups,
			variants: []string{weir, consul, nftables, inProcess},
			rows: []row{
				{ID: "process.add", Name: "ADD, whole process, wall", Unit: "ms", target: shareOf(0.4, inProcess)},
				{ID: "process.cpu", Name: "ADD, whole process, CPU with children", Unit: "ms"},
				{ID: "process.del", Name: "DEL, whole process, wall", Unit: "ms"},
			},
			begin: b.load, end: b.unload, run: b.processOnce,
		},
		{
			name: "first", about: "first ADD on a node: loads the programs", rounds: b.size.heavy,
			variants: []string{weir},
			rows: []row{
				{ID: "first.add", Name: "first ADD on a node (loads the programs), wall", Unit: "ms"},
			},
			run: b.firstOnce,
		},
	}
}

// setupOnce redirects a fresh site and undoes it. Making the site is not
// counted, and an empty heap keeps the collector out.
func (b *bench) setupOnce(ctx context.Context, name string) (got figures, err error) {
	s, err := b.newSite()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close(), b.settle(ctx)) }()
	runtime.GC()
	if name == nftables {
		wall, cpu, err := b.peer.Setup(engineConfig(s))
		return figures{"setup.add": millis(wall), "setup.cpu": millis(cpu)}, err
	}
	if name == consul {
		wall, cpu, err := spent(func() error { return installConsul(s) })
		return figures{"setup.add": millis(wall), "setup.cpu": millis(cpu)}, err
	}
	add := func() error { return redirect.New(b.paths).Add(attachment(s)) }
	wall, cpu, err := spent(add)
	if err != nil {
		return nil, err
	}
	remove, _, err := spent(func() error { return redirect.New(b.paths).Remove(key(s)) })
	return figures{"setup.add": millis(wall), "setup.cpu": millis(cpu), "setup.remove": millis(remove)}, err
}

// spent is the time of f on the clock and on all CPUs.
func spent(f func() error) (wall, cpu time.Duration, err error) {
	usage := func() (total time.Duration, err error) {
		for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
			var usage unix.Rusage
			if err := unix.Getrusage(who, &usage); err != nil {
				return 0, fmt.Errorf("get resource usage: %w", err)
			}
			total += time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
		}
		return total, nil
	}
	before, err := usage()
	if err != nil {
		return 0, 0, err
	}
	start := time.Now()
	err = f()
	wall = time.Since(start)
	after, usageErr := usage()
	return wall, after - before, errors.Join(err, usageErr)
}

// processOnce runs ADD as Nomad does, proves with real connections that the
// namespace is redirected, and runs DEL. Consul's engines have no DEL.
func (b *bench) processOnce(ctx context.Context, name string) (got figures, err error) {
	s, err := b.newSite()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close(), b.settle(ctx)) }()
	if name == inProcess {
		wall, cpu, err := b.peer.Setup(engineConfig(s))
		return figures{"process.add": millis(wall), "process.cpu": millis(cpu)}, err
	}
	program := map[string]string{weir: b.plugin, consul: b.engine, nftables: b.nftables}[name]
	wall, cpu, err := b.call(ctx, program, "ADD", s)
	if err != nil {
		return nil, err
	}
	if err := b.prove(ctx, s); err != nil {
		return nil, err
	}
	got = figures{"process.add": millis(wall), "process.cpu": millis(cpu)}
	if name == weir {
		wall, _, err := b.call(ctx, program, "DEL", s)
		if err != nil {
			return nil, err
		}
		got["process.del"] = millis(wall)
	}
	return got, nil
}

func (b *bench) firstOnce(ctx context.Context, _ string) (got figures, err error) {
	s, err := b.newSite()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.close(), b.settle(ctx)) }()
	defer func() { err = errors.Join(err, b.unload()) }()
	wall, _, err := b.call(ctx, b.plugin, "ADD", s)
	if err != nil {
		return nil, err
	}
	if err := b.prove(ctx, s); err != nil {
		return nil, err
	}
	if _, _, err := b.call(ctx, b.plugin, "DEL", s); err != nil {
		return nil, err
	}
	return figures{"first.add": millis(wall)}, nil
}

// prove dials out of a redirected site a few times and checks the origins.
func (b *bench) prove(ctx context.Context, s *site) error {
	nothing := func(*site) error { return nil }
	v := variant{redirect: true, outbound: addrPort(remote), install: nothing, remove: nothing}
	_, err := b.tryIn(ctx, s, v, trial{client: dialSpec{Task: taskConnect, Count: 20}})
	return err
}

// call runs one command of a CNI plugin with the request that Nomad sends for
// transparent_proxy, and checks that ADD passes the previous result on.
func (b *bench) call(ctx context.Context, program, command string, s *site) (wall, cpu time.Duration, err error) {
	stdin, args, err := b.request(s)
	if err != nil {
		return 0, 0, err
	}
	cmd := exec.CommandContext(ctx, program)
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"),
		"CNI_COMMAND=" + command,
		"CNI_CONTAINERID=" + s.name,
		"CNI_NETNS=" + s.inside,
		"CNI_IFNAME=eth0",
		"CNI_PATH=/opt/cni/bin",
		"CNI_ARGS=" + args,
		"WEIR_PIN_DIR=" + b.paths.PinDir,
		"WEIR_STATE_DIR=" + b.paths.StateDir,
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &stdout, &stderr
	start := time.Now()
	err = cmd.Run()
	wall = time.Since(start)
	if err != nil {
		return 0, 0, fmt.Errorf("run %s %s: %w: %s%s", program, command, err, stdout.Bytes(), stderr.Bytes())
	}
	if program == b.plugin && command == "ADD" && !strings.Contains(stdout.String(), insideAddr) {
		return 0, 0, fmt.Errorf("run %s ADD: result lacks %s: %s", program, insideAddr, stdout.Bytes())
	}
	return wall, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

// request is what Nomad 1.11 hands to consul-cni after its bridge plugins.
func (b *bench) request(s *site) (stdin []byte, args string, err error) {
	config, err := json.Marshal(engineConfig(s))
	if err != nil {
		return nil, "", err
	}
	args = strings.Join([]string{
		"IgnoreUnknown=true",
		"NOMAD_REGION=global",
		"NOMAD_NAMESPACE=default",
		"NOMAD_JOB_ID=bench",
		"NOMAD_GROUP_NAME=bench",
		"NOMAD_ALLOC_ID=" + s.name,
		"CONSUL_IPTABLES_CONFIG=" + string(config),
	}, ";")
	stdin, err = json.Marshal(map[string]any{
		"cniVersion": "0.4.0", "name": "nomad", "type": "consul-cni", "log_level": "debug",
		"prevResult": map[string]any{
			"cniVersion": "0.4.0",
			"interfaces": []any{
				map[string]any{"name": "nomad", "mac": "92:79:86:4d:aa:75"},
				map[string]any{"name": "eth0", "mac": "a2:64:64:74:eb:a0", "sandbox": s.inside},
			},
			"ips": []any{
				map[string]any{"version": "4", "interface": 1, "address": insideAddr + "/24", "gateway": outsideAddr},
			},
			"routes": []any{map[string]any{"dst": "0.0.0.0/0"}},
			"dns":    map[string]any{},
		},
	})
	return stdin, args, err
}

func millis(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e6 }
