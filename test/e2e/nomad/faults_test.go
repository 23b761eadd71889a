// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/weirmesh/weir/test/nomad"
)

// fault is something that keeps ADD from one of its steps. The commands are the
// shell's on the node, in which $name is the fault's, $own a directory of its own,
// $net the first three numbers of its network's addresses and $conf its conflist.
type fault struct {
	name string // lower case: also of its bridge and of its network
	mode string // of the job's network; "" is a network of the fault's own
	// keys are more keys of that network; plugins are what comes before Weir in it.
	keys    map[string]any
	plugins []map[string]any
	ports   bool // the allocation has a host port
	args    string
	inject  string
	repair  string   // as the event tells the operator, where that is all it takes
	want    []string // in Nomad's event
	foreign bool     // another plugin's own error: Weir only has to take part in the clean-up
}

// paths give a fault a data path of its own, in a bpffs of its own. The data path is
// loaded by the first ADD, or by the fault.
func paths(keys map[string]any) map[string]any {
	all := map[string]any{"pinDir": "$own/bpf/weir", "stateDir": "$own/state"}
	for key, value := range keys {
		all[key] = value
	}
	return all
}

const (
	mountBPF = "mkdir -p $own/bpf && mount -t bpf bpf $own/bpf; "
	weirHere = "WEIR_PIN_DIR=$own/bpf/weir WEIR_STATE_DIR=$own/state weir "
	lender   = "WEIR_PIN_DIR=$own/bpf/lender WEIR_STATE_DIR=$own/lender weir "
	lent     = `$(bpftool link show pinned $own/bpf/lender/links/weir_connect4 | sed -n 's/.* prog \([0-9]*\).*/\1/p')`
)

// ownFaults each meet the allocations of one network only, from the configuration
// to the last link.
func ownFaults(cgroup string) []fault {
	return []fault{
		{
			name: "key", keys: map[string]any{"vlan": 5},
			repair: `sed -i 's/,"vlan":5//' $conf`, want: []string{"vlan", "remove the key"},
		},
		{
			name: "mtu", keys: map[string]any{"mtu": 1000, "ipam": map[string]any{
				"type": "host-local", "dataDir": "$own/leases", "ranges": []any{
					[]any{map[string]any{"subnet": "$net.0/24"}}, []any{map[string]any{"subnet": "fd00:1000::/64"}}}}},
			repair: `sed -i 's/"mtu":1000/"mtu":1400/' $conf`, want: []string{"mtu 1000", "1280", "fd00:1000::"},
		},
		{
			name: "ipam", keys: map[string]any{"ipam": map[string]any{
				"type": "elsewhere", "dataDir": "$own/leases", "ranges": []any{[]any{map[string]any{"subnet": "$net.0/24"}}}}},
			repair: "cp /opt/cni/bin/host-local /opt/cni/bin/elsewhere",
			want:   []string{`plugin "elsewhere" in CNI_PATH "/opt/cni/bin": not found`, "install what is named"},
		},
		{
			name: "leases", inject: "mkdir -p $own/leases; mount -t tmpfs -o ro none $own/leases", repair: "umount $own/leases",
			want: []string{"take an address", "read-only"},
		},
		{
			// The only address is that of an allocation whose DEL never came.
			name: "full", keys: map[string]any{"ipam": map[string]any{
				"type": "host-local", "dataDir": "$own/leases", "ranges": []any{[]any{map[string]any{"subnet": "$net.0/30"}}}}},
			inject: `mkdir -p $own/leases/$name; printf 'lost\r\neth0' >$own/leases/$name/$net.2`, repair: "rm $own/leases/$name/$net.2",
			want: []string{"take an address", "no IP addresses available", "/srv/full/leases/full has each lease", "take a larger subnet"},
		},
		{
			name: "taken", inject: "ip link add $name type veth peer name other", repair: "ip link del $name",
			want: []string{"a device of type veth has that name", "name another bridge"},
		},
		{
			name: "gateway", inject: "ip link add $name type bridge; ip addr add $net.77/24 dev $name", repair: "ip addr del $net.77/24 dev $name",
			want: []string{".77/24", "set forceAddress", "name another bridge"},
		},
		{
			name: "route", keys: map[string]any{"ipam": map[string]any{
				"type": "host-local", "dataDir": "$own/leases", "ranges": []any{[]any{map[string]any{"subnet": "$net.0/24"}}},
				"routes": []any{map[string]any{"dst": "0.0.0.0/0", "gw": "224.0.0.1"}}}},
			repair: `sed -i 's/,"gw":"224.0.0.1"//' $conf`, want: []string{"add route 0.0.0.0/0 by 224.0.0.1"},
		},
		{
			// Only an allocation with host ports needs that chain. The other one has a
			// rule, so that nobody takes the table away as empty.
			name: "ports", ports: true,
			inject: `nft add table inet weir; nft add chain inet weir prerouting '{ type filter hook input priority 0; }'
				nft add chain inet weir others; nft add rule inet weir others counter`,
			repair: "nft delete chain inet weir prerouting; nft flush chain inet weir others; nft delete chain inet weir others",
			want:   []string{"maps of host ports", "inet weir", "in use by another"},
		},
		{
			name: "consul", args: `{"CONSUL_IPTABLES_CONFIG": "{\"ProxyUserID\":\"101\",\"ProxyInboundPort\":20000}"}`,
			plugins: []map[string]any{
				{"type": "loopback"},
				{"type": "bridge", "bridge": "$name", "isGateway": true, "ipMasq": true, "ipam": map[string]any{
					"type": "host-local", "dataDir": "$own/leases", "ranges": []any{[]any{map[string]any{"subnet": "$net.0/24"}}},
					"routes": []any{map[string]any{"dst": "0.0.0.0/0"}}}},
				{"type": "consul-engine"},
			},
			repair: `sed -i 's/{"type":"consul-engine"},//' $conf`, want: []string{"redirected by Consul's own", "take one of the two out"},
		},
		{
			name: "bpffs", keys: paths(nil), inject: "mkdir -p $own/bpf", repair: mountBPF, want: []string{"not in a bpffs, mount one there"},
		},
		{
			name: "cgroup", keys: paths(map[string]any{"cgroupRoot": "$own/cgroup"}), inject: mountBPF,
			repair: "mkdir $own/cgroup; mount -t cgroup2 none $own/cgroup", want: []string{"open cgroup root", "no such file"},
		},
		{
			// As of a program that was attached without a thought for others: another
			// instance lends one.
			name: "hook", keys: paths(map[string]any{"cgroupRoot": cgroup}),
			inject: mountBPF + lender + "load; bpftool cgroup attach " + cgroup + " connect4 id " + lent,
			repair: "bpftool cgroup detach " + cgroup + " connect4 id " + lent + "; " + lender + "unload",
			want:   []string{"attach weir_connect4", "has this hook for itself", "bpftool cgroup detach " + cgroup + " connect4 id "},
		},
		{
			name: "records", keys: paths(nil), inject: mountBPF + "mkdir -p $own/state/workloads; mount -t tmpfs -o ro none $own/state/workloads",
			repair: "umount $own/state/workloads", want: []string{"redirect namespace", "record", "read-only"},
		},
		{
			name: "table", keys: paths(nil), inject: mountBPF + weirHere + `load; map=$own/bpf/weir/maps/releases
				for i in $(seq 0 16383); do
					printf 'map update pinned %s key hex %02x %02x 00 00 00 00 00 ff value hex 00 00 00 00\n' $map $((i & 255)) $((i >> 8))
				done | bpftool batch file -`,
			repair: weirHere + "unload", want: []string{"map releases", "full", "16384"},
		},
		{
			name: "lookups", keys: paths(nil),
			inject: mountBPF + weirHere + "load; bpftool map create $own/bpf/weir/lookups type array key 4 value 4 entries 1 name foreign",
			repair: "rm $own/bpf/weir/lookups", want: []string{"redirect namespace", "lookup", "not a directory"},
		},
	}
}

func (f fault) own() string { return "/srv/" + f.name }

// network is the name of the network that the fault's job is in.
func (f fault) network() string {
	if f.mode != "" {
		return f.mode
	}
	return "cni/" + f.name
}

func (f fault) conflist() string { return "/opt/cni/config/" + f.name + ".conflist" }

// run runs commands of the fault's on the node.
func (f fault) run(n *nomad.Node, index int, commands string) {
	if commands == "" {
		return
	}
	n.Command("sh", "-ec", fmt.Sprintf("name=%s own=%s net=%s conf=%s\n%s", f.name, f.own(), f.subnet(index), f.conflist(), commands))
}

func (f fault) subnet(index int) string { return fmt.Sprintf("172.30.%d", index) }

// writeConflist writes the conflist of the fault's own network, for a client that has
// not started yet: it looks for networks when it does.
func (f fault) writeConflist(t *testing.T, dir string, index int) string {
	t.Helper()
	plugin := map[string]any{"type": "weir"}
	if f.plugins == nil {
		plugin["bridge"] = f.name
		plugin["ipam"] = map[string]any{
			"type": "host-local", "dataDir": "$own/leases", "ranges": []any{[]any{map[string]any{"subnet": "$net.0/24"}}},
			"routes": []any{map[string]any{"dst": "0.0.0.0/0"}},
		}
		plugin["capabilities"] = map[string]bool{"portMappings": true}
	}
	for key, value := range f.keys {
		plugin[key] = value
	}
	text, err := json.Marshal(map[string]any{"cniVersion": "1.0.0", "name": f.name, "plugins": append(f.plugins, plugin)})
	if err != nil {
		t.Fatal(err)
	}
	filled := os.Expand(string(text), func(name string) string {
		return map[string]string{"own": f.own(), "net": f.subnet(index), "name": f.name}[name]
	})
	file := filepath.Join(dir, f.name+".conflist")
	if err := os.WriteFile(file, []byte(filled), 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}
