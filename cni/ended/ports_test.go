// SPDX-License-Identifier: MPL-2.0

package ended

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// wantShadows wants these host ports of the node's ended allocation to be others'.
func (n *node) wantShadows(when string, want ...Shadow) {
	n.t.Helper()
	var got []Shadow
	n.host.Do(func() {
		found, err := n.Find()
		if err != nil {
			n.t.Errorf("%s: %v", when, err)
		}
		for _, a := range found {
			if a.Key == key {
				got = append(got, a.Shadows...)
			}
		}
	})
	if diff := cmp.Diff(want, got); diff != "" {
		n.t.Errorf("%s: shadows (-want +got):\n%s", when, diff)
	}
}

// Behind the plugin portmap an allocation that ended keeps its static port, and the one
// that has it now gets no connections: this is told as long as it is so, and "weir gc"
// ends it. In a network of Weir's own the port is the new one's.
func TestPortOfARunningAllocation(t *testing.T) {
	for _, network := range []string{"weir", "weir-chained"} {
		t.Run(network, func(t *testing.T) {
			n := newNode(t, network)
			neighbour := test.NewNetNS(t)
			test.Veth(t, test.VethEnd{NetNS: neighbour, Name: "eth0", Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.2/24")}},
				test.VethEnd{NetNS: n.host, Name: "outside", Addrs: []netip.Prefix{netip.MustParsePrefix("192.0.2.1/24")}})
			// It is transparent and its proxy does not listen: whoever reaches it is refused.
			reached := func() bool {
				_, err := test.Ask(neighbour, "tcp4", "192.0.2.1:18080")
				return errors.Is(err, syscall.ECONNREFUSED)
			}
			n.wantShadows("the only allocation")

			const heir = "77aa00bb-7c0f-4d0e-9a51-2f6c8e1d0b02"
			alloc := test.NewBareNetNS(t)
			n.add(heir, alloc)
			n.wantShadows("beside an allocation that does not run")
			test.EchoProcess(t, test.Spec{NetNS: alloc}, "tcp4", "0.0.0.0:8080")
			heirKey := workload.AttachmentID{ContainerID: heir, IfName: "eth0"}
			shadow := []Shadow{{Port: 18080, Protocol: "tcp", By: &heirKey, Job: workload.Job{AllocID: heir, ID: "demo", Group: "web"}}}
			if network == "weir" {
				shadow = nil
			}
			n.wantShadows("beside an allocation that runs", shadow...)
			n.alloc.End()
			n.wantShadows("without a namespace", shadow...)
			// The kernel takes a namespace away some time after its end; until then it refuses, too.
			test.Eventually(t, func() error {
				if got := reached(); got != (network == "weir") {
					return fmt.Errorf("reached: %t, want %t", got, network == "weir")
				}
				return nil
			}, "the running allocation to be reached or not")
			if err := n.remove(Attachment{Key: key}); err != nil {
				t.Fatal(err)
			}
			n.wantShadows("after the removal")
			if !reached() {
				t.Error("the running allocation is not reached after the removal")
			}
		})
	}
}

// A port of the node may be a process's that has no network of its own.
func TestPortOfAProcessOfTheNode(t *testing.T) {
	for _, network := range []string{"weir", "weir-chained"} {
		t.Run(network, func(t *testing.T) {
			n := newNode(t, network)
			n.alloc.End()
			n.wantShadows("nobody else")
			inside := test.EchoProcess(t, test.Spec{NetNS: n.host}, "tcp4", "127.0.0.1:18080")
			n.wantShadows("a listener on lo")
			inside.Stop()
			test.EchoProcess(t, test.Spec{NetNS: n.host}, "tcp6", "[::]:18080")
			shadow := Shadow{Port: 18080, Protocol: "tcp"}
			n.wantShadows("a listener", shadow)
			// libcni's result outlives a power cut; rules do not, whatever it says of ports.
			before := time.Unix(0, 0)
			if err := os.Chtimes(filepath.Join(n.CacheDir, "results", network+"-"+key.String()), before, before); err != nil {
				t.Fatal(err)
			}
			if network == "weir-chained" {
				n.wantShadows("another boot's result")
				return
			}
			n.wantShadows("what the kernel has", shadow)
		})
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
