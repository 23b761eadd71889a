// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/test/spawn"
)

// show tells the whole story and cleans up whatever happened in it.
func show(ctx context.Context, p *printer, tools tools) (err error) {
	node, err := newNode()
	if err != nil {
		return err
	}
	fmt.Fprintln(p.out, "Two allocations of a service mesh on a network of their own, and one connection between")
	fmt.Fprintln(p.out, "them. Nothing of this machine's own network is touched.")
	if tools.consul == "" {
		p.note("No Consul is on PATH or built: what it brings about is left out. `make tools` builds one.")
	} else {
		p.note("A real Consul joins later: %s", tools.consul)
	}
	story := &story{printer: p, tools: tools, node: node}
	err = story.tell(ctx)
	if ctx.Err() != nil {
		err = context.Cause(ctx) // whatever the interrupt broke
	}
	if err != nil {
		fmt.Fprintf(p.out, "\n%s\n", p.paint(red, "the demo cannot go on; cleaning up"))
		node.showLogs(p)
	} else {
		err = story.leave(ctx)
	}
	if err := errors.Join(err, node.close(), p.err()); err != nil {
		return err
	}
	p.check(true, "no pin, record, namespace, cgroup or process is left")
	fmt.Fprintf(p.out, "\n%s\n", p.paint(green, "demo: all steps as expected"))
	return nil
}

// story is what the steps share.
type story struct {
	*printer
	tools tools
	node  *node
	web   *allocation // dials
	api   *allocation // serves

	// Those of the second part, with a real Consul.
	consul  *consul
	agent   *spawn.Process
	virtual netip.AddrPort // of api
}

func (s *story) tell(ctx context.Context) error {
	steps := []func(context.Context) error{
		s.makeAllocations, s.startPrograms, s.connect, s.noRules, s.stopProxy, s.restartProxy,
	}
	if s.tools.consul != "" {
		steps = append(steps, s.joinMesh, s.dialByVirtualIP, s.movePort)
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	return nil
}

func (s *story) makeAllocations(ctx context.Context) (err error) {
	s.step("Two allocations, made as Nomad makes them")
	if err := os.Symlink(s.tools.plugin, filepath.Join(runDir, "plugins", "consul-cni")); err != nil {
		return fmt.Errorf("install plugin: %w", err)
	}
	s.web, err = newAllocation(s.node, "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01", "web", "172.26.64.11/20")
	if err != nil {
		return err
	}
	s.api, err = newAllocation(s.node, "1c6e1d2f-8d1a-4e1f-8b62-3a7d9f2e1b02", "api", "172.26.64.12/20")
	if err != nil {
		return err
	}
	start := time.Now()
	if _, err := datapath().Load(); err != nil {
		return err
	}
	s.fact("node", "data path loaded, once for all, in %s", milliseconds(time.Since(start)))
	for _, a := range s.node.allocs {
		took, err := a.cni(ctx, "ADD")
		if err != nil {
			return err
		}
		s.fact("allocation "+a.group, "%s: consul-cni ADD took %s", a.address.Addr(), milliseconds(took))
	}
	return nil
}

func (s *story) startPrograms(ctx context.Context) error {
	s.step("A real Envoy in each, a plain service in api")
	for _, a := range s.node.allocs {
		if err := a.startProxy(ctx, s.tools.envoy); err != nil {
			return err
		}
		s.fact("envoy of "+a.group, "uid %d, outbound 127.0.0.1:%d, inbound 0.0.0.0:%d", proxyUID, outboundPort, inboundPort)
	}
	address := fmt.Sprintf("127.0.0.1:%d", servicePort)
	read, write, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("start service: %w", err)
	}
	defer read.Close()
	spec := s.api.task("serve", address)
	spec.Stdout, spec.Stderr = write, os.Stderr
	service, err := spawn.Start(spec)
	if err := errors.Join(err, write.Close()); err != nil {
		return err
	}
	s.api.tasks = append(s.api.tasks, service)
	if _, err := bufio.NewReader(read).ReadString('\n'); err != nil {
		return fmt.Errorf("start service: it ended before it listened: %w", err)
	}
	s.fact("service in api", "uid %d, listens on %s alone", taskUID, address)
	return nil
}

func (s *story) connect(ctx context.Context) (err error) {
	target := netip.AddrPortFrom(s.api.address.Addr(), servicePort)
	s.step(fmt.Sprintf("A plain client in web dials http://%s/", target))
	watch, err := s.startWatch(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, watch.end()) }()
	counts, err := s.counts()
	if err != nil {
		return err
	}
	seen, err := s.dial(target)
	if err != nil {
		return err
	}
	s.fact("the client dialled", "%s", seen.Dialled)
	s.fact("the client got", "%s: %q", seen.Status, seen.Body)
	s.fact("getpeername says", "%s", seen.Peer)
	s.fact("getsockname says", "%s", seen.Local)
	s.check(seen.Error == "" && strings.HasPrefix(seen.Body, "hello from uid 1000"), "the service answered%s", prefixed(": ", seen.Error))
	s.check(seen.Peer == target, "the client sees the peer it dialled")
	s.check(seen.Local.Addr() == s.web.address.Addr(), "the client sees its own address")

	// The last thing to happen is that api's proxy dials the service.
	events, err := watch.await(ctx, bpfmap.Proxy, 2, func() error { return nil })
	if err != nil {
		return err
	}
	s.showEvents(events, target)

	out, err := s.web.newLines(ctx, 1)
	if err != nil {
		return err
	}
	for _, line := range out {
		s.fact("envoy of web saw", "%s: origin %s, source %s, went on to %s", line.Listener, line.Local, line.Remote, line.Upstream)
	}
	s.check(len(out) == 1 && out[0].Listener == "outbound", "one connection came to web's outbound listener")
	s.check(out[0].Local == target, "its origin is what the client dialled")
	s.check(out[0].Remote == seen.Local, "its source is the client's own address and port")

	in, err := s.api.newLines(ctx, 1)
	if err != nil {
		return err
	}
	for _, line := range in {
		s.fact("envoy of api saw", "%s: dialled %s, source %s, went on to %s", line.Listener, line.Local, line.Remote, line.Upstream)
	}
	s.check(len(in) == 1 && in[0].Listener == "inbound", "one connection came to api's inbound listener")
	s.check(in[0].Local == target, "the address that was dialled is intact")
	s.check(in[0].Remote.Addr() == s.web.address.Addr(), "its source is web's address")

	return s.expectRises(counts, map[string]map[string]uint64{
		"web": {bpfmap.Redirected.String(): 1, bpfmap.Proxy.String(): 1},
		"api": {bpfmap.Inbound.String(): 1, bpfmap.Proxy.String(): 1},
	})
}

// showEvents tells what the programs did to the connection, stop by stop.
func (s *story) showEvents(events []monitor.Event, target netip.AddrPort) {
	encoded := netip.MustParsePrefix("127.128.0.0/9")
	steered := false
	for _, event := range events {
		switch event.Verdict {
		case bpfmap.Local: // the watch's own
		case bpfmap.Redirected:
			s.fact("kernel: "+event.Name, "uid %d dialled %s, its socket was sent to %s", event.UID, event.Origin, event.Destination)
			steered = steered || event.Origin == target && encoded.Contains(event.Destination.Addr()) && event.Destination.Port() == target.Port()
		case bpfmap.Inbound:
			s.fact("kernel: "+event.Name, "%s came for %s, handed to the inbound listener", event.Source, event.Origin)
		default:
			s.fact("kernel: "+event.Name, "uid %d dialled %s", event.UID, event.Origin)
		}
	}
	s.check(steered, "the kernel sent it to an address of lo that stands for the origin, on the same port")
}

func (s *story) noRules(ctx context.Context) error {
	s.step("No firewall rule redirects")
	for _, a := range s.node.allocs {
		for _, command := range [][]string{{"iptables-save"}, {"ip6tables-save"}, {"nft", "list", "ruleset"}} {
			name := strings.Join(command, " ")
			path, err := exec.LookPath(command[0])
			if errors.Is(err, exec.ErrNotFound) {
				s.note("%s is not installed here: it cannot be asked", command[0])
				continue
			}
			if err != nil {
				return fmt.Errorf("find %s: %w", command[0], err)
			}
			text, err := spawn.Run(spawn.Spec{Binary: path, Args: command[1:], NetNS: a.netns})
			if err != nil {
				return err
			}
			// The one chain there is holds what others forward through the namespace;
			// no packet of the allocation's own passes it.
			translates := strings.Contains(text, "type nat") || strings.Contains(text, "*nat") || strings.Contains(text, "dnat") || strings.Contains(text, "redirect to")
			if !translates {
				text = ""
			}
			s.check(!translates, "%s in %s has no rule that translates an address%s", name, a.group, prefixed(", but: ", text))
		}
	}
	return nil
}

func (s *story) stopProxy(context.Context) error {
	s.step("Envoy of web is stopped; the client dials again")
	if err := s.web.proxy.Stop(); err != nil {
		return err
	}
	counts, err := s.counts()
	if err != nil {
		return err
	}
	seen, err := s.dial(netip.AddrPortFrom(s.api.address.Addr(), servicePort))
	if err != nil {
		return err
	}
	s.fact("the client got", "%s", seen.Error)
	s.check(seen.Refused, "refused at once, never past the proxy")
	return s.expectRises(counts, map[string]map[string]uint64{
		"web": {bpfmap.RefusedNoProxy.String(): 1},
		"api": {},
	})
}

func (s *story) restartProxy(ctx context.Context) error {
	s.step("Envoy of web is started again")
	if err := s.web.startProxy(ctx, s.tools.envoy); err != nil {
		return err
	}
	seen, err := s.dial(netip.AddrPortFrom(s.api.address.Addr(), servicePort))
	if err != nil {
		return err
	}
	s.fact("the client got", "%s: %q", seen.Status, seen.Body)
	s.check(seen.Error == "", "the service answered%s", prefixed(": ", seen.Error))
	return nil
}

func (s *story) leave(ctx context.Context) error {
	s.step("Both allocations end, and everything goes")
	for _, a := range s.node.allocs {
		took, err := a.cni(ctx, "DEL")
		if err != nil {
			return err
		}
		s.fact("allocation "+a.group, "consul-cni DEL took %s", milliseconds(took))
	}
	workloads, err := datapath().Workloads()
	if err != nil {
		return fmt.Errorf("list workloads: %w", err)
	}
	s.check(len(workloads) == 0, "no workload is known any more")
	return nil
}

// dial lets the client task in web fetch the service's page.
func (s *story) dial(target netip.AddrPort) (report, error) {
	var seen report
	text, err := spawn.Run(s.web.task("get", fmt.Sprintf("http://%s/", target)))
	if err != nil {
		return seen, err
	}
	if err := json.Unmarshal([]byte(text), &seen); err != nil {
		return seen, fmt.Errorf("read what the client said: %w: %s", err, text)
	}
	return seen, nil
}

// counts reads the verdicts of both allocations, by group and name.
func (s *story) counts() (map[string]map[string]uint64, error) {
	list, err := datapath().Verdicts()
	if err != nil {
		return nil, fmt.Errorf("read verdicts: %w", err)
	}
	counts := map[string]map[string]uint64{}
	for _, a := range s.node.allocs {
		for _, verdicts := range list {
			if verdicts.Key == a.key() {
				counts[a.group] = verdicts.Counts
			}
		}
	}
	return counts, nil
}

// expectRises shows which verdicts rose since before and holds them against
// the expected ones, all of them. Inbound may be one more: a packet that comes
// when its connection is gone already is looked up like a new one.
func (s *story) expectRises(before, want map[string]map[string]uint64) error {
	after, err := s.counts()
	if err != nil {
		return err
	}
	for _, a := range s.node.allocs {
		rose := map[string]uint64{}
		for name, count := range after[a.group] {
			if count > before[a.group][name] {
				rose[name] = count - before[a.group][name]
			}
		}
		s.rises(a.group, rose)
		if inbound := bpfmap.Inbound.String(); want[a.group][inbound]+1 == rose[inbound] && rose[inbound] > 1 {
			rose[inbound]--
		}
		s.check(fmt.Sprint(rose) == fmt.Sprint(want[a.group]), "the verdicts of %s are the expected ones, and no other%s",
			a.group, differing(rose, want[a.group]))
	}
	return nil
}

func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
}

func differing(got, want map[string]uint64) string {
	if fmt.Sprint(got) == fmt.Sprint(want) {
		return ""
	}
	return fmt.Sprintf(": got %v, want %v", got, want)
}

// prefixed is text after lead, or nothing where there is no text.
func prefixed(lead, text string) string {
	if text = strings.TrimSpace(text); text == "" {
		return ""
	}
	return lead + text
}
