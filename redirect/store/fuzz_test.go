// SPDX-License-Identifier: MPL-2.0

package store

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/workload"
)

// FuzzRecordFile holds records of workloads: one that cannot be read is told as such,
// and what is read is the same once it was written and read again.
func FuzzRecordFile(f *testing.F) {
	for _, seed := range []string{
		"", "{", "null", "[]", `{"schema":2,"boot_id":"boot"}`, `{"schema":99,"boot_id":"boot","request":7}`, `{"boot_id":"other","request":7}`,
		`{"schema":1,"boot_id":"boot","key":{"container_id":"c","if_name":"eth0"},"netns":"/x","request":{"mode":"transparent","proxy_uid":-1}}`,
		`{"schema":1,"boot_id":"boot","key":{"container_id":"../c","if_name":"/"},"complete":true,"request":{"addresses":["::ffff:1.2.3.4",""]}}`,
	} {
		f.Add([]byte(seed))
	}
	dir := f.TempDir()
	path := filepath.Join(dir, "fuzzed.json")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readRecordFile(path, "boot")
		if err != nil {
			if got != nil || !errors.Is(err, ErrUnreadable) && !errors.Is(err, ErrUnknown) {
				t.Errorf("%q: %+v, %v", data, got, err)
			}
			return
		}
		got.Key = workload.AttachmentID{ContainerID: "again", IfName: "eth0"} // the name of its file
		paths := Paths{StateDir: dir}
		if err := paths.WriteRecord(got); err != nil {
			t.Fatalf("%q: %v", data, err)
		}
		again, err := readRecordFile(paths.Record(got.Key), "boot")
		if err != nil {
			t.Fatalf("%q: read again: %v", data, err)
		}
		if diff := cmp.Diff(got, again, cmp.Comparer(func(a, b Record) bool { return cmp.Equal(recordText(a, t), recordText(b, t)) })); diff != "" {
			t.Errorf("%q: (-read +read again):\n%s", data, diff)
		}
	})
}

// text is the record as it is written.
func recordText(r Record, t *testing.T) string {
	t.Helper()
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
