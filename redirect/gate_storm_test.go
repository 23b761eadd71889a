// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// The helper processes of the storm: who holds gates, and who dials.
const (
	gatesFunc = "redirect.gates"
	dialsFunc = "redirect.dials"
)

type gatesRequest struct {
	Paths store.Paths
	Keys  []workload.AttachmentID
}

// serveGates opens gates and holds them for as long as the process lives, as the agent
// does. Asked again without keys, it says how many connections wait.
func serveGates([]string) error {
	var gates []*Gate
	return test.Serve(func(r gatesRequest) (waiting int, err error) {
		d := New(r.Paths)
		for _, key := range r.Keys {
			gate, err := d.OpenGate(key)
			if err != nil {
				return 0, err
			}
			gates = append(gates, gate)
		}
		for _, gate := range gates {
			state, err := gate.Look()
			if err != nil {
				return 0, err
			}
			waiting += len(state.Waiting)
		}
		return waiting, nil
	})
}

// dialsRequest asks for dials at once; without a count, for what came of them.
type dialsRequest struct {
	To    netip.AddrPort
	Count int
	Limit time.Duration
}

// dialEnd is what came of one dial.
type dialEnd struct {
	Errno  syscall.Errno
	Answer test.Answer
	After  time.Duration // until it was known
}

func serveDials([]string) error {
	var sockets []int
	var began time.Time
	return test.Serve(func(r dialsRequest) (ends []dialEnd, err error) {
		if r.Count > 0 {
			began = time.Now()
			for range r.Count {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
				if err != nil {
					return nil, err
				}
				if err := unix.Connect(fd, sockaddr(fd, r.To)); !errors.Is(err, unix.EINPROGRESS) {
					return nil, fmt.Errorf("connect: %w", err)
				}
				sockets = append(sockets, fd)
			}
			return nil, nil
		}
		for _, fd := range sockets {
			var end dialEnd
			ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
			n, err := unix.Poll(ready, int(max(0, r.Limit-time.Since(began))/time.Millisecond))
			for errors.Is(err, unix.EINTR) {
				n, err = unix.Poll(ready, int(max(0, r.Limit-time.Since(began))/time.Millisecond))
			}
			end.After = time.Since(began)
			failure, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
			switch {
			case err != nil:
				return nil, err
			case n == 0:
				end.Errno = unix.ETIMEDOUT
			case failure != 0:
				end.Errno = syscall.Errno(failure)
			default:
				if err := unix.SetNonblock(fd, false); err != nil {
					return nil, err
				}
				var o outcome
				if err := readReply(fd, 0, &o); err != nil && !errors.As(err, &end.Errno) {
					end.Errno = unix.EIO
				}
				end.Answer = o.Answer
			}
			unix.Close(fd)
			ends = append(ends, end)
		}
		return ends, nil
	})
}

// A thousand connections wait in fifty allocations, and who holds their gates is killed.
// None waits longer than for its next attempts, and none reaches anything but the proxy:
// where one listens it is served, and elsewhere refused, though somebody listens at the
// address that was dialled.
func TestGateStorm(t *testing.T) {
	const each, limit = 20, 20 * time.Second
	n := newNode(t)
	count := max(4, test.Scale(50))
	var allocs []*alloc
	var keys []workload.AttachmentID
	for range count {
		a := n.newAlloc()
		a.add()
		allocs, keys = append(allocs, a), append(keys, a.key)
	}
	test.Echo(t, n.remote, "tcp", "[::]:8080") // what nobody is to reach
	aside := test.NewNetNS(t)
	gates := test.Helper(t, test.Spec{NetNS: aside}, gatesFunc)
	var waiting int
	if err := gates.Call(gatesRequest{Paths: n.Paths(), Keys: keys}, &waiting); err != nil {
		t.Fatal(err)
	}
	var tasks []*test.Process
	for _, a := range allocs {
		task := test.Helper(t, test.Spec{NetNS: a.NetNS, Cgroup: a.taskCg, UID: taskUID, GID: taskUID}, dialsFunc)
		tasks = append(tasks, task)
	}
	began := time.Now()
	for i, task := range tasks {
		if err := task.Call(dialsRequest{To: netip.AddrPortFrom(remote4(allocs[i].number), 8080), Count: each}, new([]dialEnd)); err != nil {
			t.Fatal(err)
		}
	}
	test.Eventually(t, func() error {
		if err := gates.Call(gatesRequest{Paths: n.Paths()}, &waiting); err != nil || waiting != each*count {
			return fmt.Errorf("%d wait, %w", waiting, err)
		}
		return nil
	}, "all connections to wait")
	t.Logf("%d connections wait in %d namespaces after %s", waiting, count, time.Since(began).Round(time.Millisecond))
	for _, a := range allocs[:count/2] {
		a.outbound = a.serve(proxyUID, a.proxyCg, "tcp4", fmt.Sprintf("127.0.0.1:%d", outboundPort))
	}
	gates.Stop()
	var longest time.Duration
	for i, task := range tasks {
		var ends []dialEnd
		if err := task.Call(dialsRequest{Limit: limit}, &ends); err != nil {
			t.Fatal(err)
		}
		if len(ends) != each {
			t.Fatalf("%d dials ended, want %d", len(ends), each)
		}
		a := allocs[i]
		for _, end := range ends {
			longest = max(longest, end.After)
			switch {
			case a.outbound == nil && end.Errno != unix.ECONNREFUSED:
				t.Errorf("allocation %d without a proxy: a dial ends with %s by %q, want it refused", i, errnoName(end.Errno), end.Answer.Server)
			case a.outbound != nil && (end.Errno != 0 || end.Answer.Server != a.outbound.Name):
				t.Errorf("allocation %d: a dial ends with %s by %q, want the proxy", i, errnoName(end.Errno), end.Answer.Server)
			}
		}
	}
	t.Logf("the longest ended after %s", longest.Round(time.Millisecond))
}
