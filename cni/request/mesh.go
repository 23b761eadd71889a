// SPDX-License-Identifier: MPL-2.0

package request

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/weirmesh/weir/redirect/workload"
)

// meshConfig is Consul's redirection config as Nomad sends it. The fields stay
// undecoded here, so that an error can name the one that is wrong. Fields that
// are not listed are ignored: NetNS and IptablesProvider among them.
type meshConfig struct {
	argument string // the name it came under

	ConsulDNSIP          json.RawMessage
	ConsulDNSPort        json.RawMessage
	ProxyUserID          json.RawMessage
	ProxyInboundPort     json.RawMessage
	ProxyOutboundPort    json.RawMessage
	ExcludeInboundPorts  json.RawMessage
	ExcludeOutboundPorts json.RawMessage
	ExcludeOutboundCIDRs json.RawMessage
	ExcludeUIDs          json.RawMessage
}

// unnamedPort is how Nomad writes a static port whose number inside it does not know.
const unnamedPort = "0"

// mesh is Consul's config in the arguments, or nil when they have none.
func (a Args) mesh() (*meshConfig, error) {
	if len(a.Mesh) == 0 {
		return nil, nil
	}
	first := a.Mesh[0]
	for _, other := range a.Mesh[1:] {
		if other.Value != first.Value {
			return nil, refuse(WrongArguments, fmt.Errorf("CNI_ARGS: %s and %s differ: it is not clear what to redirect", first.Key, other.Key))
		}
	}
	mesh := &meshConfig{argument: first.Key}
	if err := json.Unmarshal([]byte(first.Value), mesh); err != nil {
		return nil, refuse(NotJSON, fmt.Errorf("%s: want a JSON object: %w", first.Key, err))
	}
	return mesh, nil
}

// UnnamedPorts counts the static ports that Consul's config has and could not name.
func (a Args) UnnamedPorts() (count int) {
	mesh, err := a.mesh()
	if err != nil || mesh == nil {
		return 0
	}
	list, err := decodeList(mesh.ExcludeInboundPorts)
	if err != nil {
		return 0
	}
	for _, port := range list {
		if port == unnamedPort {
			count++
		}
	}
	return count
}

// decode fills a request with what the config says.
func (m *meshConfig) decode(request *workload.Request) error {
	request.Mode = workload.ModeTransparent
	fields := []struct {
		name   string
		value  json.RawMessage
		decode func(json.RawMessage, *workload.Request) error
	}{
		{"ProxyUserID", m.ProxyUserID, decodeProxyUID},
		{"ProxyInboundPort", m.ProxyInboundPort, decodeInboundPort},
		{"ProxyOutboundPort", m.ProxyOutboundPort, decodeOutboundPort},
		{"ConsulDNSIP", m.ConsulDNSIP, decodeDNSAddress},
		{"ConsulDNSPort", m.ConsulDNSPort, decodeDNSPort},
		{"ExcludeInboundPorts", m.ExcludeInboundPorts, decodeExcludedInbound},
		{"ExcludeOutboundPorts", m.ExcludeOutboundPorts, decodeExcludedOutbound},
		{"ExcludeOutboundCIDRs", m.ExcludeOutboundCIDRs, decodeExcludedCIDRs},
		{"ExcludeUIDs", m.ExcludeUIDs, decodeExcludedUIDs},
	}
	for _, field := range fields {
		if err := field.decode(field.value, request); err != nil {
			return fmt.Errorf("%s: %s: %w", m.argument, field.name, err)
		}
	}
	return nil
}

func decodeProxyUID(raw json.RawMessage, request *workload.Request) error {
	text, err := decodeText(raw)
	if err != nil {
		return err
	}
	if text == "" {
		return errors.New("missing: the proxy cannot be told from the workload without it")
	}
	request.ProxyUID, err = parseUID(text)
	return err
}

func decodeInboundPort(raw json.RawMessage, request *workload.Request) error {
	port, err := decodePort(raw)
	if err != nil {
		return err
	}
	request.InboundPort = port
	return nil
}

func decodeOutboundPort(raw json.RawMessage, request *workload.Request) error {
	port, err := decodePort(raw)
	if err != nil {
		return err
	}
	if port == 0 {
		port = workload.DefaultOutboundPort
	}
	if port == request.InboundPort {
		return fmt.Errorf("%d: the proxy's inbound listener has it too", port)
	}
	request.OutboundPort = port
	return nil
}

func decodeDNSAddress(raw json.RawMessage, request *workload.Request) error {
	text, err := decodeText(raw)
	if err != nil || text == "" {
		return err
	}
	addr, err := parseAddress(text)
	if err != nil {
		return err
	}
	if addr.IsUnspecified() || addr.IsMulticast() {
		return fmt.Errorf("%s: not an address of a server", Quote(text))
	}
	request.DNS.Address = addr
	return nil
}

func decodeDNSPort(raw json.RawMessage, request *workload.Request) error {
	port, err := decodePort(raw)
	request.DNS.Port = port
	return err
}

func decodeExcludedInbound(raw json.RawMessage, request *workload.Request) error {
	list, err := decodeList(raw)
	if err != nil {
		return err
	}
	var named []string
	for _, text := range list {
		if text == unnamedPort {
			request.Notes = append(request.Notes, `ExcludeInboundPorts "0": a static port without "to"; the request does not say which, so connections to it reach the proxy until it is known`)
			continue
		}
		named = append(named, text)
	}
	request.ExcludeInboundPorts, err = parsePorts(named)
	return err
}

func decodeExcludedOutbound(raw json.RawMessage, request *workload.Request) error {
	list, err := decodeList(raw)
	if err != nil {
		return err
	}
	request.ExcludeOutboundPorts, err = parsePorts(list)
	return err
}

func decodeExcludedCIDRs(raw json.RawMessage, request *workload.Request) error {
	list, err := decodeList(raw)
	if err != nil {
		return err
	}
	for _, text := range list {
		cidr, err := parseCIDR(text)
		if err != nil {
			return err
		}
		request.ExcludeOutboundCIDRs = append(request.ExcludeOutboundCIDRs, cidr)
	}
	return nil
}

func decodeExcludedUIDs(raw json.RawMessage, request *workload.Request) error {
	list, err := decodeList(raw)
	if err != nil {
		return err
	}
	for _, text := range list {
		uid, err := parseUID(text)
		if err != nil {
			return err
		}
		request.ExcludeUIDs = append(request.ExcludeUIDs, uid)
	}
	return nil
}
