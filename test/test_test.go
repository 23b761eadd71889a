// SPDX-License-Identifier: MPL-2.0

package test_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test"
)

// recorder stands in for a test that is told to skip or to fail.
type recorder struct {
	testing.TB
	skipped, failed string
}

func (r *recorder) Helper()                           {}
func (r *recorder) Skipf(format string, args ...any)  { r.skipped = format }
func (r *recorder) Fatalf(format string, args ...any) { r.failed = format }

func TestNeedSkipsButFailsInCI(t *testing.T) {
	missing := test.Tool("weir-no-such-tool")
	t.Setenv("CI", "")
	r := &recorder{TB: t}
	test.Need(r, missing)
	if r.skipped == "" || r.failed != "" {
		t.Errorf("outside of CI: skipped %q, failed %q; want a skip", r.skipped, r.failed)
	}
	t.Setenv("CI", "true")
	r = &recorder{TB: t}
	test.Need(r, missing)
	if r.skipped != "" || r.failed == "" {
		t.Errorf("in CI: skipped %q, failed %q; want a failure", r.skipped, r.failed)
	}
	r = &recorder{TB: t}
	test.Need(r, test.Tool("sh"))
	if r.skipped != "" || r.failed != "" {
		t.Errorf("with the tool: skipped %q, failed %q; want neither", r.skipped, r.failed)
	}
}

func TestScale(t *testing.T) {
	for _, tc := range []struct {
		scale   string
		n, want int
	}{
		{"", 3000, 3000},
		{"1", 3000, 3000},
		{"0.01", 3000, 30},
		{"0.01", 20, 1},
		{"no number", 20, 20},
		{"-1", 20, 20},
	} {
		t.Setenv("WEIR_TEST_SCALE", tc.scale)
		if got := test.Scale(tc.n); got != tc.want {
			t.Errorf("Scale(%d) with %q = %d, want %d", tc.n, tc.scale, got, tc.want)
		}
	}
}

func TestEventuallyWaitsForTheCheck(t *testing.T) {
	calls := 0
	test.Eventually(t, func() error {
		if calls++; calls < 3 {
			return errors.New("not yet")
		}
		return nil
	}, "third call")
	if calls != 3 {
		t.Errorf("check was called %d times, want 3", calls)
	}
}

func TestCgroupIsMadeAndRemovedWithItsProcesses(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2)
	ns := test.NewNetNS(t)
	var path string
	t.Run("use", func(t *testing.T) {
		cgroup := test.NewCgroup(t)
		path = cgroup.Path
		var stat unix.Stat_t
		if err := unix.Stat(path, &stat); err != nil {
			t.Fatal(err)
		}
		if cgroup.ID == 0 || cgroup.ID != stat.Ino {
			t.Errorf("cgroup ID = %d, want the inode number %d", cgroup.ID, stat.Ino)
		}
		test.Helper(t, test.Spec{NetNS: ns, Cgroup: cgroup}, "whoami")
	})
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("cgroup after its test: %v, want it gone", err)
	}
}

func TestBPFFSIsMountedAndUnmounted(t *testing.T) {
	test.Need(t, test.Root, test.BPF)
	var dir string
	t.Run("use", func(t *testing.T) {
		dir = test.BPFFS(t)
		var stat unix.Statfs_t
		if err := unix.Statfs(dir, &stat); err != nil {
			t.Fatal(err)
		}
		if stat.Type != unix.BPF_FS_MAGIC {
			t.Errorf("filesystem type = %#x, want %#x", stat.Type, unix.BPF_FS_MAGIC)
		}
		if err := os.Mkdir(filepath.Join(dir, "pins"), 0o700); err != nil {
			t.Error(err)
		}
	})
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("bpffs after its test: %v, want it gone", err)
	}
}

func TestNetNSIsApartFromTheHost(t *testing.T) {
	test.Need(t, test.Root)
	host := threadNetNS(t)
	var path string
	t.Run("use", func(t *testing.T) {
		a, b := test.NewNetNS(t), test.NewNetNS(t)
		path = a.Path
		first, again, other := a.Cookie(), a.Cookie(), b.Cookie()
		if first == 0 || first != again || first == other {
			t.Errorf("cookies = %d, again %d, of another %d; want it stable and its own", first, again, other)
		}
		var inside string
		a.Do(func() { inside = threadNetNS(t) })
		if inside == host {
			t.Error("Do runs in the namespace of the host")
		}
	})
	if now := threadNetNS(t); now != host {
		t.Errorf("netns after Do = %s, want %s", now, host)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("netns after its test: %v, want it gone", err)
	}
}

func TestDoLeavesTheNetNSWhenItsFunctionExits(t *testing.T) {
	test.Need(t, test.Root)
	host := threadNetNS(t)
	ns := test.NewNetNS(t)
	func() {
		defer func() { _ = recover() }()
		ns.Do(func() { panic("on purpose") })
	}()
	if now := threadNetNS(t); now != host {
		t.Errorf("netns after a panic = %s, want %s", now, host)
	}
}

func TestBareNetNSHasLoopbackDown(t *testing.T) {
	test.Need(t, test.Root)
	bare := test.NewBareNetNS(t)
	test.Echo(t, bare, "tcp", "0.0.0.0:80")
	if err := test.DialErr(t, bare, "127.0.0.1:80"); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("dial loopback of a bare netns = %v, want ENETUNREACH", err)
	}
}

// pair returns two namespaces with addresses of both families on a veth pair.
func pair(t *testing.T) (client, server *test.NetNS) {
	t.Helper()
	client, server = test.NewNetNS(t), test.NewNetNS(t)
	test.Veth(t,
		test.VethEnd{NetNS: client, DefaultRoute: true, Addrs: []netip.Prefix{
			netip.MustParsePrefix("10.9.0.1/24"), netip.MustParsePrefix("fd09::1/64"),
		}},
		test.VethEnd{NetNS: server, Addrs: []netip.Prefix{
			netip.MustParsePrefix("10.9.0.2/24"), netip.MustParsePrefix("fd09::2/64"),
			netip.MustParsePrefix("192.0.2.7/32"), netip.MustParsePrefix("2001:db8::7/128"),
		}})
	return client, server
}

func TestEchoAnswersOverVeth(t *testing.T) {
	test.Need(t, test.Root)
	client, server := pair(t)
	for _, tc := range []struct{ network, listen, dial, from string }{
		{"tcp", "10.9.0.2:80", "10.9.0.2:80", "10.9.0.1"},
		{"tcp", "[::]:81", "10.9.0.2:81", "10.9.0.1"},
		{"tcp", "[::]:82", "[fd09::2]:82", "fd09::1"},
		{"tcp", "[::]:83", "192.0.2.7:83", "10.9.0.1"}, // by the default route
		{"udp", "10.9.0.2:53", "10.9.0.2:53", "10.9.0.1"},
		{"udp", "[::]:54", "192.0.2.7:54", "10.9.0.1"},
		{"udp", "[::]:55", "[2001:db8::7]:55", "fd09::1"},
		{"udp", "0.0.0.0:56", "192.0.2.7:56", "10.9.0.1"},
	} {
		t.Run(tc.network+" "+tc.dial+" at "+tc.listen, func(t *testing.T) {
			echo := test.Echo(t, server, tc.network, tc.listen)
			got, err := test.Ask(client, tc.network, tc.dial)
			if err != nil {
				t.Fatal(err)
			}
			dialled := netip.MustParseAddrPort(tc.dial)
			if got.Server != echo.Name || got.Local != dialled || got.To != dialled {
				t.Errorf("answer = %+v, want one of %s at %s", got, echo.Name, dialled)
			}
			if got.Peer != got.From || got.From.Addr() != netip.MustParseAddr(tc.from) {
				t.Errorf("server saw %s, client was %s, want both at %s", got.Peer, got.From, tc.from)
			}
			if got.Origin.IsValid() {
				t.Errorf("origin = %s without any redirect", got.Origin)
			}
		})
	}
}

func TestDialErrNamesARefusal(t *testing.T) {
	test.Need(t, test.Root)
	client, server := pair(t)
	if err := test.DialErr(t, client, "10.9.0.2:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial without a server = %v, want ECONNREFUSED", err)
	}
	test.Echo(t, server, "tcp", "10.9.0.2:80")
	if !test.CanDial(t, client, "10.9.0.2:80") {
		t.Error("cannot dial a server that listens")
	}
}

func TestEchoListenersAreNotMPTCP(t *testing.T) {
	test.Need(t, test.Root)
	ns := test.NewNetNS(t)
	test.Echo(t, ns, "tcp", "127.0.0.1:80")
	// This table counts the sockets of the namespace by protocol.
	var protocols []byte
	ns.Do(func() {
		var err error
		if protocols, err = os.ReadFile("/proc/thread-self/net/protocols"); err != nil {
			t.Fatal(err)
		}
	})
	for line := range strings.Lines(string(protocols)) {
		fields := strings.Fields(line)
		if fields[0] == "MPTCP" && fields[2] != "0" {
			t.Errorf("MPTCP sockets in the namespace: %s", fields[2])
		}
	}
}

func TestClientProcessesDialAtTheSameTime(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2)
	client, server := pair(t)
	cgroup := test.NewCgroup(t)
	echo := test.EchoProcess(t, test.Spec{NetNS: server, UID: 101}, "tcp", "10.9.0.2:8080")
	var done sync.WaitGroup
	for uid := range uint32(3) {
		dialler := test.NewClient(t, test.Spec{NetNS: client, Cgroup: cgroup, UID: uid})
		done.Go(func() {
			for range test.Scale(50) {
				got, err := dialler.Ask("tcp", "10.9.0.2:8080")
				if err != nil || got.Server != echo.Name {
					t.Errorf("ask as user %d = %+v, %v; want an answer of %s", uid, got, err, echo.Name)
					return
				}
			}
			if _, err := dialler.Ask("tcp", "10.9.0.2:1"); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("ask a closed port = %v, want ECONNREFUSED", err)
			}
		})
	}
	done.Wait()
}
