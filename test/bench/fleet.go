// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/hashicorp/consul/sdk/iptables"
	"golang.org/x/sync/errgroup"

	"github.com/weirmesh/weir/redirect/workload"
)

// interfaceName is the name under which this program is a CNI plugin: see
// interfacePlugin.
const interfaceName = "bench-interface"

// An allocation is one of a full node's: a namespace, its results of CNI, its
// service with a sidecar in Consul, and a stand-in for its Envoy.
type allocation struct {
	number      int
	id          string
	transparent bool // Nomad calls the plugin; else the agent has to find it
	upstream    int  // local port of its upstream
	site        *site
	cgroup      string // of its proxy's task
	proxy       *worker
}

// A fleet is the allocations of one node. Each has a service of its own and
// one explicit upstream, which is another's service.
type fleet struct {
	bench  *bench
	consul *consulServer
	dir    string // of CNI: bin and cache
	list   []*allocation

	// Consul is not told of transparent_proxy: it works out the upstreams of each such
	// proxy anew for each service that comes.
	explicit bool
}

func (a *allocation) service() string { return fmt.Sprintf("service-%d", a.number) }

// serviceID is that of Nomad's; the sidecar's ends in -sidecar-proxy.
func (a *allocation) serviceID() string {
	return fmt.Sprintf("_nomad-task-%s-group-group-%s-8080", a.id, a.service())
}

// inbound is the port that Nomad gives the sidecar, the same inside and outside.
func (a *allocation) inbound() int { return 20000 + a.number }

func (a *allocation) addr() netip.Addr {
	return netip.AddrFrom4([4]byte{10, 210, byte(a.number >> 8), byte(a.number)})
}

func (a *allocation) key() workload.AttachmentID {
	return workload.AttachmentID{ContainerID: a.id, IfName: "eth0"}
}

// newFleet makes so many allocations, the last quarter with transparent_proxy:
// Consul works out the upstreams of each of those anew for each service that
// comes, unless explicit leaves it out there. close takes away also a fleet that
// did not come to its end.
func (b *bench) newFleet(ctx context.Context, consul *consulServer, dir string, count int, explicit bool) (*fleet, error) {
	f := &fleet{bench: b, consul: consul, dir: dir, explicit: explicit}
	if err := f.prepareCNI(); err != nil {
		return f, err
	}
	// Else each transparent proxy has every service as an upstream, and Consul
	// works for minutes.
	deny := object{"Kind": "service-intentions", "Name": "*", "Sources": []object{{"Name": "*", "Action": "deny"}}}
	if err := consul.call(ctx, http.MethodPut, "/v1/config", deny, nil); err != nil {
		return f, err
	}
	for number := range count {
		f.list = append(f.list, &allocation{
			number: number, id: fmt.Sprintf("b412a0b1-e285-703a-01ba-%012d", number), transparent: number >= count-count/4, upstream: 9000,
		})
	}
	makers, making := errgroup.WithContext(ctx)
	makers.SetLimit(len(b.cpus))
	for _, a := range f.list {
		makers.Go(func() error {
			if err := f.place(making, a); err != nil {
				return fmt.Errorf("make allocation %d: %w", a.number, err)
			}
			return nil
		})
	}
	if err := makers.Wait(); err != nil {
		return f, err
	}
	return f, f.listed(ctx)
}

// listed waits until Consul's catalog has every service, which the local agent is now and
// then minutes late with: until then it answers no virtual IP of it.
func (f *fleet) listed(ctx context.Context) error {
	err := until(ctx, 3*time.Minute, time.Second, func() error {
		var names map[string][]string
		if err := f.consul.call(ctx, http.MethodGet, "/v1/catalog/services", nil, &names); err != nil {
			return err
		}
		missing := 0
		for _, a := range f.list {
			if names[a.service()] == nil || names[a.service()+"-sidecar-proxy"] == nil {
				missing++
			}
		}
		if missing > 0 {
			return fmt.Errorf("the catalog lacks %d of %d services", missing, len(f.list))
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("wait for Consul: %w", err)
	}
	return nil
}

func (f *fleet) prepareCNI() error {
	bin := filepath.Join(f.dir, "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	return errors.Join(
		os.Symlink(f.bench.program, filepath.Join(bin, interfaceName)),
		os.Symlink(f.bench.plugin, filepath.Join(bin, "consul-cni")))
}

// place does what Nomad does to start a, in Nomad's order: namespace, CNI,
// Consul, proxy.
func (f *fleet) place(ctx context.Context, a *allocation) (err error) {
	if a.site, err = newBareSite(f.bench.netns, fmt.Sprintf("%s-%d", filepath.Base(f.dir), a.number), a.addr()); err != nil {
		return err
	}
	if err := f.attach(ctx, a); err != nil {
		return err
	}
	if err := f.register(ctx, a); err != nil {
		return err
	}
	// That of its upstream, too: what its tasks dial waits for that, as for Envoy's.
	listen := []netip.AddrPort{
		netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(a.inbound())),
		netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), uint16(a.upstream)),
	}
	if a.transparent {
		listen = append(listen, addrPort(proxyOut))
	}
	// The name is Nomad's: it tells the agent whose task it is.
	cgroup := filepath.Join(f.bench.proxy, a.id+".connect-proxy-"+a.service()+".scope")
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	a.cgroup = cgroup
	// Under the run's context, not the group's, which ends with the group.
	a.proxy, err = startWorker(context.WithoutCancel(ctx), f.bench.program, place{netns: a.site.inside, uid: proxyUID, cgroup: cgroup}, "hold", listen)
	return err
}

// attach calls libcni as Nomad does. Without transparent_proxy no plugin of
// ours is in the chain.
func (f *fleet) attach(ctx context.Context, a *allocation) error {
	plugins := []object{{"type": interfaceName, "capabilities": object{"portMappings": true}, "address": a.addr().String() + "/16"}}
	args := [][2]string{
		{"IgnoreUnknown", "true"}, {"NOMAD_REGION", "global"}, {"NOMAD_NAMESPACE", "default"}, {"NOMAD_ALLOC_ID", a.id},
		{"NOMAD_JOB_ID", a.service()}, {"NOMAD_GROUP_NAME", "group"},
	}
	if a.transparent {
		mesh, err := json.Marshal(iptables.Config{
			ConsulDNSIP: dnsAddr, ConsulDNSPort: dnsPort, ProxyUserID: strconv.Itoa(proxyUID),
			ProxyInboundPort: a.inbound(), ProxyOutboundPort: outboundPort,
		})
		if err != nil {
			return err
		}
		args = append(args, [2]string{"CONSUL_IPTABLES_CONFIG", string(mesh)})
		plugins = append(plugins, object{"type": "consul-cni", "pinDir": f.bench.paths.PinDir, "stateDir": f.bench.paths.StateDir})
	}
	conf, err := json.Marshal(object{"cniVersion": "0.4.0", "name": "nomad", "plugins": plugins})
	if err != nil {
		return err
	}
	list, err := libcni.ConfListFromBytes(conf)
	if err != nil {
		return fmt.Errorf("read network configuration: %w", err)
	}
	var ports []any
	for _, protocol := range []string{"tcp", "udp"} {
		ports = append(ports, object{"hostPort": a.inbound(), "containerPort": a.inbound(), "protocol": protocol, "hostIP": "192.0.2.10"})
	}
	cni := libcni.NewCNIConfigWithCacheDir([]string{filepath.Join(f.dir, "bin")}, f.cache(), nil)
	_, err = cni.AddNetworkList(ctx, list, &libcni.RuntimeConf{
		ContainerID: a.id, NetNS: a.site.inside, IfName: "eth0", Args: args, CapabilityArgs: object{"portMappings": ports},
	})
	if err != nil {
		return fmt.Errorf("add network: %w", err)
	}
	return nil
}

func (f *fleet) cache() string { return filepath.Join(f.dir, "cache") }

// register tells Consul of a, in the form that Nomad has: the IDs, a host port
// that is the proxy's, and tags for its statistics. The checks of Nomad are left
// out but for the alias: there is no host port to connect to.
func (f *fleet) register(ctx context.Context, a *allocation) error {
	id := a.serviceID()
	proxy := object{
		"Config": object{
			"bind_address": "0.0.0.0", "bind_port": a.inbound(),
			"envoy_stats_tags": []string{"nomad.group=group", "nomad.job=" + a.service(), "nomad.namespace=default", "nomad.alloc_id=" + a.id},
		},
		"Upstreams": []object{{
			"DestinationName": f.list[(a.number+1)%len(f.list)].service(), "LocalBindPort": a.upstream,
		}},
	}
	if a.transparent && !f.explicit {
		proxy["Mode"] = "transparent"
	}
	meta := map[string]string{"external-source": "nomad"}
	return f.consul.register(ctx, object{
		"ID": id, "Name": a.service(), "Address": "192.0.2.10", "Port": 8080, "Meta": meta,
		"Connect": object{"SidecarService": object{
			"Address": "192.0.2.10", "Port": a.inbound(), "Meta": meta, "Proxy": proxy,
			"Checks": []object{{"Name": "Connect Sidecar Aliasing " + id, "AliasService": id}},
		}},
	})
}

func (f *fleet) close() error {
	var enders errgroup.Group
	enders.SetLimit(len(f.bench.cpus))
	for _, a := range f.list {
		enders.Go(func() (err error) {
			if a.proxy != nil {
				err = a.proxy.stop()
			}
			if a.cgroup != "" {
				err = errors.Join(err, os.Remove(a.cgroup))
			}
			if a.site != nil {
				err = errors.Join(err, a.site.close())
			}
			return err
		})
	}
	return enders.Wait()
}

// interfacePlugin is the first plugin of a chain: the bench has made the
// interface already, and this tells so.
func interfacePlugin() error {
	if os.Getenv("CNI_COMMAND") != "ADD" {
		return nil
	}
	var conf struct {
		CNIVersion string `json:"cniVersion"`
		Address    string `json:"address"`
	}
	if err := json.NewDecoder(os.Stdin).Decode(&conf); err != nil {
		return fmt.Errorf("read network configuration: %w", err)
	}
	return json.NewEncoder(os.Stdout).Encode(object{
		"cniVersion": conf.CNIVersion,
		"interfaces": []object{{"name": os.Getenv("CNI_IFNAME"), "sandbox": os.Getenv("CNI_NETNS")}},
		"ips":        []object{{"version": "4", "interface": 0, "address": conf.Address}},
	})
}
