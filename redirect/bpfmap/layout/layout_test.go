// SPDX-License-Identifier: MPL-2.0

package layout

import (
	"bytes"
	"encoding/binary"
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
)

// Counts of the released layout 2 come to the verdict of the same name, and back
// again on a downgrade; what only one version has is left out.
func TestCountsKeepTheirVerdict(t *testing.T) {
	now, err := bpfmap.LoadBpf()
	if err != nil {
		t.Fatal(err)
	}
	object, err := os.ReadFile("../../testdata/layout2/bpf.o")
	if err != nil {
		t.Fatal(err)
	}
	former, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		t.Fatal(err)
	}
	there := conversion{
		from: mapTypes{key: former.Maps["verdicts"].Key, value: former.Maps["verdicts"].Value},
		to:   mapTypes{key: now.Maps["verdicts"].Key, value: now.Maps["verdicts"].Value}, spec: now.Maps["verdicts"],
	}
	back := conversion{from: there.to, to: there.from, spec: former.Maps["verdicts"]}
	counts := make([]byte, former.Maps["verdicts"].ValueSize)
	for i := range len(counts) / 8 {
		binary.NativeEndian.PutUint64(counts[8*i:], uint64(100+i))
	}
	converted := there.Value(counts)
	for _, c := range []struct {
		verdict bpfmap.Verdict
		place   int // in layout 2
	}{{bpfmap.Redirected, 0}, {bpfmap.UDP, 9}, {bpfmap.RefusedEncoded, 10}, {bpfmap.RefusedNoProxy, 15}, {bpfmap.Inbound, 16}, {bpfmap.RefusedGuard, 22}, {bpfmap.Listener, 23}, {bpfmap.RefusedListenerTable, 26}} {
		if got, want := binary.NativeEndian.Uint64(converted[8*int(c.verdict):]), uint64(100+c.place); got != want {
			t.Errorf("%s is %d after the migration, want %d", c.verdict, got, want)
		}
	}
	if got := binary.NativeEndian.Uint64(converted[8*int(bpfmap.RefusedOption):]); got != 0 {
		t.Errorf("%s, which layout 2 does not have, is %d", bpfmap.RefusedOption, got)
	}
	if got := back.Value(converted); !bytes.Equal(got, counts) {
		t.Errorf("back again the counts are %v, want %v", got, counts)
	}
}
