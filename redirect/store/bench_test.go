// SPDX-License-Identifier: MPL-2.0

package store

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/workload"
)

// BenchmarkReadRecords is what a pass of the agent reads of a full node, and each
// command that shows all workloads.
func BenchmarkReadRecords(b *testing.B) {
	boot, err := BootID()
	if err != nil {
		b.Fatal(err)
	}
	for _, count := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("records=%d", count), func(b *testing.B) {
			p := Paths{StateDir: b.TempDir()}
			for i := range count {
				address := netip.AddrFrom4([4]byte{10, 210, byte(i >> 8), byte(i)})
				request := workload.Request{
					Network: "nomad", Job: workload.Job{ID: "web", Group: "web", AllocID: fmt.Sprintf("b412a0b1-e285-703a-01ba-%012d", i)},
					Mode: workload.ModeTransparent, ProxyUID: 101, InboundPort: 20000, OutboundPort: 15001, Addresses: []netip.Addr{address},
				}
				err := p.WriteRecord(&Record{
					Key: workload.AttachmentID{ContainerID: request.Job.AllocID, IfName: "eth0"}, NetNS: "/run/netns/" + request.Job.AllocID,
					Cookie: uint64(i + 1), BootID: boot, Request: request, State: Complete, Added: time.Now(), Found: request.Addresses,
					Applied: workload.Merge(request, workload.MeshConfig{}),
				})
				if err != nil {
					b.Fatal(err)
				}
			}
			for b.Loop() {
				if records, err := p.ReadRecords(); err != nil || len(records) != count {
					b.Fatalf("%d records, %v; want %d", len(records), err, count)
				}
			}
		})
	}
}
