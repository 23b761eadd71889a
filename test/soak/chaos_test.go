// SPDX-License-Identifier: MPL-2.0

package soak

import (
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// soak is a run: a node, allocations that stay for all of it, and what is done to them.
type soak struct {
	*node
	*load
	random   *rand.Rand
	versions [2]version // this tree and a release
	stable   []*alloc
	virtual  netip.Addr
}

// event is one thing that happens to the node. Each ends with the node healthy.
type event struct {
	name string
	do   func(*soak, *testing.T)
}

func events() []event {
	return []event{
		{"allocations come and go", (*soak).churn},
		{"allocations come and go", (*soak).churn},
		{"the plugin is killed", (*soak).killPlugin},
		{"the agent is killed", (*soak).killAgent},
		{"versions roll", (*soak).roll},
		{"pins are lost", (*soak).losePins},
		{"records are lost", (*soak).loseRecords},
		{"Consul misbehaves", func(s *soak, t *testing.T) { s.misbehave(t, s.askedOfConsul) }},
		{"Docker misbehaves", func(s *soak, t *testing.T) { s.misbehave(t, s.askedOfDocker) }},
		{"Consul is killed", (*soak).killConsul},
		{"the disk is full", (*soak).diskFull},
	}
}

// counted runs a call of the plugin and counts it.
func (s *soak) counted(t *testing.T, what string, counter *atomic.Int64, call error) {
	t.Helper()
	counter.Add(1)
	if call != nil {
		s.problem(call, what)
		t.Fatalf("%s: %v", what, call)
	}
}

// works checks an allocation by a few connections, beside those of the load.
func (s *soak) works(a *alloc) {
	for range 4 {
		far := netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 51, 100, byte(s.random.IntN(256))}), uint16(1+s.random.IntN(65000)))
		s.dial(a.task.Ask, far, a.out.Name, far)
	}
	service := netip.AddrPortFrom(a.addr, 8080)
	s.dial(func(network, addr string) (test.Answer, error) { return test.Ask(a.host, network, addr) }, service, a.in.Name, service)
}

// gone waits until the node has nothing of the allocation.
func (s *soak) gone(t *testing.T, a *alloc) {
	t.Helper()
	test.Eventually(t, func() error {
		list, err := redirect.New(s.paths).Records()
		for _, record := range list {
			if record.Key.ContainerID == a.id {
				return fmt.Errorf("allocation %s is on record", a.id)
			}
		}
		return err
	}, "the allocation to be gone")
}

// born is an allocation that runs, in either network mode.
func (s *soak) born(t *testing.T) *alloc {
	t.Helper()
	a := s.newAlloc(t, s.random.IntN(2) == 0)
	s.counted(t, "ADD", &s.added, a.add(pluginLimit))
	a.start(t)
	s.works(a)
	return a
}

// churn makes some allocations and ends each in one of the ways there are.
func (s *soak) churn(t *testing.T) {
	for range 1 + s.random.IntN(3) {
		a := s.born(t)
		s.counted(t, "CHECK", &s.checked, a.check(pluginLimit))
		if s.random.IntN(3) == 0 { // the same ADD again changes nothing
			s.counted(t, "ADD again", &s.added, a.add(pluginLimit))
		}
		s.works(a)
		if !a.own || s.random.IntN(2) == 0 {
			s.counted(t, "DEL", &s.deleted, a.del(pluginLimit))
			s.counted(t, "DEL again", &s.deleted, a.del(pluginLimit))
		} else {
			s.counted(t, "GC", &s.gced, a.collect(s.stable))
		}
		s.gone(t, a)
	}
}

// killPlugin kills ADD or DEL at any moment of it. Nomad calls DEL after an ADD that
// failed, and either again.
func (s *soak) killPlugin(t *testing.T) {
	for range 3 {
		a := s.newAlloc(t, s.random.IntN(2) == 0)
		moment := func() time.Duration { return time.Duration(s.random.Int64N(int64(60 * time.Millisecond))) }
		if err := a.add(moment()); err != nil {
			s.killedPlugins.Add(1)
			if s.random.IntN(2) == 0 {
				s.counted(t, "DEL after an ADD that was killed", &s.deleted, a.del(pluginLimit))
			}
		}
		s.counted(t, "ADD after one that was killed", &s.added, a.add(pluginLimit))
		a.start(t)
		s.works(a)
		if err := a.del(moment()); err != nil {
			s.killedPlugins.Add(1)
		}
		s.counted(t, "DEL after one that was killed", &s.deleted, a.del(pluginLimit))
		s.gone(t, a)
	}
}

// killAgent kills the agent; ADD and DEL work without it.
func (s *soak) killAgent(t *testing.T) {
	s.endAgent(t, unix.SIGKILL)
	s.killedAgents.Add(1)
	s.churn(t)
	s.startAgent(t, s.running)
}

// roll brings plugin and agent to the other version, as an operator does.
func (s *soak) roll(t *testing.T) {
	other := s.versions[0]
	if s.running == other {
		other = s.versions[1]
	}
	s.install(t, other)
	s.endAgent(t, []unix.Signal{unix.SIGTERM, unix.SIGKILL}[s.random.IntN(2)])
	s.startAgent(t, other)
	s.rolled.Add(1)
	s.churn(t)
}

// losePins takes pins away, which ends redirects, until the agent has put them back.
func (s *soak) losePins(t *testing.T) {
	s.lose(t, &s.lost, [][]string{{s.paths.Links()}, {s.paths.Lookups()}, {s.paths.Calls()}, {s.paths.Maps()}, {s.paths.PinDir}, {s.paths.PinDir, s.paths.Workloads()}})
}

// loseRecords takes the records of workloads away, which the agent makes anew from
// libcni's cache.
func (s *soak) loseRecords(t *testing.T) {
	s.lose(t, new(atomic.Int64), [][]string{{s.paths.Workloads()}})
}

// lose empties one of the sets of directories. What is open must stay so; what is dialled
// waits for the repair, as nothing redirects meanwhile. The loss is counted when it begins
// and when it ends.
func (s *soak) lose(t *testing.T, count *atomic.Int64, choices [][]string) {
	choice := choices[s.random.IntN(len(choices))]
	s.pause.Lock()
	defer s.pause.Unlock()
	count.Add(1)
	defer count.Add(1)
	for _, dir := range choice {
		t.Logf("empty %s", dir)
		entries, err := os.ReadDir(dir)
		if err != nil && (dir != s.paths.Calls() || !errors.Is(err, fs.ErrNotExist)) { // v0.1.0 has none
			t.Fatal(err)
		}
		for _, entry := range entries {
			if err := os.RemoveAll(filepath.Join(dir, entry.Name())); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.damaged.Add(1)
	test.Eventually(t, func() error {
		list, err := redirect.New(s.paths).Records()
		if err == nil && len(list) != len(s.stable) {
			err = fmt.Errorf("%d allocations are on record, want %d", len(list), len(s.stable))
		}
		return err
	}, "records of all allocations")
	if s.running.restoresBare {
		s.wantUpstreams(t)
	}
	s.wantHealthy(t)
	for _, a := range s.stable {
		// Before the agent's next look CHECK may find what is still to be repaired.
		s.counted(t, "CHECK after a loss", &s.checked, a.check(pluginLimit))
		s.works(a)
	}
}

// misbehave makes a server misbehave while allocations come and go.
func (s *soak) misbehave(t *testing.T, server *flaky) {
	behaviour := misbehaviours[s.random.IntN(len(misbehaviours))]
	t.Logf("it %s", behaviour)
	server.become(behaviour)
	s.misbehaved.Add(1)
	s.churn(t)
	s.kept(t)
	server.become(passes)
	s.wantHealthy(t)
}

// killConsul has Consul gone while allocations come and go.
func (s *soak) killConsul(t *testing.T) {
	s.consul.Stop()
	s.askedOfConsul.become(passes) // connections to the former one end
	s.misbehaved.Add(1)
	s.churn(t)
	s.kept(t)
	s.consul.Restart()
	s.wantHealthy(t)
}

// kept checks that what Consul told before is in force still.
func (s *soak) kept(t *testing.T) {
	t.Helper()
	list, err := redirect.New(s.paths).Records()
	if err != nil {
		t.Fatal(err)
	}
	for _, record := range list {
		for _, a := range s.stable {
			if record.Key.ContainerID == a.id && len(record.MeshConfig.Upstreams) != 1 {
				s.tell(&s.wrong, "allocation %s has upstreams %+v, want the one that it had", a.id, record.MeshConfig.Upstreams)
			}
		}
	}
}

// diskFull leaves no room for records: ADD fails and says so, or works; DEL works.
func (s *soak) diskFull(t *testing.T) {
	running, late := s.born(t), s.newAlloc(t, s.random.IntN(2) == 0)
	free := s.fillDisk(t)
	s.full.Add(1)
	err := late.add(pluginLimit)
	if err != nil && !strings.Contains(err.Error(), unix.ENOSPC.Error()) {
		s.tell(&s.wrong, "ADD on a full disk does not say so: %v", err)
	}
	s.works(running)
	s.counted(t, "DEL on a full disk", &s.deleted, running.del(pluginLimit))
	s.gone(t, running)
	free()
	if err != nil {
		s.counted(t, "DEL after an ADD that failed", &s.deleted, late.del(pluginLimit))
		s.counted(t, "ADD after the disk was full", &s.added, late.add(pluginLimit))
	}
	late.start(t)
	s.works(late)
	s.counted(t, "DEL", &s.deleted, late.del(pluginLimit))
	s.gone(t, late)
	s.wantHealthy(t)
}

// virtualIP is the address by which the mesh knows a service of another node.
func (n *node) virtualIP(t *testing.T, service string) (addr netip.Addr) {
	t.Helper()
	elsewhere := func(service object) object {
		return object{"Node": "elsewhere", "Address": "192.0.2.1", "Service": service}
	}
	n.consul.Put("/v1/catalog/register", elsewhere(object{"ID": service, "Service": service, "Port": 8080}))
	n.consul.Put("/v1/catalog/register", elsewhere(object{
		"Kind": "connect-proxy", "ID": service + "-proxy", "Service": service + "-proxy", "Port": 20000, "Proxy": object{"DestinationServiceName": service},
	}))
	test.Eventually(t, func() error {
		var chain struct {
			Chain struct{ AutoVirtualIPs []netip.Addr }
		}
		n.consul.Get("/v1/discovery-chain/"+service, &chain)
		if len(chain.Chain.AutoVirtualIPs) == 0 {
			return errors.New("there is none yet")
		}
		addr = chain.Chain.AutoVirtualIPs[0]
		return nil
	}, "a virtual IP")
	return addr
}

// revision is the commit of the tree, for the record of a run.
func revision(t *testing.T) string {
	t.Helper()
	text, err := exec.Command("git", "-C", repository(t), "describe", "--always", "--dirty", "--tags").Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(text))
}
