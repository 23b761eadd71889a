// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/weirmesh/weir/redirect/store"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/test"
)

// Nomad reads every file of the directory and looks for the network's name in
// lower case. That it is the name of the file is a courtesy.
func TestConflistsAreFoundAsNomadDoes(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"weir", "weir-chained"} {
		content, err := files.ReadFile(name + ".conflist")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name+".conflist"), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for name, plugins := range map[string]string{"weir": "weir", "weir-chained": "loopback bridge firewall portmap weir"} {
		list, err := libcni.LoadConfList(dir, name)
		if err != nil {
			t.Fatal(err)
		}
		var types, capable []string
		for _, plugin := range list.Plugins {
			types = append(types, plugin.Network.Type)
			if plugin.Network.Capabilities["portMappings"] {
				capable = append(capable, plugin.Network.Type)
			}
		}
		if got := strings.Join(types, " "); got != plugins || list.CNIVersion != "1.0.0" || list.Name != strings.ToLower(list.Name) {
			t.Errorf("%s has %q in version %s; want %q in 1.0.0", list.Name, got, list.CNIVersion, plugins)
		}
		if len(capable) != 1 {
			t.Errorf("%s: %q take port mappings, want one", name, capable)
		}
	}
}

// Both networks, with libcni and real plugins, for an allocation with a
// transparent proxy and a host port: address, redirect and port are there
// after ADD, and nothing is after DEL.
func TestConflistsMakeNetworks(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF, test.Tool("iptables"), test.Tool("nft"))
	reference, source := test.CNIPath(t), built(t)
	for _, name := range []string{"weir", "weir-chained"} {
		t.Run(name, func(t *testing.T) {
			n := emptyNode(t)
			n.install(t, source, false)
			useConflist(t, n, privatePaths(t), name, reference)
		})
	}
}

// privatePaths are those of a data path of the test's own, which plugins find in the
// environment.
func privatePaths(t *testing.T) store.Paths {
	t.Helper()
	paths := store.Paths{PinDir: filepath.Join(test.BPFFS(t), "weir"), StateDir: t.TempDir()}
	t.Setenv("WEIR_PIN_DIR", paths.PinDir)
	t.Setenv("WEIR_STATE_DIR", paths.StateDir)
	t.Cleanup(func() {
		if _, err := redirect.New(paths).Unload(); err != nil {
			t.Errorf("unload: %v", err)
		}
	})
	return paths
}

// conflist is an installed one. Nothing is changed in it but where leases go: this
// machine may have its own.
func (n Node) conflist(t *testing.T, name string) []byte {
	t.Helper()
	content, err := os.ReadFile(n.on("/opt/cni/config/" + name + ".conflist"))
	if err != nil {
		t.Fatal(err)
	}
	for _, leases := range []string{"/var/run/cni", "/run/weir/leases"} {
		content = bytes.ReplaceAll(content, []byte(`"`+leases+`"`), []byte(`"`+t.TempDir()+`"`))
	}
	return content
}

// consulArgument is what Nomad hands to a plugin for a transparent_proxy block.
const consulArgument = `{"ProxyUserID":"101","ProxyInboundPort":20000,"ProxyOutboundPort":15001,"ExcludeInboundPorts":["8080"]}`

func useConflist(t *testing.T, n Node, paths store.Paths, name, reference string) {
	list, err := libcni.ConfListFromBytes(n.conflist(t, name))
	if err != nil {
		t.Fatal(err)
	}
	const id = "0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01"
	host, allocation := test.NewNetNS(t), test.NewBareNetNS(t)
	network := libcni.NewCNIConfigWithCacheDir([]string{n.on("/opt/cni/bin"), reference}, t.TempDir(), nil)
	runtime := &libcni.RuntimeConf{
		ContainerID: id, NetNS: allocation.Path, IfName: "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "true"}, {"NOMAD_ALLOC_ID", id}, {"NOMAD_JOB_ID", "demo"},
			{"CONSUL_IPTABLES_CONFIG", consulArgument},
		},
		CapabilityArgs: map[string]any{"portMappings": []map[string]any{{"hostPort": 18080, "containerPort": 8080, "protocol": "tcp"}}},
	}
	onHost := func(action func() error) {
		t.Helper()
		host.Do(func() { err = action() })
		if err != nil {
			t.Fatal(err)
		}
	}

	var address netip.Addr
	onHost(func() error {
		result, err := network.AddNetworkList(t.Context(), list, runtime)
		if err != nil {
			return fmt.Errorf("ADD: %w", err)
		}
		added, err := current.NewResultFromResult(result)
		if err != nil || len(added.IPs) != 1 {
			return fmt.Errorf("result %+v has not one address: %w", result, err)
		}
		address, _ = netip.AddrFromSlice(added.IPs[0].Address.IP)
		return nil
	})
	onHost(func() error { return network.CheckNetworkList(t.Context(), list, runtime) })
	wantRedirected(t, paths, allocation, address)
	test.Echo(t, allocation, "tcp4", "0.0.0.0:8080")
	gateway := firstOf(address)
	if _, err := test.Ask(host, "tcp4", netip.AddrPortFrom(gateway, 18080).String()); err != nil {
		t.Errorf("dial the host port: %v", err)
	}

	onHost(func() error { return network.DelNetworkList(t.Context(), list, runtime) })
	wantNothingLeft(t, paths, host)
}

// wantRedirected wants the one allocation on record, with its address, and its
// connections refused as there is no proxy.
func wantRedirected(t *testing.T, paths store.Paths, allocation *test.NetNS, address netip.Addr) {
	t.Helper()
	known, err := redirect.New(paths).Records()
	if err != nil || len(known) != 1 || !slices.Contains(known[0].Request.Addresses, address.Unmap()) {
		t.Errorf("on record: %+v, %v; want the allocation with address %s", known, err, address)
	}
	if _, err := test.Ask(allocation, "tcp4", "192.0.2.1:80"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial without a proxy = %v, want ECONNREFUSED", err)
	}
}

// wantNothingLeft wants no allocation on record, and no device of one on the host.
func wantNothingLeft(t *testing.T, paths store.Paths, host *test.NetNS) {
	t.Helper()
	if known, err := redirect.New(paths).Records(); err != nil || len(known) > 0 {
		t.Errorf("still on record: %+v, %v", known, err)
	}
	host.Do(func() {
		links, err := netlink.LinkList()
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range links {
			if link.Type() == "veth" {
				t.Errorf("device %s is left", link.Attrs().Name)
			}
		}
	})
}

// firstOf is the first address of the /20 that an address is in: the bridge's.
func firstOf(address netip.Addr) netip.Addr {
	prefix, _ := address.Unmap().Prefix(20)
	return prefix.Addr().Next()
}
