// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test/bench/relay"
)

// agent measures the daemon on a node that is full of allocations, beside a
// real Consul: what it costs when nothing changes, and how soon a change is in
// the kernel.
func (b *bench) agent() measurement {
	proxies := fmt.Sprintf("%d proxies: ", b.size.proxies)
	variants := []string{weir}
	var tenth, fifth func(row) verdict
	if b.before != "" {
		variants, tenth, fifth = append(variants, former), shareOf(0.1, former), shareOf(0.2, former)
	}
	return measurement{
		name: "agent", about: fmt.Sprintf("the agent beside %d proxies", b.size.proxies), rounds: 1,
		variants: variants,
		rows: []row{
			{ID: "agent.connections", Name: proxies + "connections to Consul, at most", target: atMost(18, "")},
			{ID: "agent.read", Name: proxies + "read from Consul when calm, a minute", Unit: "KiB"},
			{ID: "agent.cpu", Name: proxies + "CPU when calm, of a core", Unit: "%", target: fifth},
			{ID: "agent.busiest", Name: proxies + "CPU in the busiest minute of it", Unit: "%"},
			{ID: "agent.rss", Name: proxies + "memory (RSS) when calm", Unit: "MiB", target: atMost(32, "MiB")},
			{ID: "agent.peak", Name: proxies + "memory (RSS) at its peak, the start included", Unit: "MiB"},
			{ID: "agent.change", Name: proxies + "from a change in Consul to the kernel, median", Unit: "s", target: atMost(2, "s")},
			{ID: "agent.slowest", Name: fmt.Sprintf("%sthe slowest of %d changes", proxies, b.size.changes), Unit: "s", target: atMost(2, "s")},
			{ID: "agent.all", Name: proxies + "one change in Consul that concerns all, until the last is in the kernel", Unit: "s", target: tenth},
			{ID: "agent.consul", Name: proxies + "such a change without an agent, until Consul itself has it of all", Unit: "s"},
			{ID: "agent.arrival", Name: proxies + "meanwhile a new allocation, from its registration to the kernel", Unit: "s", target: atMost(0.5, "s")},
			{ID: "agent.arrival.consul", Name: proxies + "a registration meanwhile without an agent, until Consul itself has all of it", Unit: "s"},
			{ID: "agent.left", Name: proxies + "of all, those that were changed after it"},
			{ID: "agent.start", Name: proxies + "the agent's first start, until all are in sync", Unit: "s", target: tenth},
			{ID: "agent.restart", Name: proxies + "its restart, until all are in sync", Unit: "s"},
			{ID: "agent.restore", Name: proxies + "its start after all maps and programs were lost", Unit: "s"},
		},
		run: func(ctx context.Context, variant string) (figures, error) {
			measured := *b
			if variant == former {
				measured.weir, measured.plugin = filepath.Join(b.before, "weir"), filepath.Join(b.before, "weir-cni")
			}
			return measured.agentOnce(ctx)
		},
	}
}

// agentNote says what the figures of the agent are worth.
const agentNote = `
A real Consul 1.22 and "weir agent" as processes of their own. Each proxy belongs to an allocation with a network
namespace, a result of libcni's, a service of its own in Consul and one explicit upstream, the service of another; a
quarter has transparent_proxy and went through the plugin, the others the agent has to find. In place of Envoy a small
process listens under Envoy's user, in a cgroup of the name that Nomad gives it, on the upstream's local port, too. "When
calm" is five minutes without a change, a whole period of everything that the agent does by the clock. Connections and
bytes are counted by a relay on loopback between agent and Consul; CPU is utime and stime of /proc/PID/stat, memory that
of smaps_rollup. A change moves an upstream's local port: its time runs from before the request to Consul until the row in
the kernel that puts the new ports in force. The change that concerns all is one of proxy-defaults: an expose path for
each proxy, and another outbound listener for the transparent ones; its time has all of Consul's own in it, and ends when
the last record says that it is in force. What Consul alone takes is another such change after the agent has ended, read
from Consul itself four times a second.
`

func (b *bench) agentOnce(ctx context.Context) (got figures, err error) {
	dir, err := os.MkdirTemp(filepath.Dir(b.netns), "agent-")
	if err != nil {
		return nil, err
	}
	consul, err := startConsul(ctx, b.consul, filepath.Join(dir, "consul.log"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, consul.stop()) }()
	f, err := b.newFleet(ctx, consul, dir, b.size.proxies, false)
	defer func() { err = errors.Join(err, f.close(), b.unload(), b.settle(ctx)) }()
	if err != nil {
		return nil, err
	}
	got = figures{}
	daemon, err := f.startAgent(ctx, got, "agent.start")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, daemon.stop()) }()
	if err := daemon.beCalm(ctx, got); err != nil {
		return nil, fmt.Errorf("measure a calm agent: %w", err)
	}
	if err := f.change(ctx, got); err != nil {
		return nil, fmt.Errorf("measure changes: %w", err)
	}
	if err := f.changeAll(ctx, got); err != nil {
		return nil, fmt.Errorf("measure a change of all: %w", err)
	}
	got["agent.connections"] = float64(daemon.relay.Count().Most)
	if err := daemon.stop(); err != nil {
		return nil, err
	}
	if daemon, err = f.startAgent(ctx, got, "agent.restart"); err != nil {
		return nil, err
	}
	if err := errors.Join(daemon.stop(), b.loseMaps()); err != nil {
		return nil, err
	}
	if daemon, err = f.startAgent(ctx, got, "agent.restore"); err != nil {
		return nil, err
	}
	if err := errors.Join(daemon.stop(), f.changeWithout(ctx, got)); err != nil {
		return nil, fmt.Errorf("measure a change of all without an agent: %w", err)
	}
	return got, nil
}

// loseMaps removes everything that is pinned, as when somebody unmounts bpffs.
// The records of the workloads stay.
func (b *bench) loseMaps() error { return os.RemoveAll(b.paths.PinDir) }

// A daemon is a running "weir agent".
type daemon struct {
	bench *bench
	cmd   *exec.Cmd
	relay *relay.Relay
}

// startAgent starts the agent and waits until every allocation's registration
// is what the kernel has.
func (f *fleet) startAgent(ctx context.Context, got figures, id string) (*daemon, error) {
	r, err := relay.Start(f.consul.address)
	if err != nil {
		return nil, err
	}
	log, err := os.Create(filepath.Join(f.dir, id+".log"))
	if err != nil {
		return nil, errors.Join(err, r.Stop())
	}
	defer log.Close()
	conf := filepath.Join(f.dir, "weir.hcl")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "cni {\n  cache_dir = %q\n}\n", f.cache()), 0o644); err != nil {
		return nil, errors.Join(err, r.Stop())
	}
	d := &daemon{bench: f.bench, relay: r, cmd: exec.CommandContext(ctx, f.bench.weir, "agent", "-config", conf, "-consul", r.Address)}
	d.cmd.Env = append(os.Environ(), "WEIR_PIN_DIR="+f.bench.paths.PinDir, "WEIR_STATE_DIR="+f.bench.paths.StateDir)
	d.cmd.Stdout, d.cmd.Stderr = log, log
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	start := time.Now()
	if err := d.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start agent: %w", err), r.Stop())
	}
	// Not so often that the question is what takes the time.
	err = until(ctx, 3*time.Minute, 250*time.Millisecond, func() error { return f.inSync(ctx) })
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start agent: %w", err), d.stop())
	}
	got[id] = time.Since(start).Seconds()
	return d, nil
}

// inSync says what is missing until the agent has every allocation in the
// kernel as Consul has it, the virtual IPs of upstreams included.
func (f *fleet) inSync(ctx context.Context) error {
	status, err := f.bench.readStatus(ctx)
	if err != nil {
		return err
	}
	ready := 0
	for _, w := range status.Workloads {
		if w.State == "managed" && w.InSync && len(w.Upstreams) == 1 && len(w.Upstreams[0].VirtualIPs) > 0 {
			ready++
		}
	}
	if ready != len(f.list) {
		return fmt.Errorf("%d of %d workloads are in sync", ready, len(f.list))
	}
	return nil
}

// agentStatus is what is read of the agent's answer. The agent's own package
// would bring another version of Consul's engine with it.
type agentStatus struct {
	Workloads []struct {
		State     string `json:"state"`
		InSync    bool   `json:"in_sync"`
		Upstreams []struct {
			VirtualIPs []netip.Addr `json:"virtual_ips"`
		} `json:"upstreams"`
	} `json:"workloads"`
}

// readStatus asks the agent on its local API.
func (b *bench) readStatus(ctx context.Context) (status agentStatus, err error) {
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", filepath.Join(b.paths.StateDir, "agent.sock"))
		},
	}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://agent/v1/status", nil)
	if err != nil {
		return status, err
	}
	response, err := client.Do(request)
	if err != nil {
		return status, fmt.Errorf("ask agent: %w", err)
	}
	defer response.Body.Close()
	if err := json.NewDecoder(response.Body).Decode(&status); err != nil {
		return status, fmt.Errorf("ask agent: %w", err)
	}
	return status, nil
}

// stop ends the agent and is done when it was called before.
func (d *daemon) stop() error {
	if d == nil || d.cmd.ProcessState != nil {
		return nil
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop agent: %w", err)
	}
	return errors.Join(d.cmd.Wait(), d.relay.Stop())
}

// beCalm measures an agent beside which nothing changes.
func (d *daemon) beCalm(ctx context.Context, got figures) error {
	// What it still has to do after its start is none of this.
	if err := wait(ctx, d.bench.size.rest); err != nil {
		return err
	}
	pid, minutes := d.cmd.Process.Pid, float64(d.bench.size.minutes)
	before := d.relay.Count()
	first, err := processCPU(pid)
	if err != nil {
		return err
	}
	last := first
	for range d.bench.size.minutes {
		if err := wait(ctx, d.bench.size.minute); err != nil {
			return err
		}
		now, err := processCPU(pid)
		if err != nil {
			return err
		}
		got["agent.busiest"] = max(got["agent.busiest"], percent(now-last, d.bench.size.minute))
		last = now
	}
	got["agent.cpu"] = percent(last-first, time.Duration(minutes)*d.bench.size.minute)
	got["agent.read"] = kibibytes(d.relay.Count().Read-before.Read) / (minutes * d.bench.size.minute.Minutes())
	rss, peak, err := processMemory(pid)
	got["agent.rss"], got["agent.peak"] = kibibytes(rss)/1024, kibibytes(peak)/1024
	return err
}

func percent(part, whole time.Duration) float64 { return 100 * part.Seconds() / whole.Seconds() }

// wait waits for the clock.
func wait(ctx context.Context, length time.Duration) error {
	timer := time.NewTimer(length)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// change moves ports of upstreams in Consul, one after the other.
func (f *fleet) change(ctx context.Context, got figures) error {
	table, err := ebpf.LoadPinnedMap(filepath.Join(f.bench.paths.PinDir, "maps", "workloads"), &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		return fmt.Errorf("open map workloads: %w", err)
	}
	defer table.Close()
	var taken []float64
	for range f.bench.size.changes {
		// At any point of what the agent does by the clock.
		if err := wait(ctx, 500*time.Millisecond+rand.N(time.Second)); err != nil {
			return err
		}
		a := f.list[rand.IntN(len(f.list))]
		a.upstream++
		took, err := f.changeOne(ctx, a, table)
		if err != nil {
			return fmt.Errorf("allocation %d: %w", a.number, err)
		}
		taken = append(taken, took.Seconds())
	}
	got["agent.change"], got["agent.slowest"] = summarize(taken).Median, slices.Max(taken)
	return nil
}

// changeOne registers a anew and waits until the kernel's row of its workload
// is another, which is the last step of a change, and is the one asked for.
func (f *fleet) changeOne(ctx context.Context, a *allocation, table *ebpf.Map) (took time.Duration, err error) {
	known, err := f.known(a)
	if err != nil {
		return 0, err
	}
	row := func() ([]byte, error) { return table.LookupBytes(known.Cookie) }
	before, err := row()
	if err != nil {
		return 0, fmt.Errorf("read map workloads: %w", err)
	}
	start := time.Now()
	if err := f.register(ctx, a); err != nil {
		return 0, err
	}
	err = until(ctx, 30*time.Second, time.Millisecond, func() error {
		now, err := row()
		if err != nil {
			return fmt.Errorf("read map workloads: %w", err)
		}
		if slices.Equal(now, before) {
			return errors.New("the kernel's row is the old one")
		}
		took, before = time.Since(start), now
		// The record is written before the row.
		known, err := f.known(a)
		if err == nil && (len(known.MeshConfig.Upstreams) != 1 || int(known.MeshConfig.Upstreams[0].Listener.Port()) != a.upstream) {
			err = fmt.Errorf("another change came first: %+v", known.MeshConfig)
		}
		return err
	})
	return took, err
}

// known is the allocation's record, and no other: to read all of them each time would be
// what the agent waits for.
func (f *fleet) known(a *allocation) (*store.Record, error) {
	return f.bench.paths.ReadRecord(a.key())
}
