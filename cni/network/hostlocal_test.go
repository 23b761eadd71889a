// SPDX-License-Identifier: MPL-2.0

package network

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/delegate"
	"github.com/weirmesh/weir/redirect/workload"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// leaseBench has the linked host-local and the reference program on one directory.
type leaseBench struct {
	t      *testing.T
	dir    string
	config []byte
}

func newLeaseBench(t *testing.T, ipam map[string]any) *leaseBench {
	t.Helper()
	b := &leaseBench{t: t, dir: t.TempDir()}
	ipam["type"], ipam["dataDir"] = delegate.HostLocal, b.dir
	config, err := json.Marshal(map[string]any{"cniVersion": "1.0.0", "name": "weir", "type": "weir", "ipam": ipam})
	if err != nil {
		t.Fatal(err)
	}
	b.config = config
	return b
}

func ranges(subnets ...string) (sets [][]map[string]string) {
	for _, subnet := range subnets {
		sets = append(sets, []map[string]string{{"subnet": subnet}})
	}
	return sets
}

func (b *leaseBench) linked(command, id, args string) (*current.Result, error) {
	r := &attachment.Record{Attachment: attachment.Attachment{Key: workload.AttachmentID{ContainerID: id, IfName: "eth0"}, Args: args}}
	result, err := delegate.Call(b.t.Context(), r, command, delegate.HostLocal, b.config)
	if err != nil || result == nil {
		return nil, err
	}
	return result.(*current.Result), nil
}

func (b *leaseBench) program(command, id, args string) (*current.Result, error) {
	out, err := delegate.Run(b.t.Context(), filepath.Join(test.CNIPath(b.t), delegate.HostLocal), b.config, "CNI_COMMAND="+command, "CNI_CONTAINERID="+id,
		"CNI_IFNAME=eth0", "CNI_NETNS=/nowhere", "CNI_PATH=/nowhere", "CNI_ARGS="+args)
	if err != nil || command != "ADD" {
		return nil, err
	}
	result, err := delegate.DecodeResult(b.config, out)
	if err != nil {
		return nil, err
	}
	return result.(*current.Result), nil
}

func (b *leaseBench) files() map[string]string {
	files := make(map[string]string)
	paths, err := filepath.Glob(filepath.Join(b.dir, "weir", "*"))
	if err != nil {
		b.t.Fatal(err)
	}
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			b.t.Fatal(err)
		}
		files[filepath.Base(path)] = string(text)
	}
	return files
}

// The same calls to both leave the same files and give the same answers.
func TestLinkedHostLocalIsTheProgram(t *testing.T) {
	resolv := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(resolv, []byte("# no\nnameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch a b\noptions ndots:5\ndomain c\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	ipam := func() map[string]any {
		return map[string]any{
			"ranges": ranges("10.9.0.0/24", "fd09::/64"), "resolvConf": resolv,
			"routes": []map[string]any{{"dst": "0.0.0.0/0"}, {"dst": "10.0.0.0/8", "gw": "10.9.0.9"}},
		}
	}
	linked, program := newLeaseBench(t, ipam()), newLeaseBench(t, ipam())
	for _, step := range []struct{ command, id, args string }{
		{"ADD", "a", ""}, {"ADD", "b", ""}, {"ADD", "b", ""}, {"CHECK", "a", ""}, {"CHECK", "c", ""}, {"DEL", "a", ""}, {"DEL", "a", ""},
		{"ADD", "d", "IP=10.9.0.77"}, {"ADD", "e", "IP=10.9.0.77"}, {"ADD", "f", "IP=10.10.0.1"}, {"ADD", "g", ""},
	} {
		got, gotErr := linked.linked(step.command, step.id, step.args)
		want, wantErr := program.program(step.command, step.id, step.args)
		if (gotErr == nil) != (wantErr == nil) {
			t.Errorf("%v: %v: want %v", step, gotErr, wantErr)
		}
		if got != nil && want != nil {
			got.CNIVersion = want.CNIVersion // of the form, which the program wrote and the linked one never had
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%v: result (-program +linked):\n%s", step, diff)
		}
		if diff := cmp.Diff(program.files(), linked.files()); diff != "" {
			t.Errorf("%v: files (-program +linked):\n%s", step, diff)
		}
	}
}

// Whatever ranges a configuration has, both take the same addresses, to the last one,
// and refuse the same.
func TestLinkedHostLocalChoosesLikeTheProgram(t *testing.T) {
	type object = map[string]any
	sets := func(list ...object) [][]object { return [][]object{list} }
	for _, tc := range []struct {
		name string
		ipam object
		args string
	}{
		{"one range beside the other keys", object{"subnet": "10.9.0.0/29", "gateway": "10.9.0.3"}, ""},
		{"part of a subnet", object{"ranges": sets(object{"subnet": "10.9.0.0/24", "rangeStart": "10.9.0.250", "rangeEnd": "10.9.0.253"})}, ""},
		{"one address", object{"ranges": sets(object{"subnet": "10.9.0.0/24", "rangeStart": "10.9.0.9", "rangeEnd": "10.9.0.9"})}, ""},
		{"two ranges", object{"ranges": sets(object{"subnet": "10.9.0.0/30"}, object{"subnet": "10.8.0.0/30"})}, ""},
		{"IPv6", object{"ranges": sets(object{"subnet": "fd09::/126", "gateway": "fd09::2"})}, ""},
		{"IPv6 that starts at the gateway", object{"ranges": sets(object{"subnet": "fd09::/125", "rangeStart": "fd09::1"})}, ""},
		{"mapped addresses", object{"ranges": sets(object{"subnet": "10.9.0.0/24", "rangeStart": "::ffff:10.9.0.253"})}, ""},
		{"host bits", object{"subnet": "10.9.0.1/24"}, ""},
		{"too small", object{"subnet": "10.9.0.0/31"}, ""},
		{"no subnet", object{"ranges": sets(object{"rangeStart": "10.9.0.1"})}, ""},
		{"no ranges", object{}, ""},
		{"an empty set", object{"ranges": [][]object{{}}}, ""},
		{"both families in a set", object{"ranges": sets(object{"subnet": "10.9.0.0/24"}, object{"subnet": "fd09::/64"})}, ""},
		{"overlap in a set", object{"ranges": sets(object{"subnet": "10.9.0.0/24"}, object{"subnet": "10.9.0.0/25"})}, ""},
		{"overlap of sets", object{"ranges": [][]object{{{"subnet": "10.9.0.0/24"}}, {{"subnet": "10.9.0.128/25"}}}}, ""},
		{"start outside", object{"subnet": "10.9.0.0/24", "rangeStart": "10.8.0.1"}, ""},
		{"end outside", object{"subnet": "10.9.0.0/24", "rangeEnd": "10.8.0.1"}, ""},
		{"end before start", object{"subnet": "10.9.0.0/24", "rangeStart": "10.9.0.9", "rangeEnd": "10.9.0.8"}, ""},
		{"asked", object{"subnet": "10.9.0.0/29"}, "IP=10.9.0.4"},
		{"asked with a prefix", object{"subnet": "10.9.0.0/29"}, "IP=10.9.0.4/29"},
		{"asked for the gateway", object{"subnet": "10.9.0.0/29"}, "IP=10.9.0.1"},
		{"asked for what is no address", object{"subnet": "10.9.0.0/29"}, "IP=ten"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			linked, program := newLeaseBench(t, maps.Clone(tc.ipam)), newLeaseBench(t, maps.Clone(tc.ipam))
			step := func(command, id string) {
				t.Helper()
				got, gotErr := linked.linked(command, id, tc.args)
				want, wantErr := program.program(command, id, tc.args)
				if (gotErr == nil) != (wantErr == nil) {
					t.Errorf("%s %s: %v: want %v", command, id, gotErr, wantErr)
				}
				if got != nil && want != nil {
					got.CNIVersion = want.CNIVersion
				}
				if diff := cmp.Diff(want, got); diff != "" {
					t.Errorf("%s %s: result (-program +linked):\n%s", command, id, diff)
				}
				if diff := cmp.Diff(program.files(), linked.files()); diff != "" {
					t.Errorf("%s %s: files (-program +linked):\n%s", command, id, diff)
				}
			}
			for i := range 7 {
				step("ADD", fmt.Sprint(i))
			}
			step("DEL", "1")
			step("DEL", "0")
			step("ADD", "again")
			step("ADD", "more")
		})
	}
}

func TestLeasesChangeHands(t *testing.T) {
	b := newLeaseBench(t, map[string]any{"ranges": ranges("10.9.0.0/24")})
	step := func(command, id string, call func(string, string, string) (*current.Result, error), want string) {
		t.Helper()
		result, err := call(command, id, "")
		if err != nil {
			t.Fatalf("%s %s: %v", command, id, err)
		}
		if want != "" && strings.Join(addresses(result), " ") != want {
			t.Errorf("%s %s: %v: want %s", command, id, addresses(result), want)
		}
	}
	step("ADD", "a", b.program, "10.9.0.2")
	step("ADD", "b", b.linked, "10.9.0.3")
	step("ADD", "c", b.program, "10.9.0.4")
	step("CHECK", "a", b.linked, "")
	step("CHECK", "b", b.program, "")
	step("DEL", "a", b.linked, "")
	step("DEL", "b", b.program, "")
	if _, err := b.linked("CHECK", "b", ""); err == nil {
		t.Error("CHECK of a lease that the program gave back: want an error")
	}
	step("DEL", "c", b.linked, "")
	for name := range b.files() {
		if strings.HasPrefix(name, "10.9.") {
			t.Errorf("lease %s is left", name)
		}
	}
}

// Of two families an allocation gets both, or none.
func TestLeaseOfHalfIsGivenBack(t *testing.T) {
	b := newLeaseBench(t, map[string]any{"ranges": ranges("10.9.0.0/24", "10.8.0.0/30")})
	if _, err := b.linked("ADD", "first", ""); err != nil {
		t.Fatal(err)
	}
	before := b.files()
	if _, err := b.linked("ADD", "second", ""); err == nil || !strings.Contains(err.Error(), "range 1") {
		t.Errorf("%v: want to hear that the second range is full", err)
	}
	after := b.files()
	delete(before, "last_reserved_ip.0") // goes on
	delete(after, "last_reserved_ip.0")
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("files (-before +after):\n%s", diff)
	}
}

// Each lease is a file. An ADD that read all of them took the longer, the more allocations
// the node has.
func TestFreshKeyReadsNoLease(t *testing.T) {
	n := newNode(t)
	_, result := n.added(t, "a")
	watch, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(watch)
	held := filepath.Join(n.config.LeaseDir, n.config.Name, result.IPs[0].Address.IP.String())
	if _, err := unix.InotifyAddWatch(watch, held, unix.IN_OPEN); err != nil {
		t.Fatal(err)
	}
	opened := func() bool {
		t.Helper()
		count, err := unix.Read(watch, make([]byte, 4096))
		if err != nil && err != unix.EAGAIN {
			t.Fatal(err)
		}
		return count > 0
	}
	b, _ := n.added(t, "b")
	if opened() {
		t.Error("ADD of another key: it read the lease of the first")
	}
	if err := n.remove(b); err != nil {
		t.Fatal(err)
	}
	if !opened() {
		t.Error("DEL: it did not look for all leases of the key, those of lost records too")
	}
}
