// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"net/netip"
	"testing"

	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// The benchmarks of what an ADD, a DEL and a pass of the agent cost in process, on
// the node's real kernel; benchstat reads them:
//
//	go test ./redirect -run '^$' -bench . -count 10

// benchmarkWorkload is a namespace with an address, and what an ADD asks for it.
func benchmarkWorkload(b *testing.B) Attachment {
	ns := test.NewNetNS(b)
	test.Veth(b, test.VethEnd{NetNS: ns, Name: "eth0", Addrs: []netip.Prefix{netip.MustParsePrefix("10.210.0.2/24")}},
		test.VethEnd{NetNS: test.NewNetNS(b)})
	return Attachment{
		Key:   workload.AttachmentID{ContainerID: "benchmark", IfName: "eth0"},
		NetNS: ns.Path,
		Request: workload.Request{
			Network: "bench", Mode: workload.ModeTransparent, ProxyUID: proxyUID, InboundPort: inboundPort, OutboundPort: outboundPort,
			DNS:       workload.DNS{Address: netip.MustParseAddr("10.99.0.1"), Port: 8600},
			Addresses: []netip.Addr{netip.MustParseAddr("10.210.0.2")},
		},
	}
}

// BenchmarkAdd redirects a namespace that is not redirected.
func BenchmarkAdd(b *testing.B) {
	d := newDatapath(b)
	a := benchmarkWorkload(b)
	for b.Loop() {
		if err := d.Add(a); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := d.Remove(a.Key); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkAddAgain is an ADD that finds everything as it should be, as CHECK does.
func BenchmarkAddAgain(b *testing.B) {
	d := newDatapath(b)
	a := benchmarkWorkload(b)
	for b.Loop() {
		if err := d.Add(a); err != nil {
			b.Fatal(err)
		}
	}
	b.StopTimer()
	if err := d.Remove(a.Key); err != nil {
		b.Fatal(err)
	}
}

// BenchmarkTurn is what the agent does every two seconds on a calm node: a look at what
// all workloads share, and at two of them.
func BenchmarkTurn(b *testing.B) {
	d := newDatapath(b)
	a := benchmarkWorkload(b)
	if err := d.Add(a); err != nil {
		b.Fatal(err)
	}
	keys := []workload.AttachmentID{a.Key, a.Key}
	b.Run("one look", func(b *testing.B) {
		for b.Loop() {
			if _, err := d.Repair(); err != nil {
				b.Fatal(err)
			}
			for _, checked := range d.CheckSome(keys) {
				if checked.Err != nil {
					b.Fatal(checked.Err)
				}
			}
		}
	})
	b.Run("a look for each", func(b *testing.B) {
		for b.Loop() {
			if _, err := d.Repair(); err != nil {
				b.Fatal(err)
			}
			for _, key := range keys {
				if _, err := d.Check(key, ""); err != nil {
					b.Fatal(err)
				}
			}
		}
	})
}
