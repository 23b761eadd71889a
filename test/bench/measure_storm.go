// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
)

// mappedPorts is how many host ports an allocation has in the storm with host ports:
// a proxy's, a service's and one more.
const mappedPorts = 3

// storm measures all that CNI does for many allocations that start at once:
// Nomad has one lock for the node, so they wait for each other. Weir builds the
// namespace itself, beside the plugins of Nomad's bridge mode with one at their
// end that calls one of Consul's engines. Each allocation has so many host ports.
func (b *bench) storm(ports int) measurement {
	name := "storm"
	count := fmt.Sprintf("%d allocations: ", b.size.storm)
	if ports > 0 {
		name = "storm-ports"
		count = fmt.Sprintf("%d allocations with %d host ports: ", b.size.storm, ports)
	}
	return measurement{
		name: name, about: "all of CNI for " + count[:len(count)-2], rounds: b.size.whole,
		variants: []string{weir, consul, nftables},
		rows: []row{
			{ID: name + ".all", Name: count + "all of CNI, one after the other, wall", Unit: "s", target: fasterThanChains},
			{ID: name + ".add", Name: count + "one ADD, median", Unit: "ms"},
			{ID: name + ".slowest", Name: count + "the slowest ADD", Unit: "ms"},
			{ID: name + ".growth", Name: count + "the last ten ADDs, the first ten being 1", Unit: ""},
			{ID: name + ".cpu", Name: count + "CPU of an ADD, with children", Unit: "ms"},
			{ID: name + ".del", Name: count + "one DEL, median", Unit: "ms"},
		},
		begin: b.load, end: b.unload,
		run: func(ctx context.Context, variant string) (figures, error) {
			return b.stormOnce(ctx, variant, name, ports)
		},
	}
}

// stormNote says what the figures of a storm are worth.
const stormNote = `
Whole namespaces by libcni, under one lock as in Nomad; a namespace of its own stands for the node.
"Weir" is the plugin alone in cni/weir: bridge, veth, addresses by host-local, routes, masquerading, host ports, redirect. "iptables-nft"
is Nomad's bridge mode: the reference plugins loopback, bridge with host-local and ipMasq, firewall, portmap, and after them
a plugin that does nothing but call Consul's own iptables engine, as consul-cni does. "nftables" is the same with the
nftables engine.
`

// A cniNode is a namespace that stands for a node, and its network.
type cniNode struct {
	bench *bench
	dir   string
	netns string
	list  *libcni.NetworkConfigList
	cni   *libcni.CNIConfig
	// mapped is the port mappings of the next allocation.
	mapped []object
}

func (b *bench) newCNINode(variant string) (*cniNode, error) {
	dir, err := os.MkdirTemp(filepath.Dir(b.netns), "storm-")
	if err != nil {
		return nil, err
	}
	n := &cniNode{bench: b, dir: dir, netns: filepath.Join(b.netns, filepath.Base(dir))}
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		return nil, err
	}
	engine := b.engine
	if variant == nftables {
		engine = b.nftables
	}
	err = errors.Join(
		os.Symlink(b.plugin, filepath.Join(bin, "weir")),
		os.Symlink(engine, filepath.Join(bin, "engine")))
	if err != nil {
		return nil, err
	}
	conf, err := json.Marshal(object{"cniVersion": "0.4.0", "name": "bench", "plugins": n.plugins(variant)})
	if err != nil {
		return nil, err
	}
	if n.list, err = libcni.ConfListFromBytes(conf); err != nil {
		return nil, fmt.Errorf("read network configuration: %w", err)
	}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{bin, b.plugins}, filepath.Join(dir, "cache"), nil)
	if err := newNetNS(n.netns); err != nil {
		return nil, err
	}
	return n, inNetNS(n.netns, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find lo: %w", err)
		}
		return netlink.LinkSetUp(lo)
	})
}

// plugins is the list that Nomad 1.11 makes for bridge mode, or the one of
// deploy/weir.conflist.
func (n *cniNode) plugins(variant string) []object {
	ipam := object{
		"type": "host-local", "ranges": [][]object{{{"subnet": "172.26.64.0/20"}}}, "routes": []object{{"dst": "0.0.0.0/0"}},
		"dataDir": filepath.Join(n.dir, "leases"),
	}
	ports := object{"portMappings": true}
	if variant == weir {
		return []object{{
			"type": "weir", "bridge": "weir", "isGateway": true, "ipMasq": true, "hairpinMode": true, "ipam": ipam, "capabilities": ports,
			"pinDir": n.bench.paths.PinDir, "stateDir": n.bench.paths.StateDir,
		}}
	}
	return []object{
		{"type": "loopback"},
		{"type": "bridge", "bridge": "nomad", "ipMasq": true, "isGateway": true, "forceAddress": true, "hairpinMode": false, "ipam": ipam},
		{"type": "firewall", "backend": "iptables", "iptablesAdminChainName": "NOMAD-ADMIN"},
		{"type": "portmap", "capabilities": ports, "snat": true},
		{"type": "engine"},
	}
}

// runtime is what Nomad hands to libcni for an allocation with transparent_proxy.
func (n *cniNode) runtime(s *site) (*libcni.RuntimeConf, error) {
	mesh, err := json.Marshal(engineConfig(s))
	if err != nil {
		return nil, err
	}
	conf := &libcni.RuntimeConf{
		ContainerID: s.name, NetNS: s.inside, IfName: "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "true"}, {"NOMAD_REGION", "global"}, {"NOMAD_NAMESPACE", "default"}, {"NOMAD_JOB_ID", "bench"},
			{"NOMAD_GROUP_NAME", "bench"}, {"NOMAD_ALLOC_ID", s.name}, {"CONSUL_IPTABLES_CONFIG", string(mesh)},
		},
	}
	if len(n.mapped) > 0 {
		conf.CapabilityArgs = map[string]any{"portMappings": n.mapped}
	}
	return conf, nil
}

// call runs ADD or DEL of an allocation from within the node and takes the time.
func (n *cniNode) call(ctx context.Context, s *site, add bool) (wall, cpu time.Duration, err error) {
	conf, err := n.runtime(s)
	if err != nil {
		return 0, 0, err
	}
	err = inNetNS(n.netns, func() error {
		wall, cpu, err = spent(func() error {
			if !add {
				return n.cni.DelNetworkList(ctx, n.list, conf)
			}
			_, err := n.cni.AddNetworkList(ctx, n.list, conf)
			return err
		})
		return err
	})
	return wall, cpu, err
}

func (b *bench) stormOnce(ctx context.Context, variant, name string, ports int) (got figures, err error) {
	n, err := b.newCNINode(variant)
	if err != nil {
		return nil, err
	}
	var sites []*site
	defer func() {
		for _, s := range sites {
			err = errors.Join(err, s.close())
		}
		err = errors.Join(err, removeNetNS(n.netns), b.settle(ctx))
	}()
	for range b.size.storm {
		s := &site{name: b.nextName()}
		s.inside, s.outside = filepath.Join(b.netns, s.name), filepath.Join(b.netns, s.name+"-outside")
		if err := newNetNS(s.inside); err != nil {
			return nil, err
		}
		sites = append(sites, s)
	}
	var adds, deletions []float64
	var all, cpu time.Duration
	for i, s := range sites {
		n.mapped = nil
		for port := range ports {
			for _, protocol := range []string{"tcp", "udp"} { // Nomad asks for both
				n.mapped = append(n.mapped, object{"hostPort": 20000 + i*ports + port, "containerPort": 8000 + port, "protocol": protocol})
			}
		}
		wall, spent, err := n.call(ctx, s, true)
		if err != nil {
			return nil, fmt.Errorf("add %s: %w", s.name, err)
		}
		adds, all, cpu = append(adds, millis(wall)), all+wall, cpu+spent
	}
	for _, s := range []*site{sites[0], sites[len(sites)-1]} {
		if err := b.prove(ctx, s); err != nil {
			return nil, err
		}
	}
	for _, s := range sites {
		wall, _, err := n.call(ctx, s, false)
		if err != nil {
			return nil, fmt.Errorf("delete %s: %w", s.name, err)
		}
		deletions = append(deletions, millis(wall))
	}
	few := min(10, len(adds))
	return figures{
		name + ".all": all.Seconds(), name + ".add": summarize(adds).Median, name + ".slowest": slices.Max(adds),
		name + ".growth": summarize(adds[len(adds)-few:]).Median / summarize(adds[:few]).Median,
		name + ".cpu":    millis(cpu) / float64(len(sites)), name + ".del": summarize(deletions).Median,
	}, nil
}
