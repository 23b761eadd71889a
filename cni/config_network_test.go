// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"encoding/json"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/cni/network/attachment"
)

func with(keys string) string {
	return `{"cniVersion":"1.0.0","name":"weir","type":"weir"` + keys + `}`
}

func TestNetworkOfAConflist(t *testing.T) {
	yes, no := true, false
	base := attachment.Config{
		Name: "weir", CNIVersion: "1.0.0", Bridge: DefaultBridge, Gateway: true, Masquerade: true, Hairpin: true,
		IPAM: "host-local", LeaseDir: "/state/leases",
	}
	for keys, change := range map[string]func(*attachment.Config){
		``: func(*attachment.Config) {},
		`,"bridge":"br0","mtu":1400,"forceAddress":true,"portIsolation":true`: func(c *attachment.Config) {
			c.Bridge, c.MTU, c.ForceAddress, c.Isolated = "br0", 1400, true, true
		},
		`,"isGateway":false,"ipMasq":false,"hairpinMode":false`: func(c *attachment.Config) {
			c.Gateway, c.Masquerade, c.Hairpin = false, false, false
		},
		`,"isGateway":false,"isDefaultGateway":true`:      func(c *attachment.Config) { c.DefaultRoute = &yes },
		`,"isDefaultGateway":false`:                       func(c *attachment.Config) { c.DefaultRoute = &no },
		`,"promiscMode":true`:                             func(c *attachment.Config) { c.Promiscuous, c.Hairpin = true, false },
		`,"promiscMode":true,"hairpinMode":false`:         func(c *attachment.Config) { c.Promiscuous, c.Hairpin = true, false },
		`,"ipMasqBackend":"nftables"`:                     func(*attachment.Config) {},
		`,"vlan":0,"vlanTrunk":[],"macspoofchk":false`:    func(*attachment.Config) {},
		`,"preserveDefaultVlan":true,"enabledad":false`:   func(*attachment.Config) {},
		`,"runtimeConfig":{"portMappings":[]}`:            func(*attachment.Config) {},
		`,"runtimeConfig":{"portMappings":[{"x":1}]}`:     func(c *attachment.Config) { c.PortMappings = json.RawMessage(`[{"x":1}]`) },
		`,"ipam":{"type":"host-local"}`:                   func(c *attachment.Config) { c.LeaseDir = "/var/lib/cni/networks" },
		`,"ipam":{"type":"host-local","dataDir":"/lib"}`:  func(c *attachment.Config) { c.LeaseDir = "/lib" },
		`,"ipam":{"type":"static","addresses":[]}`:        func(c *attachment.Config) { c.IPAM, c.LeaseDir = "static", "" },
		`,"dns":{"nameservers":["10.0.0.1"]}`:             func(c *attachment.Config) { c.DNS = types.DNS{Nameservers: []string{"10.0.0.1"}} },
		`,"log_level":"debug","somebodyElses":{"key":[]}`: func(*attachment.Config) {},
	} {
		want := base
		change(&want)
		conf, err := decodeConfig([]byte(with(keys)))
		if err != nil {
			t.Fatal(err)
		}
		got, err := conf.network("/state")
		if err != nil {
			t.Errorf("%s: %v", keys, err)
			continue
		}
		got.Delegate = nil
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", keys, diff)
		}
	}
}

// What the plugin cannot do is refused by name; it is never left out silently.
func TestKeysThatCannotBeHonoured(t *testing.T) {
	for keys, tt := range map[string]struct {
		code uint
		part string
	}{
		`,"vlan":100`:                                  {types.ErrUnsupportedField, "vlan"},
		`,"vlanTrunk":[{"id":1}]`:                      {types.ErrUnsupportedField, "vlanTrunk"},
		`,"macspoofchk":true`:                          {types.ErrUnsupportedField, "macspoofchk"},
		`,"disableContainerInterface":true`:            {types.ErrUnsupportedField, "disableContainerInterface"},
		`,"enabledad":true`:                            {types.ErrUnsupportedField, "enabledad"},
		`,"ipMasqBackend":"iptables"`:                  {types.ErrUnsupportedField, "ipMasqBackend"},
		`,"runtimeConfig":{"mac":"02:00:00:00:00:01"}`: {types.ErrUnsupportedField, "runtimeConfig.mac"},
		`,"promiscMode":true,"hairpinMode":true`:       {types.ErrInvalidNetworkConfig, "promiscMode"},
		`,"bridge":"a-name-that-is-too-long"`:          {types.ErrInvalidNetworkConfig, "bridge"},
		`,"bridge":"../x"`:                             {types.ErrInvalidNetworkConfig, "bridge"},
		`,"bridge":7`:                                  {types.ErrInvalidNetworkConfig, "bridge"},
		`,"mtu":-1`:                                    {types.ErrInvalidNetworkConfig, "mtu"},
		`,"mtu":"1500"`:                                {types.ErrInvalidNetworkConfig, "mtu"},
		`,"hairpinMode":"yes"`:                         {types.ErrInvalidNetworkConfig, "hairpinMode"},
		`,"ipam":"host-local"`:                         {types.ErrInvalidNetworkConfig, "ipam"},
		`,"ipam":{"subnet":"10.0.0.0/8"}`:              {types.ErrInvalidNetworkConfig, "ipam.type"},
		`,"ipam":{"type":"../sh"}`:                     {types.ErrInvalidNetworkConfig, "ipam.type"},
		`,"runtimeConfig":{"portMappings":{}}`:         {types.ErrInvalidNetworkConfig, "runtimeConfig"},
	} {
		b := newBench()
		wantError(t, b.Add(call(meshArgs, with(keys))), tt.code, "network weir", tt.part)
		if len(b.net.calls) != 0 || !b.fake.untouched() || b.stdout.Len() != 0 {
			t.Errorf("%s: left behind: %v, %+v, stdout %q", keys, b.net.calls, b.fake, b.stdout.String())
		}
		if err := b.Del(call("", with(keys))); err != nil {
			t.Errorf("DEL with %s: %v: want it to pass", keys, err)
		}
	}
}

func TestInterfaceKeysBehindAnotherPlugin(t *testing.T) {
	for _, key := range interfaceKeys() {
		b := newBench()
		wantError(t, b.Add(call(meshArgs, with(`,"prevResult":`+prevJSON+`,"`+key+`":"x"`))), types.ErrUnsupportedField, key)
		if !b.fake.untouched() || b.stdout.Len() != 0 {
			t.Errorf("%s: left behind: %+v, stdout %q", key, b.fake, b.stdout.String())
		}
	}
}
