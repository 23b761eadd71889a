// SPDX-License-Identifier: MPL-2.0

package soak

import (
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/cni"
	"github.com/weirmesh/weir/redirect"
	"golang.org/x/sys/unix"
)

// TestUpgradeFromRelease takes a node with running allocations from a release to this
// tree and back, with plugin and agent of both mixed on the way. Each connection
// meanwhile must be answered by the right proxy with its origin, each open one goes on,
// and what one version added the other checks and deletes.
func TestUpgradeFromRelease(t *testing.T) {
	tree := thisTree(t)
	for _, r := range releases() {
		t.Run(r.name, func(t *testing.T) { upgradeAndBack(t, r.build(t), tree) })
	}
}

func upgradeAndBack(t *testing.T, release, tree version) {
	s := &soak{node: newNode(t), load: newLoad(), random: rand.New(rand.NewPCG(1, 1)), versions: [2]version{tree, release}}
	s.install(t, release)
	s.startAgent(t, release)
	s.populate(t, 1)
	same := redirect.New(s.paths).Probe() == nil
	t.Logf("from %s, same layout of the maps: %t", release.name, same)

	for _, step := range []struct {
		name     string
		from, to version
	}{{"upgrade", release, tree}, {"downgrade", tree, release}} {
		t.Run(step.name, func(t *testing.T) {
			older := s.born(t) // by the version that is left
			s.install(t, step.to)
			t.Run("plugin of one, agent of the other", func(t *testing.T) { s.mixed(t, same) })
			// Half of the way by the command, as without systemd, half by the agent alone.
			s.endAgent(t, unix.SIGTERM)
			if step.name == "upgrade" {
				told, err := s.command(step.to, "load")
				if err != nil || same == strings.Contains(told, "made anew") {
					t.Errorf("weir load: %v, says %q; of another layout: %t", err, told, !same)
				}
				t.Logf("weir load says:\n%s", told)
			}
			s.startAgent(t, step.to)
			for _, a := range append([]*alloc{older}, s.stable...) {
				s.counted(t, "CHECK of an allocation of the other version", &s.checked, a.check(pluginLimit))
				s.works(a)
			}
			s.kept(t)
			s.counted(t, "DEL of an allocation of the other version", &s.deleted, older.del(pluginLimit))
			s.gone(t, older)
			s.churn(t)
		})
	}
	s.end()
	if s.connections.Load() < 100 {
		t.Errorf("%d connections, want hundreds", s.connections.Load())
	}
	s.finish(t)
}

// mixed is the time between "weir install" and the restart of the agent. With the same
// layout of the maps all goes on. With another one ADD is refused by a code that says
// so, and what runs is left alone: it is checked and deleted.
func (s *soak) mixed(t *testing.T, same bool) {
	for _, a := range s.stable {
		s.counted(t, "CHECK by the other version's plugin", &s.checked, a.check(pluginLimit))
	}
	if same {
		s.churn(t)
		return
	}
	for _, own := range []bool{true, false} {
		a := s.newAlloc(t, own)
		err := a.add(pluginLimit)
		var told *types.Error
		if !errors.As(err, &told) || told.Code != cni.CodeIncompatible || !strings.Contains(err.Error(), "layout") {
			t.Errorf("ADD by a plugin of another layout: %v, want code %d that names the layout", err, cni.CodeIncompatible)
		}
		t.Logf("ADD says: %v", err)
		s.counted(t, "DEL after it", &s.deleted, a.del(pluginLimit))
		s.gone(t, a)
	}
}
