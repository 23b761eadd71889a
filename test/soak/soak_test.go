// SPDX-License-Identifier: MPL-2.0

package soak

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// TestSoak does what its seed says for as long as WEIR_SOAK_TIME says, WEIR_SOAK_SEED
// being one that was printed before. Load runs all the time: each connection must be
// answered by the right proxy, with the origin that was dialled.
func TestSoak(t *testing.T) {
	length, seed := 75*time.Second, uint64(time.Now().UnixNano())
	var err error
	if text := os.Getenv("WEIR_SOAK_TIME"); text != "" {
		if length, err = time.ParseDuration(text); err != nil {
			t.Fatalf("WEIR_SOAK_TIME: %v", err)
		}
	}
	if text := os.Getenv("WEIR_SOAK_SEED"); text != "" {
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("WEIR_SOAK_SEED: %v", err)
		}
	}
	t.Logf("%s of %s; the same again: make soak TIME=%s SEED=%d", length, revision(t), length, seed)
	s := newSoak(t, seed)
	began := time.Now()
	var ahead []int // each event comes once before one comes again
	for i := 0; time.Since(began) < length && !t.Failed() && !s.bad(); i++ {
		if len(ahead) == 0 {
			ahead = s.random.Perm(len(events()))
		}
		next := events()[ahead[0]]
		ahead = ahead[1:]
		t.Run(fmt.Sprintf("%d: %s", i, next.name), func(t *testing.T) { next.do(s, t) })
	}
	s.end()
	t.Logf("%s, seed %d", time.Since(began).Round(time.Second), seed)
	s.finish(t)
}

// finish ends the allocations that stayed, and wants nothing of any to be left. A release
// does that without its agent, whose repair of networks may put a host port back in the
// middle of a DEL.
func (s *soak) finish(t *testing.T) {
	t.Helper()
	if s.running != s.versions[0] {
		s.endAgent(t, unix.SIGTERM)
	}
	for _, a := range s.stable {
		s.counted(t, "DEL at the end", &s.deleted, a.del(pluginLimit))
	}
	t.Logf("%s", s.figures)
	for _, told := range s.told {
		t.Error(told)
	}
	if !t.Failed() {
		s.wantNothingLeft(t)
	}
}

// newSoak is a node of this tree under load. The seed says beside which release.
func newSoak(t *testing.T, seed uint64) *soak {
	t.Helper()
	former := releases()[seed%2]
	t.Logf("versions roll between this tree and %s", former.name)
	s := &soak{
		node: newNode(t), load: newLoad(), random: rand.New(rand.NewPCG(seed, 0)), versions: [2]version{thisTree(t), former.build(t)},
	}
	s.install(t, s.versions[0])
	s.startAgent(t, s.versions[0])
	s.populate(t, seed)
	return s
}

// populate gives the node allocations that stay, and load.
func (s *soak) populate(t *testing.T, seed uint64) {
	t.Helper()
	s.virtual = s.virtualIP(t, "far")
	for i := range 4 {
		a := s.newAlloc(t, i%2 == 0)
		s.counted(t, "ADD", &s.added, a.add(pluginLimit))
		a.start(t)
		a.register("far")
		s.stable = append(s.stable, a)
	}
	s.wantUpstreams(t)
	for i, a := range s.stable {
		s.keep(seed+uint64(i), func(random *rand.Rand) { s.dials(a, s.virtual, random) })
		s.transfers(a, test.Helper(t, a.spec(taskUID), transferFunc), seed+uint64(i))
	}
}

// wantUpstreams waits until all allocations have on record what Consul adds.
func (s *soak) wantUpstreams(t *testing.T) {
	t.Helper()
	test.Eventually(t, func() error {
		list, err := redirect.New(s.paths).Records()
		for _, record := range list {
			if len(record.MeshConfig.Upstreams) != 1 || len(record.MeshConfig.Upstreams[0].Addresses) == 0 || !record.Complete {
				err = fmt.Errorf("%s has upstreams %+v", record.Key, record.MeshConfig.Upstreams)
			}
		}
		return err
	}, "the upstreams of all allocations")
}
