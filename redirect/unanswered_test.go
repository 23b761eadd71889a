// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// The kernel asks weir_getsockopt about the sockets of the cgroup that made them, and
// those below. A proxy made elsewhere is told of no origin, or, where conntrack has the
// connection, of the encoded address: neither leads past the mesh, and no connection
// gets to where it was meant for. So the program is attached for all (docs/adr/0013).
func TestOriginsOfAProxyElsewhere(t *testing.T) {
	for _, tracked := range []bool{false, true} {
		t.Run(fmt.Sprintf("conntrack %t", tracked), func(t *testing.T) {
			a := proxiedAlloc(t)
			if tracked {
				trackConnections(t, a.NetNS)
			}
			proxy := a.actor(t, proxyUID, a.proxyCg)
			origin := netip.AddrPortFrom(remote4(a.number), 4321)
			prog := programOf(t, a.node.Paths().Link("weir_getsockopt"))
			detachPinned(t, a.node.Paths().Link("weir_getsockopt"))

			narrowed := attachGetsockopt(t, prog, a.proxyCg)
			a.works()
			if err := narrowed.Close(); err != nil {
				t.Fatal(err)
			}
			attachGetsockopt(t, prog, a.taskCg)
			answer, err := a.ask("tcp", origin.String())
			if err != nil || answer.Server != a.outbound.Name {
				t.Fatalf("dial %s: %+v, %v; want the proxy", origin, answer, err)
			}
			encoded, _ := workload.EncodedAddrs(bpfmap.IndexFirst)
			want := test.Reply{Server: a.outbound.Name, Peer: answer.Peer, Local: netip.AddrPortFrom(encoded, origin.Port())}
			if tracked {
				want.Origin = want.Local
			}
			if answer.Reply != want {
				t.Errorf("the proxy knows %+v, want %+v", answer.Reply, want)
			}
			a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.RefusedEncoded: 1}, func() {
				proxy.run(t, stream(unix.AF_INET).connect(answer.Local.String()).fails(unix.ECONNREFUSED))
			})
		})
	}
}

// programOf is the program behind a pinned link.
func programOf(t *testing.T, pin string) *ebpf.Program {
	t.Helper()
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(linkIDs(t, pin)[1]))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { prog.Close() })
	return prog
}

func attachGetsockopt(t *testing.T, prog *ebpf.Program, group *test.Cgroup) link.Link {
	t.Helper()
	attached, err := link.AttachCgroup(link.CgroupOptions{Path: group.Path, Attach: ebpf.AttachCGroupGetsockopt, Program: prog})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { attached.Close() })
	return attached
}

// trackConnections has conntrack see what the namespace sends and gets.
func trackConnections(t *testing.T, ns *test.NetNS) {
	t.Helper()
	ns.Do(func() {
		conn, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		table := conn.AddTable(&nftables.Table{Name: "tracked", Family: nftables.TableFamilyIPv4})
		chain := conn.AddChain(&nftables.Chain{
			Name: "output", Table: table, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter,
		})
		conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Ct{Register: 1, Key: expr.CtKeySTATE}}})
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
	})
}
