// SPDX-License-Identifier: MPL-2.0

// Package probe asks the kernel for each feature that the programs need.
package probe

import (
	"errors"
	"fmt"
	"strings"
	"unicode"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
)

// Requirement is one kernel feature, asked of the kernel itself: distributions
// carry features back, so a version number says nothing.
type Requirement struct {
	What     string // as the error names it
	Why      string
	Since    string // first mainline kernel that has it
	ProbeFor func() error
}

func helper(prog ebpf.ProgramType, fn asm.BuiltinFunc, why, since string) Requirement {
	return Requirement{
		What:  fmt.Sprintf("%s in programs of type %s", kernelName(fn), prog),
		Why:   why,
		Since: since,
		ProbeFor: func() error {
			err := features.HaveProgramHelper(prog, fn)
			var refused *ebpf.VerifierError
			// A kernel that knows the helper refuses what the probe calls it
			// with, since Linux 7 in words that the library does not know.
			if errors.As(err, &refused) && !errors.Is(err, ebpf.ErrNotSupported) {
				return nil
			}
			return err
		},
	}
}

// kernelName is a helper's name in bpf-helpers(7): FnGetNetnsCookie is bpf_get_netns_cookie.
func kernelName(fn asm.BuiltinFunc) string {
	name := "bpf"
	for _, letter := range strings.TrimPrefix(fn.String(), "Fn") {
		if unicode.IsUpper(letter) {
			name += "_"
		}
		name += string(unicode.ToLower(letter))
	}
	return name
}

func Requirements() []Requirement {
	const own = "to leave the sockets of foreign namespaces alone"
	return []Requirement{
		{"programs of type SkLookup", "to hand connections to the proxy's listener", "5.9",
			func() error { return features.HaveProgramType(ebpf.SkLookup) }},
		helper(ebpf.CGroupSockAddr, asm.FnGetNetnsCookie, own, "5.7"),
		helper(ebpf.CGroupSock, asm.FnGetNetnsCookie, own, "5.7"),
		helper(ebpf.CGroupSockopt, asm.FnGetNetnsCookie, own, "5.15"),
		helper(ebpf.SockOps, asm.FnGetNetnsCookie, own, "5.15"),
		helper(ebpf.CGroupSockAddr, asm.FnSetRetval, "to refuse a connection with a true errno", "5.18"),
		helper(ebpf.CGroupSockopt, asm.FnSetRetval, "to refuse a socket option with a true errno", "5.18"),
		helper(ebpf.CGroupSock, asm.FnSetRetval, "to refuse a bind with a true errno", "6.1"),
		helper(ebpf.CGroupSockAddr, asm.FnSkStorageGet, "to remember what a socket dialled", "5.3"),
		helper(ebpf.CGroupSock, asm.FnSkStorageGet, "to note who binds a socket", "5.7"),
		helper(ebpf.SockOps, asm.FnSkStorageGet, "to read who bound a listener", "5.3"),
		helper(ebpf.SockOps, asm.FnSockHashUpdate, "to register the proxy's listeners", "4.18"),
		helper(ebpf.CGroupSockAddr, asm.FnSkcToTcp6Sock, "to tell IPv6-only sockets", "5.9"),
		helper(ebpf.CGroupSockAddr, asm.FnSkcToTcpSock, "to see a socket's source route", "5.9"),
		helper(ebpf.CGroupSockAddr, asm.FnKtimeGetCoarseNs, "to date the use of an origin", "5.11"),
		helper(ebpf.CGroupSockAddr, asm.FnLoop, "to search for a free index", "5.17"),
		helper(ebpf.CGroupSockAddr, asm.FnRingbufReserve, "to report connections", "5.8"),
		{"ingress_ifindex in programs of type SkLookup", "to tell loopback from outside", "5.17", probeIngress},
		{"atomic operations with a result", "to hand out indexes", "5.12", probeAtomics},
	}
}

// Probe asks the running kernel for every feature that the programs need. It
// loads nothing that stays. The error wraps ErrUnsupported and names each
// missing feature, what it is for, and the first kernel that has it.
func Probe() error {
	return ProbeFor(Requirements())
}

func ProbeFor(needs []Requirement) error {
	var missing []error
	for _, need := range needs {
		err := need.ProbeFor()
		switch {
		case errors.Is(err, ebpf.ErrNotSupported):
			missing = append(missing, fmt.Errorf("%s, needed %s (Linux %s)", need.What, need.Why, need.Since))
		case err != nil:
			return fmt.Errorf("probe %s: %w", need.What, err)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("kernel lacks features, Weir needs Linux 6.1 or one that carries them: %w:\n%w", ErrUnsupported, errors.Join(missing...))
	}
	return nil
}

func probeProgram(spec *ebpf.ProgramSpec) error {
	spec.License = "GPL"
	prog, err := ebpf.NewProgram(spec)
	var verifier *ebpf.VerifierError
	if errors.As(err, &verifier) {
		return fmt.Errorf("%w: %s", ebpf.ErrNotSupported, verifier.Error())
	}
	if err != nil {
		return err
	}
	return prog.Close()
}

func probeIngress() error {
	const ingressIfindex = 64 // offset in struct bpf_sk_lookup
	return probeProgram(&ebpf.ProgramSpec{Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup, Instructions: asm.Instructions{
		asm.LoadMem(asm.R0, asm.R1, ingressIfindex, asm.Word),
		asm.Mov.Imm(asm.R0, 1),
		asm.Return(),
	}})
}

func probeAtomics() error {
	return probeProgram(&ebpf.ProgramSpec{Type: ebpf.SocketFilter, Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreMem(asm.RFP, -8, asm.R1, asm.DWord),
		asm.FetchAdd.Mem(asm.RFP, asm.R1, asm.DWord, -8),
		asm.Mov.Imm(asm.R0, 0),
		asm.Return(),
	}})
}

// Families asks the kernel whether a program may decide about sockets of other
// families than IP's, where they are made. Only the egress guard needs it, so a node
// without it is not refused.
func Families() error {
	return probeProgram(&ebpf.ProgramSpec{Type: ebpf.Tracing, AttachType: ebpf.AttachModifyReturn, AttachTo: "security_socket_create", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R0, 0),
		asm.Return(),
	}})
}

// ErrUnsupported: the kernel, or how the host mounts cgroups, lacks a feature.
var ErrUnsupported = errors.New("not supported by this host")
