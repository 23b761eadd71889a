// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"encoding/json"
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/redirect/workload"
)

// FuzzStdin holds the configuration that a runtime hands over: it is refused by a CNI
// error in one line, or its paths are absolute and its lists can be read.
func FuzzStdin(f *testing.F) {
	for _, seed := range []string{
		"", "null", "[]", "{}", everyJobArg(), `{"name":"n","cniVersion":"1.0.0","pinDir":"relative"}`,
		`{"name":"n","cniVersion":"1.0.0","prevResult":{"cniVersion":"1.0.0","ips":[{"address":"172.26.64.2/20","interface":0}],"interfaces":[{"name":"eth0","sandbox":"/x"}]}}`,
		`{"name":"n\n","cniVersion":"9.9.9","prevResult":{"ips":7},"cni.dev/valid-attachments":[{"containerID":"","ifname":"eth0"}]}`,
		`{"name":"n","prevResult":{"cniVersion":"0.2.0"},"cni.dev/attachments":null,"ipam":{}}`,
		`{"name":"n","bridge":"a/b","mtu":1,"ipMasq":"x","dns":7}`, `{"name":"n","ipam":{"type":"../host-local","dataDir":7},"promiscMode":true,"hairpinMode":false}`,
		`{"name":"n","vlan":3}`, `{"name":"n","mtu":1500,"bridge":"weir0","runtimeConfig":{"portMappings":[{"hostPort":1}],"mac":"x"}}`,
		`{"name":"n","cniVersion":"1.0.0","prevResult":{"cniVersion":"1.0.0","ips":[{"address":"127.0.0.1/8"},null,{"address":"::ffff:224.0.0.1/128","interface":-1}]}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, stdin []byte) {
		conf, err := parseConfig(stdin)
		if err != nil {
			var told *types.Error
			if !errors.As(err, &told) || told.Msg == "" {
				t.Errorf("%q: %v is no CNI error with a message", stdin, err)
			}
			var keys map[string]json.RawMessage
			named := func(key string) bool { return strings.Contains(strings.ToLower(told.Msg), strings.ToLower(key)) }
			if json.Unmarshal(stdin, &keys) == nil && told != nil && !slices.ContainsFunc(slices.Collect(maps.Keys(keys)), named) {
				t.Errorf("%q: the error names no key: %v", stdin, err)
			}
			return
		}
		for _, path := range []string{conf.PinDir, conf.StateDir, conf.CgroupRoot} {
			if path != "" && !filepath.IsAbs(path) {
				t.Errorf("%q: path %q is taken", stdin, path)
			}
		}
		valid, err := conf.validAttachments()
		for _, key := range valid {
			if err != nil || key.ContainerID == "" || key.IfName == "" {
				t.Errorf("%q: valid is %v, %v", stdin, valid, err)
			}
		}
		if conf.previous != nil {
			wantAddresses(t, stdin, conf.previous)
		}
		wantNetwork(t, stdin, conf)
	})
}

// wantAddresses holds a previous result that can be read.
func wantAddresses(t *testing.T, stdin []byte, previous *result) {
	t.Helper()
	list, err := previous.addresses()
	if err != nil && !strings.Contains(err.Error(), "ips") {
		t.Errorf("%q: the error names no field: %v", stdin, err)
	}
	for _, addr := range list {
		if !addr.IsValid() || addr.Is4In6() || addr.IsLoopback() || addr.IsUnspecified() || addr.IsMulticast() {
			t.Errorf("%q: an allocation has the address %s", stdin, addr)
		}
	}
}

// wantNetwork holds the keys of a network that the plugin builds: they are refused by
// the name of one, or make devices and an IPAM plugin that there can be.
func wantNetwork(t *testing.T, stdin []byte, conf *netConf) {
	t.Helper()
	got, err := conf.network("/state")
	if err != nil {
		var told *types.Error
		named := func(key string) bool { return strings.Contains(strings.ToLower(err.Error()), strings.ToLower(key)) }
		if !errors.As(err, &told) || !slices.ContainsFunc(append(interfaceKeys(), "dns", "runtimeConfig"), named) {
			t.Errorf("%q: the error names no key of a network: %v", stdin, err)
		}
		return
	}
	if got.Bridge == "" || len(got.Bridge) > 15 || strings.ContainsAny(got.Bridge, "/ \n") || got.MTU != 0 && (got.MTU < 68 || got.MTU > 65535) {
		t.Errorf("%q: bridge %q with MTU %d", stdin, got.Bridge, got.MTU)
	}
	if got.IPAM == "" || strings.Contains(got.IPAM, "/") || !json.Valid(got.Delegate) || got.Hairpin && got.Promiscuous {
		t.Errorf("%q: %+v", stdin, got)
	}
	if got.PortMappings != nil && !json.Valid(got.PortMappings) {
		t.Errorf("%q: port mappings %q", stdin, got.PortMappings)
	}
}

// FuzzConsulConfig holds what Nomad hands over of Consul's: it is refused with the
// argument's name and nothing is done, or the data path takes what is made of it.
func FuzzConsulConfig(f *testing.F) {
	for _, seed := range []string{
		`{"ConsulDNSIP":"127.0.0.1","ConsulDNSPort":8600,"ProxyUserID":"101","ProxyInboundPort":20000,"ProxyOutboundPort":15001,
			"ExcludeInboundPorts":["9001"],"ExcludeOutboundPorts":["443"],"ExcludeOutboundCIDRs":["10.0.0.0/8"],"ExcludeUIDs":["100"],"NetNS":"","IptablesProvider":null}`,
		`{}`, `null`, `7`, `{"ProxyInboundPort":15001,"ProxyOutboundPort":15001}`, `{"ProxyUserID":4294967295,"ProxyInboundPort":0}`,
		`{"ProxyInboundPort":65536}`, `{"ProxyInboundPort":1,"ExcludeOutboundPorts":["1:65535","9:1"],"ExcludeOutboundCIDRs":["::ffff:1.2.3.4/97","1.2.3.4"]}`,
		`{"ProxyInboundPort":1,"ExcludeUIDs":["-1","root"],"ConsulDNSIP":"::1"}`, `{"ConsulDNSPort":53}`,
	} {
		f.Add(seed)
	}
	conf := everyJobArg()
	f.Fuzz(func(t *testing.T, config string) {
		if strings.ContainsAny(config, ";\x00") {
			return // an argument ends there, an environment holds none
		}
		for _, argument := range []string{"CONSUL_IPTABLES_CONFIG", "CONSUL_NFTABLES_CONFIG"} {
			fuzzConsulConfig(t, argument, config, conf)
		}
	})
}

func fuzzConsulConfig(t *testing.T, argument, config, conf string) {
	b := newBench()
	if err := b.Add(call(argument+"="+config, conf)); err != nil {
		if !b.fake.untouched() {
			t.Errorf("%q: refused with %q, and the data path has %+v", config, err, b.fake)
		}
		if json.Valid([]byte(config)) && !strings.Contains(err.Error(), argument) {
			t.Errorf("%q: the error does not name the argument: %v", config, err)
		}
		return
	}
	if len(b.fake.added) != 1 {
		t.Fatalf("%q: taken, and %d workloads were added", config, len(b.fake.added))
	}
	request := b.fake.added[0].Request
	if err := workload.Merge(request, workload.MeshConfig{}).Validate(); err != nil {
		t.Errorf("%q: the data path would refuse it: %v", config, err)
	}
	if request.Mode != workload.ModeTransparent {
		t.Errorf("%q: the mode is %s", config, request.Mode)
	}
}
