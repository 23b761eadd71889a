// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// A node whose tables are full says so, and keeps nothing of what did not fit.
func TestAddWhereATableIsFull(t *testing.T) {
	for _, name := range []string{"releases", "workloads"} {
		t.Run(name, func(t *testing.T) {
			d := newDatapath(t)
			tables, err := bpfmap.OpenTables(d.Paths().Maps())
			if err != nil {
				t.Fatal(err)
			}
			defer tables.Close()
			table, err := tables.Table(name)
			if err != nil {
				t.Fatal(err)
			}
			row := make([]byte, table.ValueSize())
			for i := range uint64(table.MaxEntries()) {
				if err := table.Update(1<<63|i, row, ebpf.UpdateNoExist); err != nil {
					t.Fatal(err)
				}
			}
			ns := test.NewNetNS(t)
			key := workload.AttachmentID{ContainerID: "full", IfName: "eth0"}
			err = d.Add(Attachment{Key: key, NetNS: ns.Path, Request: workload.Request{Mode: workload.ModeTransparent, ProxyUID: proxyUID, OutboundPort: outboundPort}})
			if !errors.Is(err, workload.ErrFull) || !strings.Contains(err.Error(), "map "+name) {
				t.Errorf("error %v: want ErrFull that names %s", err, name)
			}
			if _, err := d.Paths().ReadRecord(key); !errors.Is(err, store.ErrUnknown) {
				t.Errorf("record: %v, want none", err)
			}
			if generation, err := tables.Generation(ns.Cookie()); err != nil || generation != 0 {
				t.Errorf("generation %d, %v: want no row", generation, err)
			}
			if err := table.Delete(1<<63 | uint64(1)); err != nil {
				t.Fatal(err)
			}
			if err := d.Add(Attachment{Key: key, NetNS: ns.Path, Request: workload.Request{Mode: workload.ModeTransparent, ProxyUID: proxyUID, OutboundPort: outboundPort}}); err != nil {
				t.Errorf("ADD with room for one: %v", err)
			}
		})
	}
}
