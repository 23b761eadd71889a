// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"net/netip"
	"slices"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/test"
)

// remappedUID is Envoy's 101 outside of a container under Docker's userns-remap.
const remappedUID = 100101

// A listener that is not taken for the proxy's says whose it is: as it happens,
// and as long as it listens.
func TestRejectedListenerSaysWhoseItIs(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	reader := n.readEvents()
	remapped, task, proxy := a.sockets(remappedUID, a.proxyCg), a.sockets(taskUID, a.taskCg), a.sockets(proxyUID, a.proxyCg)
	var want []monitor.Event
	var listens []inspect.RejectedListener
	expect := func(s *sockets, uid uint32, cgroup *test.Cgroup, address string, verdict bpfmap.Verdict) {
		at := netip.MustParseAddrPort(address)
		want = append(want, monitor.Event{Cookie: a.Cookie(), Verdict: verdict, Name: verdict.String(), Origin: at, Destination: at,
			UID: uid, PID: uint32(s.PID), Cgroup: cgroup.ID, Command: command(t, s.PID)})
		listens = append(listens, inspect.RejectedListener{Address: at, UID: uid, PID: s.PID, Command: command(t, s.PID),
			Cgroup: cgroupPath(t, s.PID), Usable: verdict == bpfmap.RefusedListenerIdentity})
	}
	remapped.mustListen("envoy", outboundListener)
	expect(remapped, remappedUID, a.proxyCg, outboundListener, bpfmap.RefusedListenerIdentity)
	remapped.mustListen("envoy", "0.0.0.0:20000")
	expect(remapped, remappedUID, a.proxyCg, "0.0.0.0:20000", bpfmap.RefusedListenerIdentity)
	proxy.mustListen("elsewhere", "127.0.0.2:15001")
	expect(proxy, proxyUID, a.proxyCg, "127.0.0.2:15001", bpfmap.RefusedListenerAddress)
	task.mustListen("task", "[::1]:15001")
	expect(task, taskUID, a.taskCg, "[::1]:15001", bpfmap.RefusedListenerIdentity)
	task.mustListen("task", "127.0.0.1:8080") // not the proxy's port: nobody's business

	ports, list, err := n.RejectedListeners(a.key)
	if err != nil {
		t.Fatal(err)
	}
	equal := cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })
	byAddress := cmpopts.SortSlices(func(a, b inspect.RejectedListener) bool { return a.Address.Compare(b.Address) < 0 })
	if diff := cmp.Diff(listens, list, equal, byAddress); diff != "" {
		t.Errorf("rejected listeners (-want +got):\n%s", diff)
	}
	if ports.UID != proxyUID || !slices.Equal(ports.Missing, []uint16{15001, 20000}) {
		t.Errorf("ports of the proxy = %+v, want both of them missing", ports)
	}

	// Beside a living proxy a socket under its UID may not even bind there.
	for _, s := range []*sockets{remapped, proxy, task} {
		s.Stop()
	}
	a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", outboundListener)
	a.sockets(proxyUID, a.proxyCg).mustListen("proxy", "0.0.0.0:20000", reusePort())
	beside := a.sockets(proxyUID, a.taskCg)
	if _, err := beside.listen("beside", "127.0.0.1:20000", 0, reusePort()); err == nil {
		t.Error("a socket under the proxy's UID in another cgroup binds the proxy's port")
	}
	expect(beside, proxyUID, a.taskCg, "127.0.0.1:20000", bpfmap.RefusedListenerIdentity)
	if ports, list, err := n.RejectedListeners(a.key); err != nil || len(list) > 0 || len(ports.Missing) > 0 {
		t.Errorf("rejected listeners of a proxy that listens = %+v, %+v, %v", ports, list, err)
	}
	last := netip.MustParseAddrPort("192.0.2.1:80")
	_, _ = a.ask("tcp4", last.String())
	if diff := cmp.Diff(want, reader.until(last), equal, cmpopts.IgnoreFields(monitor.Event{}, "Time")); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	reader.end()
}

func cgroupPath(t *testing.T, pid int) string {
	t.Helper()
	path, _, err := host.CgroupOfProcess(strconv.Itoa(pid))
	if err != nil {
		t.Fatal(err)
	}
	return path
}
