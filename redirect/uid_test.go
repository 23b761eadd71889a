// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"testing"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// The UID that decides is that of iptables' --uid-owner: the file-system UID,
// which follows the effective one, of whoever opened the socket.
func TestUIDIsThatOfTheSocket(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	const excluded, saved = 2000, 0
	a.add(func(r *workload.Request) { r.ExcludeUIDs = []uint32{excluded} })
	remote := test.Echo(t, n.remote, "tcp", "[::]:8080")
	a.startProxy()
	for _, tc := range []struct {
		name   string
		cgroup *test.Cgroup
		open   func(s script, protocol int) script
		want   bpfmap.Verdict
	}{
		{"real UID excluded, effective not", a.taskCg, func(s script, protocol int) script {
			return s.users(excluded, taskUID, saved).open(unix.AF_INET6, protocol)
		}, bpfmap.Redirected},
		{"effective UID excluded, real not", a.taskCg, func(s script, protocol int) script {
			return s.users(taskUID, excluded, saved).open(unix.AF_INET6, protocol)
		}, bpfmap.UIDExcluded},
		{"opened under an excluded UID", a.taskCg, func(s script, protocol int) script {
			return s.users(-1, excluded, saved).open(unix.AF_INET6, protocol).users(-1, 0, saved).users(taskUID, taskUID, taskUID)
		}, bpfmap.UIDExcluded},
		{"opened before an excluded UID was taken", a.taskCg, func(s script, protocol int) script {
			return s.users(-1, taskUID, saved).open(unix.AF_INET6, protocol).users(-1, 0, saved).users(excluded, excluded, excluded)
		}, bpfmap.Redirected},
		{"real UID the proxy's, effective not", a.proxyCg, func(s script, protocol int) script {
			return s.users(proxyUID, taskUID, saved).open(unix.AF_INET6, protocol)
		}, bpfmap.Redirected},
		{"effective UID the proxy's, real not", a.proxyCg, func(s script, protocol int) script {
			return s.users(taskUID, proxyUID, saved).open(unix.AF_INET6, protocol)
		}, bpfmap.Proxy},
		{"the proxy's, in a task's cgroup", a.taskCg, func(s script, protocol int) script {
			return s.users(-1, proxyUID, saved).open(unix.AF_INET6, protocol)
		}, bpfmap.Redirected},
	} {
		for _, protocol := range []int{unix.IPPROTO_TCP, unix.IPPROTO_MPTCP} {
			t.Run(fmt.Sprint(tc.name, " protocol ", protocol), func(t *testing.T) {
				p := a.actor(t, 0, tc.cgroup)
				a.moves(t, map[bpfmap.Verdict]uint64{tc.want: 1}, func() {
					got := p.last(t, tc.open(nil, protocol).connect(addrPort(remote4(a.number), 8080)).ask("")).Answer
					server := remote.Name
					if tc.want == bpfmap.Redirected {
						server = a.outbound.Name
					}
					if got.Server != server {
						t.Errorf("%q answered, want %q", got.Server, server)
					}
				})
			})
		}
	}
}

// A listener is the proxy's by the UID that opened it.
func TestListenerByEffectiveUID(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add()
	for _, tc := range []struct {
		name            string
		real, effective int
		want            bpfmap.Verdict
	}{
		{"real UID the proxy's", proxyUID, taskUID, bpfmap.RefusedListenerIdentity},
		{"effective UID the proxy's", taskUID, proxyUID, bpfmap.Listener},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := a.actor(t, 0, a.proxyCg)
			a.moves(t, map[bpfmap.Verdict]uint64{tc.want: 1}, func() {
				p.run(t, script(nil).users(tc.real, tc.effective, 0).open(unix.AF_INET, unix.IPPROTO_TCP).
					bind("127.0.0.1:15001").listen())
			})
			p.Stop()
		})
	}
}

// io_uring works under the UID of who submits, also where a thread of the kernel
// does it.
func TestUIDByIOUring(t *testing.T) {
	test.Need(t, test.IOUring)
	n := newNode(t)
	a := n.newAlloc()
	const excluded = 2000
	a.add(func(r *workload.Request) { r.ExcludeUIDs = []uint32{excluded} })
	test.Echo(t, n.remote, "tcp", "[::]:8080")
	a.startProxy()
	for _, how := range []string{"connectByRing", "connectByWorker", "connectByThread"} {
		p := a.actor(t, 0, a.taskCg)
		a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.UIDExcluded: 1}, func() {
			p.run(t, script(nil).users(taskUID, excluded, 0).open(unix.AF_INET, unix.IPPROTO_TCP).to(how, addrPort(remote4(a.number), 8080)))
		})
		a.moves(t, map[bpfmap.Verdict]uint64{bpfmap.Redirected: 1}, func() {
			p.run(t, script(nil).users(-1, 0, 0).users(excluded, taskUID, 0).open(unix.AF_INET, unix.IPPROTO_TCP).to(how, addrPort(remote4(a.number), 8080)))
		})
	}
}
