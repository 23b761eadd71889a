// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// addrProgram makes a program for a hook that sees an address.
func addrProgram(t *testing.T, name string, hook ebpf.AttachType, code asm.Instructions) *ebpf.Program {
	t.Helper()
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: ebpf.CGroupSockAddr, AttachType: hook, License: "GPL", Instructions: code})
	if err != nil {
		t.Fatalf("load %s: %v", name, err)
	}
	t.Cleanup(func() { prog.Close() })
	return prog
}

func programID(t *testing.T, prog *ebpf.Program) ebpf.ProgramID {
	t.Helper()
	info, err := prog.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	return id
}

// The fields of struct bpf_sock_addr.
const (
	userIP4  = 4
	userIP6  = 8
	userPort = 24
)

// balances is what a load balancer at the socket does: who dials the service's address
// reaches a backend.
func balances(service, backend netip.AddrPort) asm.Instructions {
	field := int16(userIP4)
	if service.Addr().Is6() {
		field = userIP6
	}
	at, to := service.Addr().AsSlice(), backend.Addr().AsSlice()
	port := func(p uint16) int32 { return int32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, p))) }
	code := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, userPort, asm.Word),
		asm.JNE.Imm(asm.R2, port(service.Port()), "out"),
	}
	for i := 0; i < len(at); i += 4 {
		code = append(code,
			asm.LoadMem(asm.R2, asm.R1, field+int16(i), asm.Word),
			asm.JNE.Imm32(asm.R2, int32(binary.NativeEndian.Uint32(at[i:])), "out"))
	}
	for i := 0; i < len(to); i += 4 {
		code = append(code, asm.Mov.Imm32(asm.R2, int32(binary.NativeEndian.Uint32(to[i:]))), asm.StoreMem(asm.R1, field+int16(i), asm.R2, asm.Word))
	}
	return append(code,
		asm.Mov.Imm(asm.R2, port(backend.Port())), asm.StoreMem(asm.R1, userPort, asm.R2, asm.Word),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("out"), asm.Return())
}

// balancer is a load balancer of Cilium's kind: programs at connect4 and connect6 of the
// root, which take a service's address for a backend's.
type balancer struct{ service, backend [2]netip.AddrPort }

func newBalancer(t *testing.T) *balancer {
	t.Helper()
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	b := &balancer{
		service: [2]netip.AddrPort{netip.MustParseAddrPort("10.96.0.10:80"), netip.MustParseAddrPort("[fd96::10]:80")},
		backend: [2]netip.AddrPort{netip.AddrPortFrom(remote4(1), 8080), netip.AddrPortFrom(remote6(1), 8080)},
	}
	for i, hook := range []ebpf.AttachType{ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect} {
		prog := addrProgram(t, "sock_connect", hook, balances(b.service[i], b.backend[i]))
		attached, err := link.AttachCgroup(link.CgroupOptions{Path: test.CgroupRoot(t), Attach: hook, Program: prog})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { attached.Close() })
	}
	return b
}

// A load balancer at the socket works beside Weir, whichever was first: what it does for
// others and for the proxy stays, and what the mesh takes reaches the proxy, with the
// backend as its origin where the balancer runs first, else with the service.
func TestServiceLoadBalancerBesideWeir(t *testing.T) {
	for _, first := range []bool{true, false} {
		t.Run(fmt.Sprintf("first %t", first), func(t *testing.T) {
			var b *balancer
			if first {
				b = newBalancer(t)
			}
			n := newNode(t)
			if !first {
				b = newBalancer(t)
			}
			a, outside := n.newAlloc(), n.newAlloc()
			a.add()
			a.startProxy()
			server := test.Echo(t, n.remote, "tcp", "[::]:8080")
			for i, network := range []string{"tcp4", "tcp"} {
				origin := b.service[i]
				if first {
					origin = b.backend[i]
				}
				answer, err := a.ask(network, b.service[i].String())
				if err != nil || answer.Server != a.outbound.Name || answer.Origin != origin || answer.To != origin {
					t.Errorf("a task that dials %s: %+v, %v; want the proxy, and %s as origin and peer", b.service[i], answer, err, origin)
				}
				answer, err = a.askAs(proxyUID, a.proxyCg, network, b.service[i].String())
				if err != nil || answer.Server != server.Name || answer.Local != b.backend[i] {
					t.Errorf("the proxy that dials %s: %+v, %v; want the backend %s", b.service[i], answer, err, b.backend[i])
				}
			}
			answer, err := outside.ask("tcp4", b.service[0].String())
			if err != nil || answer.Server != server.Name || answer.Local != b.backend[0] {
				t.Errorf("a task outside of the mesh that dials %s: %+v, %v; want the backend %s", b.service[0], answer, err, b.backend[0])
			}
			a.works()
			healthy(t, n.Datapath)
		})
	}
}

// attachExclusively attaches a program that lets everything pass, without
// BPF_F_ALLOW_MULTI: nobody else may have that hook of the cgroup.
func attachExclusively(t *testing.T, cgroup string, flags uint32) (id ebpf.ProgramID, err error) {
	t.Helper()
	prog := addrProgram(t, "exclusive", ebpf.AttachCGroupInet4Connect, asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()})
	dir, err := os.Open(cgroup)
	if err != nil {
		t.Fatal(err)
	}
	target := link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: prog, Attach: ebpf.AttachCGroupInet4Connect, Flags: flags}
	t.Cleanup(func() {
		_ = link.RawDetachProgram(link.RawDetachProgramOptions{Target: target.Target, Program: prog, Attach: target.Attach}) // else it is gone
		dir.Close()
	})
	return programID(t, prog), link.RawAttachProgram(target)
}

// Who holds a hook of the root for itself keeps Weir off the node: that is told with the
// program and with what to do, nothing of Weir is left, and once it is gone all works.
func TestExclusiveHookAtTheRootIsNamed(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF, test.Tool("bpftool"))
	for name, flags := range map[string]uint32{"exclusive": 0, "may be overridden": unix.BPF_F_ALLOW_OVERRIDE} {
		t.Run(name, func(t *testing.T) {
			root := test.NewCgroup(t)
			id, err := attachExclusively(t, root.Path, flags)
			if err != nil {
				t.Fatal(err)
			}
			d := New(store.Paths{PinDir: filepath.Join(test.BPFFS(t), "weir"), StateDir: filepath.Join(t.TempDir(), "state"), CgroupRoot: root.Path})
			t.Cleanup(func() {
				if _, err := d.Unload(); err != nil {
					t.Errorf("unload: %v", err)
				}
			})
			remedy := fmt.Sprintf("bpftool cgroup detach %s connect4 id %d", root.Path, id)
			_, err = d.Load()
			if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), fmt.Sprintf("exclusive (ID %d)", id)) || !strings.Contains(err.Error(), remedy) {
				t.Errorf("load: %v; want it to name program %d and to say %q", err, id, remedy)
			}
			status, err := d.Status()
			if err != nil || status.Loaded {
				t.Errorf("status: %+v, %v; want nothing loaded", status, err)
			}
			told := false
			for _, check := range d.HookReadiness() {
				if strings.Contains(check.What, fmt.Sprintf("exclusive (ID %d)", id)) {
					told = check.Result == health.ResultFault && check.Code == "exclusive-program" && strings.Contains(check.Remedy, remedy)
				}
			}
			if !told {
				t.Errorf("checks %+v; want a fault that names program %d and says %q", d.HookReadiness(), id, remedy)
			}
			if out, err := exec.Command("sh", "-c", remedy).CombinedOutput(); err != nil {
				t.Errorf("%s: %v: %s", remedy, err, out)
			}
			if _, err := d.Load(); err != nil {
				t.Errorf("load once it is gone: %v", err)
			}
		})
	}
}

// Beside Weir at the root nobody gets a hook for itself there. Below, in the cgroup of a
// task, a hook of its own does not keep Weir's from running.
func TestExclusiveHookBesideWeir(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	a.startProxy()
	if _, err := attachExclusively(t, test.CgroupRoot(t), 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("a program that wants a hook of the root for itself: %v, want EPERM", err)
	}
	if _, err := attachExclusively(t, a.taskCg.Path, 0); err != nil {
		t.Fatal(err)
	}
	a.works()
	healthy(t, n.Datapath)
}
