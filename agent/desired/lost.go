// SPDX-License-Identifier: MPL-2.0

package desired

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strconv"

	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/redirect/workload"
)

// meshConfig is Consul's redirection config as Nomad sends it to plugins.
type meshConfig struct {
	ConsulDNSIP          string
	ConsulDNSPort        uint16
	ProxyUserID          string
	ProxyInboundPort     uint16
	ProxyOutboundPort    uint16
	ExcludeInboundPorts  []string
	ExcludeOutboundPorts []string
	ExcludeOutboundCIDRs []string
	ExcludeUIDs          []string
}

// unnamedPorts counts the static ports that a request could not name.
func unnamedPorts(mesh string) (count int) {
	var config meshConfig
	if mesh == "" || json.Unmarshal([]byte(mesh), &config) != nil {
		return 0
	}
	for _, port := range config.ExcludeInboundPorts {
		if port == "0" {
			count++
		}
	}
	return count
}

// LostRequest is the request of a workload whose record somebody removed, from
// what libcni remembers of its ADD. It takes plain numbers alone: what the
// plugin reads beyond that is refused, never guessed at.
func LostRequest(a discover.Attachment) (*workload.Request, error) {
	if a.JobArgs {
		return nil, fmt.Errorf("restore request of allocation %s: it has arguments weir.*, which the plugin alone reads: restart the Nomad client, whose CHECK restores it, or stop the allocation", a.Job.AllocID)
	}
	var config meshConfig
	if err := json.Unmarshal([]byte(a.Mesh), &config); err != nil {
		return nil, fmt.Errorf("read request of allocation %s: %w", a.Job.AllocID, err)
	}
	uid, err := strconv.ParseUint(config.ProxyUserID, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("read request of allocation %s: ProxyUserID: %w", a.Job.AllocID, err)
	}
	request := &workload.Request{
		Network: a.Network, Job: a.Job, Mode: workload.ModeTransparent, ProxyUID: uint32(uid),
		InboundPort: config.ProxyInboundPort, OutboundPort: config.ProxyOutboundPort, Addresses: a.Addresses,
		DNS: workload.DNS{Port: config.ConsulDNSPort},
	}
	if config.ConsulDNSIP != "" {
		if request.DNS.Address, err = netip.ParseAddr(config.ConsulDNSIP); err != nil {
			return nil, fmt.Errorf("read request of allocation %s: ConsulDNSIP: %w", a.Job.AllocID, err)
		}
	}
	for _, text := range config.ExcludeOutboundCIDRs {
		cidr, err := netip.ParsePrefix(text)
		if err != nil {
			return nil, fmt.Errorf("read request of allocation %s: ExcludeOutboundCIDRs: %w", a.Job.AllocID, err)
		}
		request.ExcludeOutboundCIDRs = append(request.ExcludeOutboundCIDRs, cidr)
	}
	var problems [3]error
	named := slices.DeleteFunc(config.ExcludeInboundPorts, func(port string) bool { return port == "0" })
	request.ExcludeInboundPorts, problems[0] = numbers[uint16](named, 16)
	request.ExcludeOutboundPorts, problems[1] = numbers[uint16](config.ExcludeOutboundPorts, 16)
	request.ExcludeUIDs, problems[2] = numbers[uint32](config.ExcludeUIDs, 32)
	for _, err := range problems {
		if err != nil {
			return nil, fmt.Errorf("read request of allocation %s: exclusions: %w", a.Job.AllocID, err)
		}
	}
	return request, nil
}

func numbers[T uint16 | uint32](list []string, bits int) (parsed []T, err error) {
	for _, text := range list {
		n, err := strconv.ParseUint(text, 10, bits)
		if err != nil {
			return nil, err
		}
		parsed = append(parsed, T(n))
	}
	return parsed, nil
}
