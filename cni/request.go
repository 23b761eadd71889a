// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/redirect"
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

// mesh is Consul's config in the arguments, or nil when they have none.
func (r caller) mesh(args arguments) (*meshConfig, error) {
	if len(args.mesh) == 0 {
		return nil, nil
	}
	first := args.mesh[0]
	for _, other := range args.mesh[1:] {
		if other.value != first.value {
			return nil, r.argError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf(
				"CNI_ARGS: %s and %s differ: it is not clear what to redirect", first.key, other.key))
		}
	}
	mesh := &meshConfig{argument: first.key}
	if err := json.Unmarshal([]byte(first.value), mesh); err != nil {
		return nil, r.argError(types.ErrDecodingFailure, fmt.Sprintf("%s: want a JSON object: %v", first.key, err))
	}
	return mesh, nil
}

// request is the workload that the allocation asks for: by Consul's config, by
// the job's own arguments, or by both, where the second add to the first; nil
// where it asks for nothing. It has no addresses yet. Its errors name the
// allocation and the field or the key.
func (p *Plugin) request(r caller, args arguments, conf *netConf) (*workload.Request, error) {
	if args.none() {
		return nil, nil
	}
	mesh, err := r.mesh(args)
	if err != nil {
		return nil, err
	}
	asked := jobRequest{Request: workload.Request{Network: conf.Name, Job: r.job}, consul: mesh != nil}
	if mesh != nil {
		if err := mesh.decode(&asked.Request); err != nil {
			return nil, r.argError(types.ErrInvalidEnvironmentVariables, err.Error())
		}
	}
	if len(args.own) > 0 || asked.excludesOutbound() {
		operator, err := readPolicy(conf.policyConf, p.ConfigDir)
		if err != nil {
			return nil, r.argError(types.ErrInvalidNetworkConfig, fmt.Sprintf("read the operator's policy: %v", err))
		}
		if err := asked.withJobArgs(args.own, mesh, operator); err != nil {
			return nil, r.argError(types.ErrInvalidEnvironmentVariables, err.Error())
		}
	}
	forwards, err := conf.forwards()
	if err != nil {
		return nil, r.argError(types.ErrInvalidNetworkConfig, err.Error())
	}
	asked.Forward = asked.Forward || forwards
	request := asked.finish(mesh)
	return &request, nil
}

// attachment is the request for the namespace of a call, with the addresses
// that the result names.
func (r caller) attachment(cmd *skel.CmdArgs, conf *netConf, request workload.Request) (redirect.Attachment, error) {
	var err error
	if request.Addresses, err = conf.previous.addresses(); err != nil {
		return redirect.Attachment{}, r.argError(types.ErrInvalidNetworkConfig, fmt.Sprintf("prevResult: %v", err))
	}
	return redirect.Attachment{Key: keyOf(cmd), NetNS: cmd.Netns, Request: request}, nil
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
		return fmt.Errorf("%s: not an address of a server", quote(text))
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
		if text == "0" {
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

// decode reads a field; one that is absent or null is the zero value.
func decode[T any](raw json.RawMessage, want string) (T, error) {
	var value T
	if len(raw) == 0 {
		return value, nil
	}
	if err := json.Unmarshal(raw, &value); err != nil {
		return value, fmt.Errorf("%s: want %s", shorten(string(raw)), want)
	}
	return value, nil
}

func decodeText(raw json.RawMessage) (string, error) { return decode[string](raw, "a string") }

func decodeList(raw json.RawMessage) ([]string, error) {
	return decode[[]string](raw, "a list of strings")
}

// decodePort reads a port that is a number in JSON; 0 and absent are the same.
func decodePort(raw json.RawMessage) (uint16, error) {
	return decode[uint16](raw, "a number, 0 to 65535")
}

// parseUID reads a user's number. The one after the last is the kernel's word
// for no user.
func parseUID(text string) (uint32, error) {
	const last = math.MaxUint32 - 1
	n, err := strconv.ParseUint(text, 10, 32)
	if err != nil || n > last {
		return 0, fmt.Errorf("%s: want the user's number, 0 to %d, not a name or a range", quote(text), uint32(last))
	}
	return uint32(n), nil
}

// parsePorts reads ports and ranges "low:high", of which either end may be
// left out, into a sorted list that names every port once. Its cost does not
// depend on how much the ranges overlap.
func parsePorts(list []string) ([]uint16, error) {
	type span struct{ low, high uint16 }
	spans := make([]span, 0, len(list))
	for _, text := range list {
		low, high, err := parsePortRange(text)
		if err != nil {
			return nil, err
		}
		spans = append(spans, span{low, high})
	}
	slices.SortFunc(spans, func(a, b span) int { return int(a.low) - int(b.low) })
	var ports []uint16
	next := 1 // the lowest port that is not in ports yet
	for _, s := range spans {
		for next = max(next, int(s.low)); next <= int(s.high); next++ {
			ports = append(ports, uint16(next))
		}
	}
	return ports, nil
}

func parsePortRange(text string) (low, high uint16, err error) {
	first, last, isRange := strings.Cut(text, ":")
	if !isRange {
		last = first
	} else {
		if first == "" {
			first = "1"
		}
		if last == "" {
			last = "65535"
		}
	}
	from, errFrom := strconv.ParseUint(first, 10, 16)
	to, errTo := strconv.ParseUint(last, 10, 16)
	if errFrom != nil || errTo != nil || from == 0 || text == ":" {
		return 0, 0, fmt.Errorf("%s: want a port, 1 to 65535, or a range low:high", quote(text))
	}
	if from > to {
		return 0, 0, fmt.Errorf("%s: the range ends before it begins", quote(text))
	}
	return uint16(from), uint16(to), nil
}

func parseAddress(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil || addr.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("%s: want an IPv4 or IPv6 address", quote(text))
	}
	return addr.Unmap(), nil
}

// parseCIDR reads a prefix, or an address as the prefix of itself alone. A
// prefix of IPv4 that is written as IPv6 is one of IPv4.
func parseCIDR(text string) (netip.Prefix, error) {
	if !strings.Contains(text, "/") {
		addr, err := parseAddress(text)
		if err != nil {
			return netip.Prefix{}, fmt.Errorf("%s: want an IPv4 or IPv6 address or CIDR", quote(text))
		}
		return netip.PrefixFrom(addr, addr.BitLen()), nil
	}
	cidr, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("%s: want an IPv4 or IPv6 address or CIDR", quote(text))
	}
	if cidr.Addr().Is4In6() && cidr.Bits() >= 96 {
		cidr = netip.PrefixFrom(cidr.Addr().Unmap(), cidr.Bits()-96)
	}
	return cidr.Masked(), nil
}

// quote shows a text of the request's in an error: on one line, and not all
// of it when it is long.
func quote(text string) string { return shorten(strconv.Quote(text)) }

func shorten(text string) string {
	const most = 80
	if len(text) > most {
		return text[:most] + "..."
	}
	return text
}
