// SPDX-License-Identifier: MPL-2.0

package envoy_test

import (
	"context"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/envoy"
	"github.com/weirmesh/weir/test/spawn"
)

func TestMain(m *testing.M) { test.Main(m, nil) }

// An Envoy passes an inbound connection on to the service, says so in its
// log, is gone after Stop, and can be started again in the same place.
func TestProxy(t *testing.T) {
	test.Need(t, test.Root)
	binary, err := envoy.Find()
	if err != nil {
		t.Fatal(err)
	}
	ns := test.NewNetNS(t)
	service := test.Echo(t, ns, "tcp4", "127.0.0.1:0")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	inbound := netip.MustParseAddrPort("127.0.0.1:20000")
	spec := envoy.Spec{
		Binary: binary,
		Config: envoy.Config{
			Outbound: netip.MustParseAddrPort("127.0.0.1:15001"),
			Inbound:  inbound,
			Service:  service.Addr,
			Routes: []envoy.Route{{
				Name: "upstream", Prefix: netip.MustParsePrefix("240.0.0.1/32"), Address: service.Addr,
			}},
			Admin: netip.MustParseAddrPort("127.0.0.2:19000"),
		},
		NetNS: ns.Path, Cgroup: test.NewCgroup(t).Path, UID: 101, Dir: reachableDir(t),
	}

	for round := range 2 {
		proxy, err := envoy.Start(ctx, spec)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := spawn.Dialer(ns.Path)(ctx, "tcp", inbound.String())
		if err != nil {
			t.Fatal(err)
		}
		source := netip.MustParseAddrPort(conn.LocalAddr().String())
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
		got, err := proxy.Await(ctx, round, 1)
		if err != nil {
			t.Fatal(err)
		}
		if len(got) == 1 {
			if got[0].From.Addr() != inbound.Addr() || got[0].From.Port() == 0 {
				t.Errorf("dialled the service from %s, want a port of %s", got[0].From, inbound.Addr())
			}
			got[0].From = netip.AddrPort{} // a port that the kernel chose
		}
		want := []envoy.Connection{{
			Listener: "inbound", Cluster: "service",
			Local: inbound, Remote: source, Direct: inbound, Upstream: service.Addr.String(), Flags: "-",
		}}
		if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
			t.Errorf("access log (-want +got):\n%s", diff)
		}
		if err := proxy.Stop(); err != nil {
			t.Fatal(err)
		}
		if conn, err := spawn.Dialer(ns.Path)(ctx, "tcp", inbound.String()); err == nil {
			conn.Close()
			t.Fatal("somebody still listens after Stop")
		}
	}
}

// reachableDir is a temporary directory that other users can reach.
func reachableDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(filepath.Dir(dir), 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}
