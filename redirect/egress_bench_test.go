// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// BenchmarkEgress is what UDP costs a task in each mode of the egress guard: connect to
// a port that is excluded, send there, and send and receive by loopback; and what a TCP
// connection to the proxy costs, from socket to close. "none" is a namespace that is not
// under Weir, where the same listener is dialled by its own address. "cpu-ns/op" is the
// CPU time of who sends, which a busy machine leaves as it is.
func BenchmarkEgress(b *testing.B) {
	for _, mode := range []workload.Guard{"none", workload.GuardOff, workload.GuardAudit, workload.GuardEnforce} {
		b.Run(string(mode), func(b *testing.B) {
			d := newDatapath(b)
			a := benchmarkWorkload(b)
			a.Request.ExcludeOutboundPorts = []uint16{9}
			if mode != "none" {
				a.Request.Egress = mode
				if err := d.Add(a); err != nil {
					b.Fatal(err)
				}
			}
			handle, err := netns.GetFromPath(a.NetNS)
			if err != nil {
				b.Fatal(err)
			}
			defer handle.Close()
			listenAsProxy(b, handle)
			excluded := excludedPeer()
			var mesh unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte{10, 210, 0, 8}, Port: 80}
			if mode == "none" {
				mesh = &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: outboundPort}
			}
			for name, action := range map[string]func(fd int, own unix.Sockaddr) error{
				"connect": func(fd int, _ unix.Sockaddr) error { return unix.Connect(fd, excluded) },
				"send":    func(fd int, _ unix.Sockaddr) error { return unix.Sendto(fd, []byte(marker), 0, excluded) },
				"receive": func(fd int, own unix.Sockaddr) error {
					if err := unix.Sendto(fd, []byte(marker), 0, own); err != nil {
						return err
					}
					_, _, err := unix.Recvfrom(fd, make([]byte, len(marker)), 0)
					return err
				},
				"tcp": func(int, unix.Sockaddr) error {
					return socketOf(unix.AF_INET, unix.SOCK_STREAM, 0, func(fd int) error {
						if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_SNDTIMEO, &unix.Timeval{Sec: scriptPatience}); err != nil {
							return err
						}
						if err := unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}); err != nil {
							return err // else the ports of connections that are over run out
						}
						return finishConnect(fd, unix.Connect(fd, mesh), unix.EINTR)
					})
				},
			} {
				b.Run(name, func(b *testing.B) { benchmarkSocket(b, handle, name == "receive", action) })
			}
			if mode != "none" {
				if err := d.Remove(a.Key); err != nil {
					b.Error(err)
				}
			}
		})
	}
}

func excludedPeer() *unix.SockaddrInet4 {
	return &unix.SockaddrInet4{Addr: [4]byte{10, 210, 0, 9}, Port: 9}
}

// listenAsProxy accepts connections in the namespace as the proxy would, and closes them.
func listenAsProxy(b *testing.B, handle netns.NsHandle) {
	b.Helper()
	fd := make(chan int)
	go func() {
		runtime.LockOSThread() // and the thread ends with it
		defer close(fd)
		if netns.Set(handle) != nil {
			return
		}
		if err := unix.Setfsuid(proxyUID); err != nil {
			return
		}
		listener, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil && unix.Bind(listener, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}, Port: outboundPort}) == nil && unix.Listen(listener, 128) == nil {
			fd <- listener
			for {
				accepted, _, err := unix.Accept4(listener, unix.SOCK_CLOEXEC)
				if err == unix.EINVAL || err == unix.EBADF { // the listener is shut down
					return
				}
				if err == nil {
					unix.Close(accepted)
				}
			}
		}
	}()
	listener, listens := <-fd
	if !listens {
		b.Fatal("the proxy does not listen")
	}
	b.Cleanup(func() {
		if err := unix.Shutdown(listener, unix.SHUT_RDWR); err != nil { // ends the accept
			b.Error(err)
		}
		unix.Close(listener)
	})
}

// benchmarkSocket does something again and again with one socket of UDP of a namespace.
func benchmarkSocket(b *testing.B, handle netns.NsHandle, bound bool, action func(fd int, own unix.Sockaddr) error) {
	runtime.LockOSThread() // and the thread ends with it
	if err := netns.Set(handle); err != nil {
		b.Fatal(err)
	}
	device, err := netlink.LinkByName("eth0")
	if err == nil { // the peer need not be asked for
		err = netlink.NeighSet(&netlink.Neigh{LinkIndex: device.Attrs().Index, State: netlink.NUD_PERMANENT, IP: excludedPeer().Addr[:], HardwareAddr: []byte{2, 0, 0, 0, 0, 9}})
	}
	if err != nil {
		b.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	var own unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}
	if bound {
		if err := unix.Bind(fd, own); err != nil {
			b.Fatal(err)
		}
	}
	if own, err = unix.Getsockname(fd); err != nil {
		b.Fatal(err)
	}
	before := threadTime(b)
	for b.Loop() {
		if err := action(fd, own); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(threadTime(b)-before)/float64(b.N), "cpu-ns/op")
}

// threadTime is the CPU time of the calling thread so far, in nanoseconds.
func threadTime(b *testing.B) int64 {
	b.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &now); err != nil {
		b.Fatal(err)
	}
	return now.Nano()
}
