// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/workload"
)

// consulDNS is the resolver of the recorded node.
func consulDNS() workload.DNS {
	return workload.DNS{Address: netip.MustParseAddr("10.99.0.1"), Port: 8600}
}

// recordedJob is the part that all recorded requests have in common.
func recordedJob(job, alloc, network, address string, inbound uint16) workload.Request {
	return workload.Request{
		Network:      network,
		Job:          workload.Job{Region: "global", Namespace: "default", ID: job, Group: "g", AllocID: alloc},
		Mode:         workload.ModeTransparent,
		ProxyUID:     1101,
		InboundPort:  inbound,
		OutboundPort: 15001,
		DNS:          consulDNS(),
		Addresses:    []netip.Addr{netip.MustParseAddr(address)},
	}
}

// wantRecorded are the requests that the recorded ADDs of valid jobs must
// give, by container ID: those that consul-cni fails, too.
func wantRecorded() map[string]workload.Request {
	want := make(map[string]workload.Request)
	set := func(request workload.Request) { want[request.Job.AllocID] = request }

	set(recordedJob("j1", "b412a0b1-e285-703a-01ba-3d1b2e2228f7", "nomad", "172.26.64.13", 23435))

	for alloc, its := range map[string]struct {
		address string
		inbound uint16
	}{
		"40423ceb-306b-1f4b-cfda-3006f7ac5721": {"172.26.64.14", 20425},
		"4c7bb3b8-9207-9484-1010-480a66432fef": {"172.26.64.15", 22505},
		"0fe9ab35-aade-cc18-8511-0c729fcae42a": {"172.26.64.17", 30317},
		"43f773c9-5136-5adb-5d60-4c270d2e6931": {"172.26.64.20", 30419},
	} {
		exclusions := recordedJob("j2", alloc, "nomad", its.address, its.inbound)
		exclusions.OutboundPort = 15055
		exclusions.ExcludeInboundPorts = []uint16{7071, 8181}
		exclusions.ExcludeOutboundPorts = []uint16{53, 7777}
		exclusions.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("10.99.0.0/24"), netip.MustParsePrefix("fd99::/64")}
		exclusions.ExcludeUIDs = []uint32{1200, 0}
		exclusions.Notes = []string{`ExcludeInboundPorts "0": a static port without "to"; the request does not say which, so connections to it reach the proxy until it is known`}
		set(exclusions)
	}

	noDNS := recordedJob("j3", "e1e94d7f-a771-6048-22e6-b21eb2edfad7", "nomad", "172.26.64.16", 26925)
	noDNS.DNS = workload.DNS{}
	set(noDNS)

	expose := recordedJob("j4", "8044a887-0872-e347-e09e-386c0fb8702d", "nomad", "172.26.64.18", 21375)
	expose.ExcludeInboundPorts = []uint16{30667}
	set(expose)

	args := recordedJob("j6", "ee8aa653-e793-9cd2-b37b-030d92dc7227", "meshy", "172.28.64.2", 20936)
	set(args)

	customPort := recordedJob("j8", "e8ee781c-cb27-915e-1b9d-518d1093201f", "nomad", "172.26.64.19", 0)
	customPort.Notes = []string{"ProxyInboundPort 0: the request does not name the proxy's inbound listener; inbound connections are refused until it is known"}
	set(customPort)
	return want
}

func TestRecordedRequests(t *testing.T) {
	want := wantRecorded()
	seen := make(map[string]bool)
	for scenario, list := range recordings(t) {
		for i, record := range list {
			t.Run(fmt.Sprintf("%s %d %s", scenario, i, record.Command), func(t *testing.T) {
				b := newBench()
				record = withMode(t, scenario, record)
				cmd := record.call()
				switch record.Command {
				case "ADD":
					testRecordedAdd(t, b, scenario, record, want)
					seen[cmd.ContainerID] = true
				case "CHECK":
					if err := b.Check(cmd); err != nil {
						t.Fatal(err)
					}
					if len(b.fake.checked) != 1 || b.fake.checked[0].ContainerID != cmd.ContainerID {
						t.Errorf("checked %v", b.fake.checked)
					}
				case "DEL":
					if err := b.Del(cmd); err != nil {
						t.Fatal(err)
					}
					if len(b.fake.removed) != 1 || b.fake.removed[0].ContainerID != cmd.ContainerID {
						t.Errorf("removed %v", b.fake.removed)
					}
				default:
					t.Fatalf("unknown command %s", record.Command)
				}
				if record.Command != "ADD" && b.stdout.Len() != 0 {
					t.Errorf("stdout %q: want nothing", b.stdout.String())
				}
			})
		}
	}
	for alloc := range want {
		if !seen[alloc] {
			t.Errorf("no recorded ADD of %s", alloc)
		}
	}
}

// withMode is the record with a mode that there is. Whoever recorded it asked
// for mode x, to see that a job's arguments arrive; that is refused.
func withMode(t *testing.T, scenario string, record recorded) recorded {
	args := record.Env["CNI_ARGS"]
	if !strings.Contains(args, "weir.mode=x") {
		return record
	}
	if record.Command == "ADD" {
		b := newBench()
		wantError(t, b.Add(record.call()), types.ErrInvalidEnvironmentVariables, record.call().ContainerID, `weir.mode="x"`)
		if !b.fake.untouched() || b.stdout.Len() != 0 {
			t.Errorf("%s: left behind: %+v, stdout %q", scenario, b.fake, b.stdout.String())
		}
	}
	record.Env = maps.Clone(record.Env)
	record.Env["CNI_ARGS"] = strings.Replace(args, "weir.mode=x", "weir.mode=transparent", 1)
	return record
}

func testRecordedAdd(t *testing.T, b *bench, scenario string, record recorded, want map[string]workload.Request) {
	cmd := record.call()
	err := b.Add(cmd)
	if scenario == "user-args" { // {"ProxyInboundPort":1}, written by the job's author
		wantError(t, err, types.ErrInvalidEnvironmentVariables, cmd.ContainerID, "ProxyUserID: missing")
		if !b.fake.untouched() || b.stdout.Len() != 0 {
			t.Errorf("left behind: %+v, stdout %q", b.fake, b.stdout.String())
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	var previous struct{ PrevResult json.RawMessage }
	if err := json.Unmarshal(record.Stdin, &previous); err != nil {
		t.Fatal(err)
	}
	wantOut := previous.PrevResult
	if record.Exit == 0 {
		wantOut = record.Stdout // the peer's own answer
	}
	if diff := cmp.Diff(decoded(t, wantOut), decoded(t, b.stdout.Bytes())); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
	request, ok := want[cmd.ContainerID]
	if !ok {
		if strings.Contains(cmd.Args, "CONSUL_") || !b.fake.untouched() {
			t.Errorf("want a request for %s; data path %+v", cmd.Args, b.fake)
		}
		return
	}
	attachment := redirect.Attachment{Key: workload.AttachmentID{ContainerID: cmd.ContainerID, IfName: "eth0"}, NetNS: cmd.Netns, Request: request}
	if diff := cmp.Diff([]redirect.Attachment{attachment}, b.fake.added, cmp.Comparer(equalAddrs), cmp.Comparer(equalPrefixes)); diff != "" {
		t.Errorf("added (-want +got):\n%s", diff)
	}
	if got := strings.Count(b.stderr.String(), "\n"); got != len(request.Notes) {
		t.Errorf("stderr %q: want a line for each of %q", b.stderr.String(), request.Notes)
	}
}

func equalPrefixes(a, b netip.Prefix) bool { return a == b }

func decoded(t *testing.T, data []byte) any {
	t.Helper()
	var value any
	decoder := json.NewDecoder(bytes.NewReader(data))
	if err := decoder.Decode(&value); err != nil {
		t.Fatalf("decode %q: %v", data, err)
	}
	if decoder.More() {
		t.Fatalf("decode %q: more than one value", data)
	}
	return value
}
