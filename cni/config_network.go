// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/delegate"
	"github.com/weirmesh/weir/redirect/store"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/weirmesh/weir/cni/request"
	"golang.org/x/sys/unix"
)

// What a network has unless its conflist says otherwise. The subnet lies in the
// same /16 as that of Nomad's own bridge mode, and beside it.
const (
	DefaultBridge = "weir0"
	DefaultSubnet = "172.26.128.0/20"
)

// networkKeys are the keys of the reference bridge plugin that the plugin reads
// where it builds the network itself. Behind another plugin each is refused.
//
//	bridge            name of the bridge; "weir0"
//	mtu               of the devices; that of the node's default route
//	isGateway         the bridge has the gateway's address, the node forwards; true
//	isDefaultGateway  a default route by it; where the IPAM plugin names no route
//	forceAddress      replace another address of the same subnet on the bridge; false
//	ipMasq            hide the addresses behind the node's; true
//	hairpinMode       an allocation reaches itself and its neighbours by a host port; true
//	promiscMode       the bridge is promiscuous, in the place of hairpinMode; false
//	portIsolation     allocations do not reach each other over the bridge; false
//	ipam              as of any plugin; host-local with "172.26.128.0/20"
//	dns               as of any plugin; what the IPAM plugin says
//
// runtimeConfig.portMappings comes by the capability of that name.
type networkKeys struct {
	Bridge           string
	MTU              int
	IsGateway        *bool
	IsDefaultGateway *bool
	ForceAddress     bool
	IPMasq           *bool
	IPMasqBackend    string
	HairpinMode      *bool
	PromiscMode      bool
	PortIsolation    bool
	IPAM             json.RawMessage
	DNS              types.DNS
	RuntimeConfig    struct {
		PortMappings []json.RawMessage
		MAC          string
	}
}

// interfaceKeys are the keys of the reference bridge plugin. Whoever sets one
// wants an interface made.
func interfaceKeys() []string {
	return append(unsupportedKeys(), "preserveDefaultVlan",
		"bridge", "isGateway", "isDefaultGateway", "forceAddress", "ipMasq", "ipMasqBackend", "mtu", "hairpinMode",
		"ipam", "promiscMode", "portIsolation")
}

// unsupportedKeys are those of them that the plugin does not do.
func unsupportedKeys() []string {
	return []string{"vlan", "vlanTrunk", "macspoofchk", "disableContainerInterface", "enabledad"}
}

// wantsInterface reports a configuration that can only be one of main mode.
func (c *netConf) wantsInterface() bool {
	return slices.ContainsFunc(interfaceKeys(), func(key string) bool { return decodeKey(c.keys[key]) })
}

// network reads what main mode needs. Keys that it cannot honour are refused by
// name; a value that asks for nothing, such as false or 0, is none.
func (c *netConf) network(stateDir string) (attachment.Config, error) {
	none := attachment.Config{}
	for _, key := range unsupportedKeys() {
		if decodeKey(c.keys[key]) {
			return none, c.refuse(types.ErrUnsupportedField, "%s: the plugin does not do this: remove the key, or chain the plugin after one that does", key)
		}
	}
	var keys networkKeys
	for _, field := range []struct {
		key  string
		into any
	}{
		{"bridge", &keys.Bridge},
		{"mtu", &keys.MTU},
		{"isGateway", &keys.IsGateway},
		{"isDefaultGateway", &keys.IsDefaultGateway},
		{"forceAddress", &keys.ForceAddress},
		{"ipMasq", &keys.IPMasq},
		{"ipMasqBackend", &keys.IPMasqBackend},
		{"hairpinMode", &keys.HairpinMode},
		{"promiscMode", &keys.PromiscMode},
		{"portIsolation", &keys.PortIsolation},
		{"ipam", &keys.IPAM},
		{"dns", &keys.DNS},
		{"runtimeConfig", &keys.RuntimeConfig},
	} {
		value, ok := c.keys[field.key]
		if !ok {
			continue
		}
		if err := json.Unmarshal(value, field.into); err != nil {
			return none, c.refuse(types.ErrInvalidNetworkConfig, "%s: %v", field.key, err)
		}
	}
	if err := c.validate(&keys); err != nil {
		return none, err
	}
	conf := attachment.Config{
		Name: c.Name, CNIVersion: c.CNIVersion,
		Bridge:       keys.Bridge,
		MTU:          keys.MTU,
		Gateway:      orTrue(keys.IsGateway) || keys.IsDefaultGateway != nil && *keys.IsDefaultGateway,
		DefaultRoute: keys.IsDefaultGateway,
		ForceAddress: keys.ForceAddress,
		Masquerade:   orTrue(keys.IPMasq),
		Hairpin:      orTrue(keys.HairpinMode) && !keys.PromiscMode,
		Promiscuous:  keys.PromiscMode,
		Isolated:     keys.PortIsolation,
		DNS:          keys.DNS,
	}
	if conf.Bridge == "" {
		conf.Bridge = DefaultBridge
	}
	if len(keys.RuntimeConfig.PortMappings) > 0 {
		conf.PortMappings, _ = json.Marshal(keys.RuntimeConfig.PortMappings)
	}
	return conf, c.delegate(&conf, keys.IPAM, stateDir)
}

func (c *netConf) validate(keys *networkKeys) error {
	switch {
	case len(keys.Bridge) >= unix.IFNAMSIZ || keys.Bridge == "." || keys.Bridge == ".." || strings.ContainsAny(keys.Bridge, "/: \t\n"):
		return c.refuse(types.ErrInvalidNetworkConfig, "bridge %s: not a name of a device", request.Quote(keys.Bridge))
	case keys.MTU != 0 && (keys.MTU < 68 || keys.MTU > 65535):
		return c.refuse(types.ErrInvalidNetworkConfig, "mtu %d: want 68 to 65535", keys.MTU)
	case keys.IPMasqBackend != "" && keys.IPMasqBackend != "nftables":
		return c.refuse(types.ErrUnsupportedField, "ipMasqBackend %s: the plugin speaks nftables to the kernel, and needs no iptables: remove the key", request.Quote(keys.IPMasqBackend))
	case keys.PromiscMode && keys.HairpinMode != nil && *keys.HairpinMode:
		return c.refuse(types.ErrInvalidNetworkConfig, "promiscMode and hairpinMode: want one of the two")
	case keys.RuntimeConfig.MAC != "":
		return c.refuse(types.ErrUnsupportedField, "runtimeConfig.mac: the plugin does not do this: remove the capability mac")
	}
	return nil
}

// delegate is the configuration for the IPAM plugin: the conflist's own, with
// host-local and its subnet where it names none. The leases of such a default
// lie beside the records, and end with the node's namespaces at a reboot.
func (c *netConf) delegate(conf *attachment.Config, ipam json.RawMessage, stateDir string) error {
	if !decodeKey(ipam) {
		ipam, _ = json.Marshal(map[string]any{
			"type": delegate.HostLocal, "dataDir": filepath.Join(stateDir, "leases"),
			"ranges": [][]map[string]string{{{"subnet": DefaultSubnet}}},
		})
	}
	var named struct{ Type, DataDir string }
	if err := json.Unmarshal(ipam, &named); err != nil {
		return c.refuse(types.ErrInvalidNetworkConfig, "ipam: %v", err)
	}
	if named.Type == "" || strings.ContainsRune(named.Type, '/') {
		return c.refuse(types.ErrInvalidNetworkConfig, "ipam.type %s: want the name of an IPAM plugin", request.Quote(named.Type))
	}
	conf.IPAM = named.Type
	if named.Type == delegate.HostLocal {
		if conf.LeaseDir = named.DataDir; conf.LeaseDir == "" {
			conf.LeaseDir = "/var/lib/cni/networks"
		}
	}
	keys := map[string]json.RawMessage{}
	for key, value := range c.keys {
		if key != "prevResult" && !strings.HasPrefix(key, "cni.dev/") {
			keys[key] = value
		}
	}
	keys["ipam"] = ipam
	var err error
	if conf.Delegate, err = json.Marshal(keys); err != nil {
		return c.refuse(types.ErrDecodingFailure, "ipam: %v", err)
	}
	return nil
}

// lastResult is what the runtime kept of ADD, as DEL and CHECK get it; nil
// where there is nothing that can be read.
func (c *netConf) lastResult() *current.Result {
	if request.Empty(c.PrevResult) {
		return nil
	}
	last, err := parseResult(c.PrevResult, c.CNIVersion)
	if err != nil {
		return nil
	}
	return last.parsed
}

// names reports whether the last result has an interface of that name.
func (c *netConf) names(device string) bool {
	last := c.lastResult()
	return last != nil && slices.ContainsFunc(last.Interfaces, func(i *current.Interface) bool { return i != nil && i.Name == device })
}

func (c *netConf) stateDir(paths store.Paths) string {
	return paths.Or(c.paths()).Or(store.Paths{StateDir: store.DefaultStateDir}).StateDir
}

func orTrue(value *bool) bool { return value == nil || *value }

// decodeKey reports a JSON value that asks for something.
func decodeKey(value json.RawMessage) bool {
	switch strings.TrimSpace(string(value)) {
	case "", "null", "{}", "[]", "false", "0", `""`:
		return false
	default:
		return true
	}
}
