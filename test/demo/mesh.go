// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/test/spawn"
)

// movedPort is where Consul has the listener of api later on.
const movedPort = 20007

// joinMesh takes the same two allocations over into a mesh of Consul's: what
// was written by hand so far now comes from there.
func (s *story) joinMesh(ctx context.Context) (err error) {
	s.step("A real Consul, and weir agent beside it")
	for _, a := range s.node.allocs {
		if err := a.proxy.Stop(); err != nil {
			return err
		}
	}
	if s.consul, err = startConsul(ctx, s.node, s.tools.consul); err != nil {
		return err
	}
	version, err := s.consul.version()
	if err != nil {
		return err
	}
	s.fact("consul", "%s, %s", version, s.tools.consul)
	if err := s.startAgent(); err != nil {
		return err
	}
	for _, a := range s.node.allocs {
		if err := s.startSidecar(a); err != nil {
			return err
		}
	}
	return await(ctx, "weir agent to be in sync with Consul", s.agent, func() error {
		status, err := s.agentStatus(ctx)
		if err != nil {
			return err
		}
		for _, w := range status.Workloads {
			if len(w.Problems) > 0 {
				return fmt.Errorf("allocation %s: %s", w.Group, w.Problems)
			}
		}
		if !status.Consul.InSync || len(status.Workloads) != len(s.node.allocs) {
			return fmt.Errorf("it has %d allocations and is in sync: %v", len(status.Workloads), status.Consul.InSync)
		}
		return nil
	})
}

// startSidecar registers the allocation in Consul and runs an Envoy that Consul configures.
func (s *story) startSidecar(a *allocation) error {
	if err := s.consul.register(a, inboundPort); err != nil {
		return err
	}
	bootstrap, err := s.consul.bootstrap(a)
	if err != nil {
		return err
	}
	if err := a.startSidecar(s.tools.envoy, bootstrap); err != nil {
		return err
	}
	s.fact("envoy of "+a.group, "configured by Consul, as the sidecar of service %s", a.group)
	return nil
}

// startAgent starts weir agent with the places of the demo alone: it must find
// nothing of a node that this machine may be. The kernel's events are the
// watch's.
func (s *story) startAgent() (err error) {
	file := filepath.Join(runDir, "agent.hcl")
	config := fmt.Sprintf("pin_dir = %q\nstate_dir = %q\nconsul { address = %q }\ncni {\n  cache_dir = %q\n  netns_dir = %q\n}\ndocker { socket = \"\" }\nflows { enabled = false }\n",
		pinDir, filepath.Join(runDir, "state"), s.consul.http, filepath.Join(runDir, "cni"), filepath.Join(runDir, "nomad"))
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return fmt.Errorf("start agent: %w", err)
	}
	s.agent, err = s.node.start("agent", spawn.Spec{Binary: s.tools.weir, Args: []string{"agent", "-config", file}, NetNS: s.node.netns})
	return err
}

func (s *story) agentStatus(ctx context.Context) (api.Status, error) {
	return api.ReadStatus(ctx, filepath.Join(runDir, "state"))
}

func (s *story) dialByVirtualIP(ctx context.Context) error {
	addr, err := s.consul.virtualIP(ctx, s.api.group)
	if err != nil {
		return err
	}
	s.virtual = netip.AddrPortFrom(addr, 80)
	s.step(fmt.Sprintf("The client in web dials http://%s/, which no machine has", s.virtual))
	before, err := s.handshakes(ctx)
	if err != nil {
		return err
	}
	seen, err := s.dialUntilServed(ctx)
	if err != nil {
		return err
	}
	s.fact("the client got", "%s: %q", seen.Status, seen.Body)
	s.fact("getpeername says", "%s", seen.Peer)
	s.check(strings.HasPrefix(seen.Body, "hello from uid 1000"), "the service in api answered")
	s.check(seen.Peer == s.virtual, "the client sees the virtual IP of api that it dialled")
	after, err := s.handshakes(ctx)
	if err != nil {
		return err
	}
	s.check(after > before, "web's Envoy was let in by api's with the certificate of service web (TLS handshakes: %d)", after-before)
	return nil
}

// dialUntilServed repeats the request until Consul has configured both Envoys.
func (s *story) dialUntilServed(ctx context.Context) (seen report, err error) {
	err = await(ctx, "an answer of "+s.virtual.String(), s.agent, func() error {
		var err error
		if seen, err = s.dial(s.virtual); err == nil && seen.Status != "200 OK" {
			err = errors.New("the client got " + seen.Status + seen.Error)
		}
		return err
	})
	return seen, err
}

// handshakes is how many TLS handshakes the inbound listener of api's Envoy made.
func (s *story) handshakes(ctx context.Context) (sum int, err error) {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: spawn.Dialer(s.api.netns)}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+adminAddress+"/stats?filter=^listener.*ssl.handshake$", nil)
	if err != nil {
		return 0, fmt.Errorf("ask envoy: %w", err)
	}
	var text []byte
	err = await(ctx, "the statistics of api's Envoy", s.agent, func() error {
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		text, err = io.ReadAll(response.Body)
		return err
	})
	for line := range strings.Lines(string(text)) {
		_, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if count, err := strconv.Atoi(value); err == nil {
			sum += count
		}
	}
	return sum, err
}

func (s *story) movePort(ctx context.Context) error {
	s.step(fmt.Sprintf("Consul moves the listener of api to port %d", movedPort))
	start := time.Now()
	if err := s.consul.register(s.api, movedPort); err != nil {
		return err
	}
	err := await(ctx, "the port in the kernel", s.agent, func() error {
		workloads, err := datapath().Workloads()
		if err != nil {
			return err
		}
		for _, w := range workloads {
			if w.Key == s.api.key() && w.Proxy.Inbound != movedPort {
				return fmt.Errorf("it is %d there", w.Proxy.Inbound)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	s.fact("the kernel has it", "%s after Consul was told; neither allocation was touched", milliseconds(time.Since(start)))
	before, err := s.counts()
	if err != nil {
		return err
	}
	seen, err := s.dialUntilServed(ctx)
	if err != nil {
		return err
	}
	after, err := s.counts()
	if err != nil {
		return err
	}
	inbound := bpfmap.Inbound.String()
	s.check(strings.HasPrefix(seen.Body, "hello from uid 1000"), "the client dials as before and is served")
	s.check(after["api"][inbound] > before["api"][inbound], "what came for api was handed to its proxy")
	text, err := spawn.Run(spawn.Spec{Binary: s.tools.weir, Args: []string{
		"workloads", "-pin-dir", pinDir, "-state-dir", filepath.Join(runDir, "state"),
	}})
	if err != nil {
		return err
	}
	s.note("weir workloads says:")
	for line := range strings.Lines(strings.TrimSpace(text)) {
		fmt.Fprintf(s.out, "     %s\n", strings.TrimRight(line, "\n"))
	}
	return nil
}
