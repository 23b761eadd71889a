// SPDX-License-Identifier: MPL-2.0

package store

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"github.com/weirmesh/weir/redirect/workload"
)

// A reader that comes again reads what changed, and that alone.
func TestRecordCache(t *testing.T) {
	p := Paths{StateDir: t.TempDir()}
	boot, err := BootID()
	if err != nil {
		t.Fatal(err)
	}
	write := func(i int, netns string) {
		t.Helper()
		r := &Record{Key: workload.AttachmentID{ContainerID: fmt.Sprint("c", i), IfName: "eth0"}, NetNS: netns, BootID: boot}
		if err := p.WriteRecord(r); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 3 {
		write(i, "/first")
	}
	var cache RecordCache
	read := func() map[string]*Record {
		t.Helper()
		records, err := cache.ReadRecords(p)
		if err != nil {
			t.Fatal(err)
		}
		found := make(map[string]*Record)
		for _, r := range records {
			found[r.Key.ContainerID] = r
		}
		return found
	}
	first := read()
	write(1, "/other") // of the same size
	if err := p.RemoveRecord(first["c2"].Key); err != nil {
		t.Fatal(err)
	}
	second := read()
	if len(first) != 3 || len(second) != 2 || second["c1"].NetNS != "/other" || second["c2"] != nil {
		t.Errorf("records are %v, and then %v", first, second)
	}
	if second["c0"] != first["c0"] {
		t.Error("a record that is the same was read again")
	}
	if err := os.WriteFile(p.Record(first["c0"].Key), []byte("?"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if records, err := cache.ReadRecords(p); !errors.Is(err, ErrUnreadable) || len(records) != 1 {
			t.Errorf("with one that cannot be read: %v, %v; want the other one, and why", records, err)
		}
	}
	write(0, "/first")
	if third := read(); len(third) != 2 || third["c0"] == nil {
		t.Errorf("records are %v, want both again", third)
	}
}
