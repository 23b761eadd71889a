// SPDX-License-Identifier: MPL-2.0

package main

import (
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/dump"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

const dumpedRows = `TABLE       KEY                 VALUE
addresses   10.1.2.3            own
addresses   240.0.0.1           upstream 127.0.0.1:9191
cidrs       10.9.0.0/16         4
cidrs       2001:db8::/32       6
exclusions  uid 7               0x0
ports       inbound-port 0      22
ports       outbound-port 5120  5432 5433
`

// The dump has each row of the workload, of no other one, and is the same text after
// the rows were written anew in another order under another generation.
func TestDumpOnAKernel(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	environment := map[string]string{"WEIR_PIN_DIR": filepath.Join(test.BPFFS(t), "weir"), "WEIR_STATE_DIR": t.TempDir()}
	weir := func(args ...string) outcome {
		ui := cli.NewMockUi()
		code := weirTo(t.Context(), ui, environment, args...)
		return outcome{code: code, stdout: ui.OutputWriter.String(), stderr: ui.ErrorWriter.String()}
	}
	if got := weir("load"); got.code != 0 {
		t.Fatalf("load: %+v", got)
	}
	t.Cleanup(func() { weir("unload", "-force") })
	datapath := redirect.New(store.PathsFromEnv(func(name string) string { return environment[name] }))
	add := func(id string, ns *test.NetNS, ports ...uint16) {
		t.Helper()
		if err := datapath.Add(redirect.Attachment{
			Key: workload.AttachmentID{ContainerID: id, IfName: "eth0"}, NetNS: ns.Path,
			Request: workload.Request{
				Network: "nomad", Job: workload.Job{ID: "demo", Group: "web"}, Mode: workload.ModeTransparent,
				ProxyUID: 101, InboundPort: 20000, OutboundPort: 15001, Addresses: []netip.Addr{netip.MustParseAddr("10.1.2.3")},
				ExcludeOutboundPorts: ports, ExcludeInboundPorts: []uint16{22}, ExcludeUIDs: []uint32{7},
				ExcludeOutboundCIDRs: []netip.Prefix{netip.MustParsePrefix("10.9.0.0/16"), netip.MustParsePrefix("2001:db8::/32")},
			},
		}); err != nil {
			t.Fatal(err)
		}
	}
	ns := test.NewNetNS(t)
	add("0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01", ns, 5432, 5433)
	add("7f0a1c22-7c0f-4d0e-9a51-2f6c8e1d0a02", test.NewNetNS(t), 6379)
	upstreams := workload.MeshConfig{Upstreams: []workload.Upstream{{
		Name: "db", Addresses: []netip.Addr{netip.MustParseAddr("240.0.0.1")}, Listener: netip.MustParseAddrPort("127.0.0.1:9191"),
	}}}
	key := workload.AttachmentID{ContainerID: "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01", IfName: "eth0"}
	if err := datapath.SetMeshConfig(key, upstreams); err != nil {
		t.Fatal(err)
	}
	first := weir("dump", "0b5d")
	for _, line := range strings.Split(strings.TrimSpace(dumpedRows), "\n") {
		if !strings.Contains(squeeze(first.stdout), squeeze(line)+"\n") {
			t.Errorf("the dump lacks %q", line)
		}
	}
	if t.Failed() || first.code != 0 || strings.Contains(first.stdout, "6379") {
		t.Errorf("the dump is\n%s%s", first.stdout, first.stderr)
	}
	if err := datapath.SetMeshConfig(key, workload.MeshConfig{}); err != nil {
		t.Fatal(err)
	}
	if got := weir("dump", "0b5d"); strings.Contains(got.stdout, "240.0.0.1") {
		t.Errorf("the dump has an upstream that is gone:\n%s", got.stdout)
	}
	if err := datapath.SetMeshConfig(key, upstreams); err != nil {
		t.Fatal(err)
	}
	want(t, weir("dump", "0b5d"), first)
}

// squeeze takes the width of the columns out of a table.
func squeeze(text string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		lines[i] = strings.Join(strings.Fields(line), " ")
	}
	return strings.Join(lines, "\n")
}

func TestDumpAsJSON(t *testing.T) {
	n := &node{
		known: []inspect.Record{{Key: workload.AttachmentID{ContainerID: "0b5d0c1e", IfName: "eth0"}}},
		rows:  []dump.Row{{Table: "configs", Key: "proxy uid", Value: "101"}},
	}
	want(t, try(t, n, nil, "dump", "0b5d", "-json"), outcome{stdout: `{
  "schema": 1,
  "alloc_id": "0b5d0c1e",
  "rows": [
    {
      "table": "configs",
      "key": "proxy uid",
      "value": "101"
    }
  ]
}
`})
	want(t, try(t, n, nil, "dump"), outcome{code: 1, stderr: "weir dump: name an allocation: 'weir workloads' lists them\n"})
}
