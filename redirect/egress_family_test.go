// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// While a pin that cannot be seen holds the program of another version, both are asked
// for each socket: who is refused is refused once, and who is let out is counted twice.
func TestEgressFamilyProgramTwice(t *testing.T) {
	a := egressGuarded(t, workload.GuardEnforce)
	if err := probe.Families(); err != nil {
		t.Logf("this kernel cannot have it: %v", err)
		return
	}
	hidden := filepath.Join(a.node.Paths().PinDir, "hidden") // as below a bpffs that another is mounted over
	if err := os.Rename(a.node.Paths().Family(), hidden); err != nil {
		t.Fatal(err)
	}
	editControl(t, a.node.Datapath, func(row *bpfmap.BpfControl) { row.Digest[0]++ })
	if result, err := a.node.Load(); err != nil || len(result.Problems) > 0 {
		t.Fatalf("load over it: %v, %v", err, result.Problems)
	}
	p := a.attacker(t)
	var errno syscall.Errno
	attacks := func() {
		if err := p.Call(attack{Way: "xdp", To: netip.AddrPortFrom(remote4(1), 9)}, &errno); err != nil {
			t.Error(err)
		}
	}
	counts := func(want syscall.Errno, verdicts counted) {
		t.Helper()
		verdictsAre(t, a.rose(attacks), verdicts)
		if want != 0 && errno != want {
			t.Errorf("ends with %s, want %s", errnoName(errno), errnoName(want))
		}
	}
	counts(unix.EPERM, counted{bpfmap.RefusedEgressSocket: 1})
	if err := a.node.SetMeshConfig(a.key, workload.MeshConfig{Egress: workload.GuardAudit}); err != nil {
		t.Fatal(err)
	}
	counts(0, counted{bpfmap.EgressSocketAudited: 2})
	if err := os.Remove(hidden); err != nil {
		t.Fatal(err)
	}
	test.Eventually(t, func() error { // the kernel detaches it some time after its last pin went
		if got := a.rose(attacks)[bpfmap.EgressSocketAudited]; got != 1 {
			return fmt.Errorf("counted %d times, want once", got)
		}
		return nil
	}, "the hidden program to be gone")
}

// A packet socket that is older than enforce is told for as long as it is there, with who
// has it, unless its UID is excluded.
func TestEgressTellsOlderPacketSockets(t *testing.T) {
	if err := probe.Families(); err != nil {
		t.Logf("this kernel has the problem families-open instead: %v", err)
		return
	}
	for name, excluded := range map[string][]uint32{"a task's": nil, "of an excluded UID": {0}} {
		t.Run(name, func(t *testing.T) {
			a := egressGuarded(t, workload.GuardOff, func(r *workload.Request) { r.ExcludeUIDs = excluded })
			p := a.attacker(t)
			var errno syscall.Errno
			if err := p.Call(attack{Way: "packet, kept"}, &errno); err != nil || errno != 0 {
				t.Fatalf("open a packet socket: %v, %s", err, errnoName(errno))
			}
			for _, egress := range []workload.Guard{workload.GuardOff, workload.GuardAudit, workload.GuardEnforce} {
				if err := a.node.SetMeshConfig(a.key, workload.MeshConfig{Egress: egress}); err != nil {
					t.Fatal(err)
				}
				holder := fmt.Sprintf("process %d (", p.PID)
				if err := a.packetSocketTold(holder, egress == workload.GuardEnforce && excluded == nil); err != nil {
					t.Errorf("%s: %v", egress, err)
				}
			}
			p.Stop()
			test.Eventually(t, func() error { return a.packetSocketTold("", false) }, "the problem to end with the socket")
		})
	}
}

// packetSocketTold is an error unless the allocation has the problem, with that in its
// text, just where it should.
func (a *alloc) packetSocketTold(text string, want bool) error {
	list, err := a.node.Workloads()
	if err != nil || len(list) != 1 {
		return errors.Join(err, fmt.Errorf("%d workloads", len(list)))
	}
	told := slices.ContainsFunc(list[0].Problems, func(p health.Problem) bool {
		return p.Code == health.ProblemPacketSocketOpen.String() && strings.Contains(p.What, text)
	})
	if told != want {
		return fmt.Errorf("problems %v, one that names %q: %t, want %t", list[0].Problems, text, told, want)
	}
	return nil
}
