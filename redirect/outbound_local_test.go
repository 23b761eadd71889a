// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/test"
)

// linkLocal waits for the allocation's link-local address.
func (a *alloc) linkLocal() (found netip.Addr) {
	a.node.t.Helper()
	test.Eventually(a.node.t, func() (err error) {
		a.Do(func() {
			var device *net.Interface
			if device, err = net.InterfaceByName("eth0"); err != nil {
				return
			}
			var addrs []net.Addr
			addrs, err = device.Addrs()
			for _, addr := range addrs {
				if prefix, _ := netip.ParsePrefix(addr.String()); prefix.Addr().IsLinkLocalUnicast() {
					found = prefix.Addr()
				}
			}
		})
		if err == nil && !found.IsValid() {
			err = fmt.Errorf("eth0 has no link-local address yet")
		}
		return err
	}, "a link-local address")
	return found
}

// TestOutboundOwnLinkLocal dials an address that no request names.
func TestOutboundOwnLinkLocal(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	own := a.linkLocal()
	a.add()
	a.startProxy()
	app := a.serve(taskUID, a.taskCg, "tcp6", "[::]:8080")
	moved := a.rose(func() {
		var answer test.Answer
		test.Eventually(t, func() (err error) {
			// While duplicates are looked for the kernel has no such address.
			answer, err = a.ask("tcp6", netip.AddrPortFrom(own.WithZone("eth0"), 8080).String())
			return err
		}, "the own link-local address to answer")
		if answer.Server != app.Name {
			t.Errorf("%s answered, want the application", answer.Server)
		}
	})
	if diff := cmp.Diff([]bpfmap.Verdict{bpfmap.Local}, verdictsOf(moved)); diff != "" {
		t.Errorf("verdicts (-want +got):\n%s", diff)
	}
}

func verdictsOf(counts map[bpfmap.Verdict]uint64) (list []bpfmap.Verdict) {
	for _, verdict := range bpfmap.AllVerdicts() {
		if counts[verdict] > 0 {
			list = append(list, verdict)
		}
	}
	return list
}
