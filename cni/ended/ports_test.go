// SPDX-License-Identifier: MPL-2.0

package ended

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/test"
)

// shadows are the host ports of the node's ended allocation that others have.
func (n *node) shadows() (list []Shadow) {
	n.t.Helper()
	n.host.Do(func() {
		found, err := n.Find()
		if err != nil {
			n.t.Error(err)
		}
		for _, a := range found {
			if a.Key == key {
				list = append(list, a.Shadows...)
			}
		}
	})
	return list
}

// An allocation that ended keeps its static port, and the one that has it now gets
// no connections: this is told as long as it is so, and "weir gc" ends it.
func TestPortOfARunningAllocation(t *testing.T) {
	for _, network := range []string{"weir", "weir-chained"} {
		t.Run(network, func(t *testing.T) {
			n := newNode(t, network)
			neighbour := test.NewNetNS(t)
			test.Veth(t, test.VethEnd{NetNS: neighbour, Name: "eth0", Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24")}},
				test.VethEnd{NetNS: n.host, Name: "outside", Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}})
			ask := func() error {
				_, err := test.Ask(neighbour, "tcp4", "192.0.2.1:18080")
				return err
			}
			if got := n.shadows(); len(got) > 0 {
				t.Errorf("shadows of the only allocation = %+v, want none", got)
			}

			const heir = "77aa00bb-7c0f-4d0e-9a51-2f6c8e1d0b02"
			alloc := test.NewBareNetNS(t)
			n.add(heir, alloc)
			if got := n.shadows(); len(got) > 0 {
				t.Errorf("shadows beside an allocation that does not run = %+v, want none", got)
			}
			task := test.EchoProcess(t, test.Spec{NetNS: alloc}, "tcp4", "0.0.0.0:8080")
			heirKey := redirect.Key{ContainerID: heir, IfName: "eth0"}
			want := []Shadow{{Port: 18080, Protocol: "tcp", By: &heirKey, Job: redirect.Job{AllocID: heir, ID: "demo", Group: "web"}}}
			if diff := cmp.Diff(want, n.shadows()); diff != "" {
				t.Errorf("shadows (-want +got):\n%s", diff)
			}
			n.alloc.End()
			if diff := cmp.Diff(want, n.shadows()); diff != "" {
				t.Errorf("shadows without a namespace (-want +got):\n%s", diff)
			}
			if err := ask(); err == nil {
				t.Error("the running allocation is reached: its port was to be shadowed")
			}
			if network == "weir" { // libcni forgot both: the records know
				results := filepath.Join(n.CacheDir, "results")
				if err := os.Rename(results, results+".away"); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, n.shadows()); diff != "" {
					t.Errorf("shadows by records alone (-want +got):\n%s", diff)
				}
				if err := os.Rename(results+".away", results); err != nil {
					t.Fatal(err)
				}
			}
			if err := n.remove(Attachment{Key: key}); err != nil {
				t.Fatal(err)
			}
			if got := n.shadows(); len(got) > 0 {
				t.Errorf("shadows after the removal = %+v, want none", got)
			}
			// It is transparent and its proxy does not listen: refused, not lost.
			if err := ask(); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("the running allocation is asked: %v, want ECONNREFUSED of its own", err)
			}
			task.Stop()
		})
	}
}

// A port of the node may be a process's that has no network of its own.
func TestPortOfAProcessOfTheNode(t *testing.T) {
	n := newNode(t, "weir")
	n.alloc.End()
	if got := n.shadows(); len(got) > 0 {
		t.Errorf("shadows = %+v, want none", got)
	}
	inside := test.EchoProcess(t, test.Spec{NetNS: n.host}, "tcp4", "127.0.0.1:18080")
	if got := n.shadows(); len(got) > 0 {
		t.Errorf("shadows of a listener on lo = %+v, want none", got)
	}
	inside.Stop()
	test.EchoProcess(t, test.Spec{NetNS: n.host}, "tcp6", "[::]:18080")
	if diff := cmp.Diff([]Shadow{{Port: 18080, Protocol: "tcp"}}, n.shadows()); diff != "" {
		t.Errorf("shadows (-want +got):\n%s", diff)
	}
	// libcni's result outlives a power cut. What it says of ports does not hold then.
	for _, dir := range []string{n.Paths.StateDir + "/networks", n.Paths.StateDir + "/workloads"} {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
	}
	before := time.Unix(0, 0)
	if err := os.Chtimes(filepath.Join(n.CacheDir, "results", "weir-"+key.String()), before, before); err != nil {
		t.Fatal(err)
	}
	if got := n.shadows(); len(got) > 0 {
		t.Errorf("shadows of another boot's result = %+v, want none", got)
	}
}

func TestParsePorts(t *testing.T) {
	const text = `[{"hostPort":80,"containerPort":8080},{"HostPort":53,"Protocol":"UDP","HostIP":"0.0.0.0"},{"hostPort":0},
		{"hostPort":443,"protocol":"tcp","hostIP":"192.0.2.1"},{"hostPort":444,"protocol":"tcp","hostIP":"::ffff:192.0.2.1"}]`
	got, err := parsePorts([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	one := netip.MustParseAddr("192.0.2.1")
	want := []hostPort{{port: 80, protocol: "tcp"}, {port: 53, protocol: "udp"}, {addr: one, port: 443, protocol: "tcp"}, {addr: one, port: 444, protocol: "tcp"}}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(hostPort{}), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("ports (-want +got):\n%s", diff)
	}
	if _, err := parsePorts([]byte(`{`)); err == nil {
		t.Error("half of a list is read")
	}
	for _, each := range []struct {
		a, b hostPort
		want bool
	}{
		{want[0], want[0], true}, {want[0], want[1], false}, {want[2], hostPort{port: 443, protocol: "tcp"}, true},
		{want[2], hostPort{addr: netip.MustParseAddr("192.0.2.9"), port: 443, protocol: "tcp"}, false},
		{want[1], hostPort{port: 53, protocol: "tcp"}, false},
	} {
		if got := each.a.meets(each.b); got != each.want {
			t.Errorf("%+v meets %+v = %t, want %t", each.a, each.b, got, each.want)
		}
	}
}
