// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"syscall"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

const foreignFunc = "redirect.foreign"

// serveForeign answers with all that a process which Weir does not concern sees
// of its sockets, line by line. The lines have nothing in them that differs
// from one run to the next without Weir.
func serveForeign([]string) error {
	return test.Serve(func(where string) ([]string, error) {
		return observe(where), nil
	})
}

func observe(where string) []string {
	w := &watcher{where: where}
	w.dials()
	w.options()
	w.setOptions()
	w.datagrams()
	return w.lines
}

type watcher struct {
	where string
	lines []string
}

func (w *watcher) say(format string, args ...any) {
	w.lines = append(w.lines, fmt.Sprintf(format, args...))
}

// dials connects to places that Weir knows something of in other namespaces.
func (w *watcher) dials() {
	for _, addr := range []unix.Sockaddr{
		v4addr(127, 0, 0, 1, 7000), v4addr(127, 0, 0, 1, 7001), v4addr(127, 128, 0, 1, 7000), v4addr(127, 128, 0, 2, 7001),
		v4addr(127, 255, 255, 254, 80), v4addr(127, 128, 0, 0, 80), v4addr(0, 0, 0, 0, 7000), v4addr(127, 0, 0, 1, 53),
		v4addr(10, 9, 1, 1, 80), v4addr(240, 0, 0, 1, 80),
		&unix.SockaddrInet6{Addr: [16]byte{15: 1}, Port: 7000},
		&unix.SockaddrInet6{Addr: [16]byte{10: 0xff, 11: 0xff, 12: 127, 15: 1}, Port: 7000},
		&unix.SockaddrInet6{Addr: [16]byte{10: 0xff, 11: 0xff, 12: 127, 13: 128, 15: 1}, Port: 7000},
		&unix.SockaddrInet6{Addr: [16]byte{0xfd, 0x77, 0x65, 0x69, 0x72, 15: 1}, Port: 7000},
	} {
		family := unix.AF_INET
		if _, six := addr.(*unix.SockaddrInet6); six {
			family = unix.AF_INET6
		}
		if w.where == "host" && !loopback(addr) {
			continue // what the host does with it is not the test's to try
		}
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			w.say("socket: %v", err)
			continue
		}
		timeout := unix.Timeval{Sec: 1}
		_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout)
		err = finishConnect(fd, unix.Connect(fd, addr), unix.EINTR)
		peer, peerErr := unix.Getpeername(fd)
		local, localErr := unix.Getsockname(fd)
		if err != nil {
			local = nil // what a refused socket is called depends on whether a signal met its connect
		}
		w.say("connect %v: %v; getpeername %v %v; getsockname %v %v",
			shown(addr), err, shown(peer), peerErr, withoutPort(local), localErr)
		w.original(fmt.Sprintf("dialler of %v", shown(addr)), fd)
		unix.Close(fd)
	}
}

// options asks an accepted and a dialling socket for options, with buffers of
// many sizes.
func (w *watcher) options() {
	listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		w.say("socket: %v", err)
		return
	}
	defer unix.Close(listener)
	w.say("bind: %v", unix.Bind(listener, v4addr(127, 128, 7, 7, 0)))
	w.say("listen: %v", unix.Listen(listener, 8))
	timeout := unix.Timeval{Usec: 200_000} // where lo is down nobody comes
	_ = unix.SetsockoptTimeval(listener, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)
	_ = unix.SetsockoptTimeval(listener, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &timeout)
	name, err := unix.Getsockname(listener)
	if err != nil {
		w.say("getsockname: %v", err)
		return
	}
	dialler, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		w.say("socket: %v", err)
		return
	}
	defer unix.Close(dialler)
	w.say("connect to the listener: %v", finishConnect(dialler, unix.Connect(dialler, name), unix.EINTR))
	accepted, _, err := acceptedBy(listener)
	if err != nil {
		w.say("accept: %v", err)
		accepted = -1
	} else {
		defer unix.Close(accepted)
	}
	unixSocket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		w.say("socket: %v", err)
		return
	}
	defer unix.Close(unixSocket)
	for _, socket := range []struct {
		name string
		fd   int
	}{{"dialler", dialler}, {"accepted", accepted}, {"listener", listener}, {"unix", unixSocket}} {
		w.original(socket.name, socket.fd)
		for _, option := range []struct{ level, name int }{
			{unix.SOL_SOCKET, unix.SO_TYPE}, {unix.SOL_SOCKET, unix.SO_ERROR}, {unix.SOL_SOCKET, unix.SO_REUSEADDR},
			{unix.SOL_SOCKET, unix.SO_PEERCRED}, {unix.SOL_SOCKET, unix.SO_ATTACH_FILTER}, {unix.SOL_SOCKET, 80},
			{unix.SOL_SOCKET, 9999}, {unix.SOL_IP, unix.IP_TTL}, {unix.SOL_IP, unix.IP_OPTIONS}, {unix.SOL_IP, 9999},
			{unix.SOL_IPV6, unix.IPV6_V6ONLY}, {unix.SOL_TCP, unix.TCP_NODELAY}, {unix.SOL_TCP, unix.TCP_CONGESTION},
			{unix.SOL_TCP, 80}, {unix.SOL_UDP, 80}, {9999, 80}, {-1, -1},
		} {
			for _, size := range []int{0, 1, 4, 16, 64, 4095, 4096, 4097, 8192, 1 << 17} {
				w.say("%s option %d %d, %d bytes: %s", socket.name, option.level, option.name, size, askOption(socket.fd, option.level, option.name, size))
			}
		}
		for _, size := range []int{1, 8, 104, 4096, 5000, 70000} {
			// Its values are times; that it is answered, and how long, is not.
			w.say("%s TCP_INFO, %d bytes: %s", socket.name, size, length(socket.fd, unix.SOL_TCP, unix.TCP_INFO, size))
		}
	}
}

// setOptions sets options, those that Weir refuses in other namespaces among them,
// to values of many sizes, and reads them back.
func (w *watcher) setOptions() {
	const byCongestion = "reno\x00"
	for _, domain := range []int{unix.AF_INET, unix.AF_INET6, unix.AF_UNIX} {
		for _, option := range []struct {
			level, name int
			value       string
		}{
			{unix.SOL_IP, unix.IP_OPTIONS, string(looseRoute(netip.MustParseAddr("127.0.0.1")))},
			{unix.SOL_IP, unix.IP_OPTIONS, string(recordRoute())}, {unix.SOL_IP, unix.IP_TTL, "\x20"},
			{unix.SOL_IPV6, unix.IPV6_RTHDR, string(segmentRoute(netip.IPv6Loopback()))},
			{unix.SOL_IPV6, pktOptions2292, string(packetOptions(homeRoute(netip.IPv6Loopback())))},
			{unix.SOL_IPV6, unix.IPV6_UNICAST_HOPS, "\x20"}, {unix.SOL_TCP, unix.TCP_CONGESTION, byCongestion},
			{unix.SOL_SOCKET, unix.SO_RCVBUF, "\x00\x40"}, {unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, ""},
			{unix.SOL_IP, 9999, ""}, {9999, unix.IPV6_RTHDR, ""}, {-1, -1, ""},
		} {
			for _, size := range []int{0, 1, 4, 8, 32, 40, 64, 4095, 4096, 4097, 1 << 17} {
				fd, err := unix.Socket(domain, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					w.say("socket: %v", err)
					continue
				}
				value := make([]byte, size)
				copy(value, option.value)
				err = unix.SetsockoptString(fd, option.level, option.name, string(value))
				w.say("domain %d, set option %d %d, %d bytes: %v; reads %s", domain, option.level, option.name, size, err,
					askOption(fd, option.level, option.name, 64))
				unix.Close(fd)
			}
		}
	}
}

// original asks for SO_ORIGINAL_DST as a proxy does.
func (w *watcher) original(name string, fd int) {
	for _, level := range []int{unix.SOL_IP, unix.SOL_IPV6} {
		for _, size := range []int{0, 8, 16, 28, 128, 5000} {
			w.say("%s original destination %d, %d bytes: %s", name, level, size, askOption(fd, level, 80, size))
		}
	}
}

// datagrams asks a server on port 53, connected and not, and looks at who answers.
func (w *watcher) datagrams() {
	for _, connected := range []bool{true, false} {
		server, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			w.say("socket: %v", err)
			continue
		}
		client, err := unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			w.say("socket: %v", err)
			unix.Close(server)
			continue
		}
		timeout := unix.Timeval{Usec: 200_000}
		for _, fd := range []int{server, client} {
			_ = unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout)
		}
		w.say("bind to 127.0.0.9:53: %v", unix.Bind(server, v4addr(127, 0, 0, 9, 53)))
		mapped := &unix.SockaddrInet6{Addr: [16]byte{10: 0xff, 11: 0xff, 12: 127, 15: 9}, Port: 53}
		if connected {
			w.say("connect: %v", finishConnect(client, unix.Connect(client, mapped), unix.EINTR))
			_, err = unix.Write(client, []byte("?"))
		} else {
			err = unix.Sendto(client, []byte("?"), 0, mapped)
		}
		w.say("send: %v", err)
		buffer := make([]byte, 16)
		n, from, err := received(server, buffer)
		w.say("server got %q from %v: %v", buffer[:max(n, 0)], withoutPort(from), err)
		if err == nil {
			w.say("answer: %v", unix.Sendto(server, []byte("!"), 0, from))
			n, from, err = received(client, buffer)
			w.say("client got %q from %v: %v", buffer[:max(n, 0)], shown(from), err)
		}
		peer, err := unix.Getpeername(client)
		w.say("getpeername %v: %v", shown(peer), err)
		unix.Close(client)
		unix.Close(server)
	}
}

// rawGetsockopt is the system call, with the buffer filled and the length as it
// came back.
func rawGetsockopt(fd, level, name, size int) (buffer []byte, length uint32, errno syscall.Errno) {
	buffer = make([]byte, size+8)
	for i := range buffer {
		buffer[i] = 0xa5
	}
	length = uint32(size)
	_, _, errno = unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(&buffer[0])), uintptr(unsafe.Pointer(&length)), 0)
	return buffer, length, errno
}

func askOption(fd, level, name, size int) string {
	buffer, length, errno := rawGetsockopt(fd, level, name, size)
	written := len(buffer)
	for written > 0 && buffer[written-1] == 0xa5 {
		written--
	}
	return fmt.Sprintf("errno %d, length %d, %s", int(errno), length, hex.EncodeToString(buffer[:written]))
}

func length(fd, level, name, size int) string {
	_, length, errno := rawGetsockopt(fd, level, name, size)
	return fmt.Sprintf("errno %d, length %d", int(errno), length)
}

func v4addr(a, b, c, d byte, port int) *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Addr: [4]byte{a, b, c, d}, Port: port}
}

func loopback(addr unix.Sockaddr) bool {
	switch a := addr.(type) {
	case *unix.SockaddrInet4:
		return a.Addr[0] == 127
	case *unix.SockaddrInet6:
		return a.Addr == [16]byte{15: 1} || a.Addr[10] == 0xff && a.Addr[12] == 127
	}
	return false
}

func shown(addr unix.Sockaddr) string {
	switch a := addr.(type) {
	case *unix.SockaddrInet4:
		return fmt.Sprintf("%d:%d", a.Addr, a.Port)
	case *unix.SockaddrInet6:
		return fmt.Sprintf("%x:%d scope %d", a.Addr, a.Port, a.ZoneId)
	}
	return fmt.Sprint(addr)
}

func withoutPort(addr unix.Sockaddr) string {
	switch a := addr.(type) {
	case *unix.SockaddrInet4:
		return shown(&unix.SockaddrInet4{Addr: a.Addr})
	case *unix.SockaddrInet6:
		return shown(&unix.SockaddrInet6{Addr: a.Addr, ZoneId: a.ZoneId})
	}
	return fmt.Sprint(addr)
}

// Processes that Weir does not concern see the same, byte for byte, before it
// is loaded, while it redirects another namespace with the same addresses, and
// after it is gone.
func TestForeignProcessesSeeNoDifference(t *testing.T) {
	d := unloadedDatapath(t)
	n := &node{Datapath: d, t: t, remote: test.NewNetNS(t)}
	a := n.newAlloc()
	other := test.NewNetNS(t)
	test.Echo(t, other, "tcp", "[::]:7000")
	inside := func(ns *test.NetNS) func(t *testing.T) []string {
		return func(t *testing.T) (lines []string) {
			process := test.Helper(t, test.Spec{NetNS: ns}, foreignFunc)
			defer process.Stop()
			if err := process.Call("namespace", &lines); err != nil {
				t.Fatal(err)
			}
			return lines
		}
	}
	for _, tc := range []struct {
		name string
		look func(t *testing.T) []string
	}{
		{"another namespace", inside(other)},
		{"a bare namespace", inside(test.NewBareNetNS(t))},
		{"the host", func(*testing.T) []string { return observe("host") }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			look := func() []string { return tc.look(t) }
			without := look()
			if again := look(); cmp.Diff(without, again) != "" {
				t.Fatalf("two runs without Weir differ:\n%s", cmp.Diff(without, again))
			}
			t.Logf("%d observations", len(without))
			if _, err := n.Load(); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(without, look()); diff != "" {
				t.Errorf("Weir is loaded (-without +with):\n%s", diff)
			}
			a.add(full, func(r *workload.Request) { r.DNS = workload.DNS{Port: 8600} })
			a.startProxy()
			a.works()
			before := a.counts()
			if diff := cmp.Diff(without, look()); diff != "" {
				t.Errorf("Weir redirects another namespace (-without +with):\n%s", diff)
			}
			if diff := cmp.Diff(before, a.counts()); diff != "" {
				t.Errorf("a foreign process moved the workload's counters (-want +got):\n%s", diff)
			}
			a.outbound.Stop()
			a.inbound.Stop()
			if _, err := n.Unload(); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(without, look()); diff != "" {
				t.Errorf("Weir was unloaded (-without +after):\n%s", diff)
			}
		})
	}
}
