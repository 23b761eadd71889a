// SPDX-License-Identifier: MPL-2.0

package request

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/redirect/workload"
)

// jobArg is a key of network.cni.args that is Weir's.
type jobArg struct {
	name  string // without the prefix
	apply func(value string, asked *jobRequest) error
}

// jobArgs are all keys, in the order in which they are applied: the mode
// first, since others depend on it.
func jobArgs() []jobArg {
	return []jobArg{
		{Mode, applyMode},
		{Guard, applyGuard},
		{Egress, applyEgress},
		{Forward, applyForward},
		{ProxyUID, applyProxyUID},
		{InboundPort, applyInboundPort},
		{OutboundPort, applyOutboundPort},
		{DNS, applyDNS},
		{ExcludeInboundPorts, applyExcludedInbound},
		{ExcludeOutboundPorts, applyExcludedOutbound},
		{ExcludeOutboundCIDRs, applyExcludedCIDRs},
		{ExcludeUIDs, applyExcludedUIDs},
	}
}

func jobArgNames() string { return strings.Join(JobArgs(), ", ") }

// jobRequest is a request while a job's arguments are applied to it.
type jobRequest struct {
	workload.Request
	consul bool // it began as Consul's: what that says must not be contradicted
}

// excludesOutbound reports a request that takes outbound traffic out of the mesh.
func (asked *jobRequest) excludesOutbound() bool {
	return len(asked.ExcludeOutboundPorts)+len(asked.ExcludeOutboundCIDRs)+len(asked.ExcludeUIDs) > 0
}

// withJobArgs adds what the job's own arguments ask for and the operator
// allows.
func (asked *jobRequest) withJobArgs(args []Arg, mesh *meshConfig, operator policy) error {
	if mesh != nil && !operator.consulExclusions && asked.excludesOutbound() {
		return fmt.Errorf("%s: it excludes outbound ports, CIDRs or UIDs, which the operator of this node lets no transparent_proxy block do", mesh.argument)
	}
	if len(args) == 0 {
		return nil
	}
	if mesh == nil {
		asked.ProxyUID = operator.proxyUID
	}
	if err := asked.applyJobArgs(args); err != nil {
		return err
	}
	if err := operator.allow(args); err != nil {
		return err
	}
	if asked.Mode == workload.ModeTransparent && asked.OutboundPort == 0 {
		asked.OutboundPort = workload.DefaultOutboundPort
	}
	if asked.InboundPort != 0 && asked.InboundPort == asked.OutboundPort {
		return fmt.Errorf("port %d: the proxy's inbound and outbound listener cannot both have it", asked.InboundPort)
	}
	return nil
}

// finish is the request, with a note where the proxy's inbound listener is not
// in it.
func (asked *jobRequest) finish(mesh *meshConfig) workload.Request {
	if asked.Mode == workload.ModeTransparent && asked.InboundPort == 0 {
		what := ownPrefix + "inbound-port missing"
		if mesh != nil {
			what = "ProxyInboundPort 0"
		}
		asked.Notes = append(asked.Notes, what+": the request does not name the proxy's inbound listener; inbound connections are refused until it is known")
	}
	return asked.Request
}

// applyJobArgs adds what the arguments ask for. An error names key and value.
func (asked *jobRequest) applyJobArgs(args []Arg) error {
	values := make(map[string]string)
	for _, arg := range args {
		name := strings.TrimPrefix(arg.Key, ownPrefix)
		if !slices.ContainsFunc(jobArgs(), func(known jobArg) bool { return known.name == name }) {
			return fmt.Errorf("%s: unknown: want one of %s, each with %s before it", Quote(arg.Key), jobArgNames(), ownPrefix)
		}
		if _, twice := values[name]; twice {
			return fmt.Errorf("%s: given twice", arg.Key)
		}
		values[name] = arg.Value
	}
	if _, ok := values["mode"]; !ok && !asked.consul {
		return fmt.Errorf("%smode: missing: the other arguments say nothing without it or a transparent_proxy block", ownPrefix)
	}
	for _, arg := range jobArgs() {
		value, ok := values[arg.name]
		if !ok {
			continue
		}
		if err := arg.apply(strings.TrimSpace(value), asked); err != nil {
			return fmt.Errorf("%s%s=%s: %w", ownPrefix, arg.name, shorten(strconv.Quote(value)), err)
		}
	}
	return nil
}

// agree reports a value that Consul's request has otherwise.
func agree[T comparable](asked *jobRequest, theirs, ours T) error {
	var none T
	if asked.consul && theirs != none && theirs != ours {
		return fmt.Errorf("the transparent_proxy block says %v", theirs)
	}
	return nil
}

func (asked *jobRequest) wantTransparent() error {
	if asked.Mode != workload.ModeTransparent {
		return fmt.Errorf("says nothing in mode %s, where no connection is redirected", asked.Mode)
	}
	return nil
}

func applyMode(value string, asked *jobRequest) error {
	mode := workload.Mode(value)
	switch mode {
	case workload.ModeTransparent, workload.ModeDirect, workload.ModeGateway:
	default:
		return fmt.Errorf("want %s, %s or %s", workload.ModeTransparent, workload.ModeDirect, workload.ModeGateway)
	}
	if asked.consul && mode != workload.ModeTransparent {
		return fmt.Errorf("the job has a transparent_proxy block, which is mode %s", workload.ModeTransparent)
	}
	asked.Mode = mode
	return nil
}

func applyGuard(value string, asked *jobRequest) (err error) {
	asked.Guard, err = parseGuard(value)
	return err
}

func applyEgress(value string, asked *jobRequest) (err error) {
	asked.Egress, err = parseGuard(value)
	return err
}

func parseGuard(value string) (workload.Guard, error) {
	guard := workload.Guard(value)
	switch guard {
	case workload.GuardAudit, workload.GuardEnforce:
		return guard, nil
	}
	return "", fmt.Errorf("want %s or %s: a job strengthens the guard and never weakens it", workload.GuardAudit, workload.GuardEnforce)
}

// applyForward takes no "false": what the operator lets all jobs do, none undoes.
func applyForward(value string, asked *jobRequest) error {
	if value != "true" {
		return errors.New("want true: packets are not forwarded without it, unless the operator of this node lets all jobs do so")
	}
	asked.Forward = true
	return nil
}

func applyProxyUID(value string, asked *jobRequest) error {
	uid, err := parseUID(value)
	if err != nil {
		return err
	}
	if asked.consul && uid != asked.ProxyUID {
		return fmt.Errorf("the transparent_proxy block says %d", asked.ProxyUID)
	}
	asked.ProxyUID = uid
	return nil
}

func applyInboundPort(value string, asked *jobRequest) error {
	port, err := parsePort(value)
	if err == nil {
		err = errors.Join(asked.wantTransparent(), agree(asked, asked.InboundPort, port))
	}
	asked.InboundPort = port
	return err
}

func applyOutboundPort(value string, asked *jobRequest) error {
	port, err := parsePort(value)
	if err == nil {
		err = errors.Join(asked.wantTransparent(), agree(asked, asked.OutboundPort, port))
	}
	asked.OutboundPort = port
	return err
}

// applyDNS reads a resolver: "address", "address:port", "[address]:port".
func applyDNS(value string, asked *jobRequest) error {
	if err := asked.wantTransparent(); err != nil {
		return err
	}
	var dns workload.DNS
	if server, err := netip.ParseAddrPort(value); err == nil {
		dns = workload.DNS{Address: server.Addr(), Port: server.Port()}
	} else if dns.Address, err = netip.ParseAddr(value); err != nil {
		return errors.New("want a resolver's address, with :port where that is not 53, and in brackets then where it is IPv6")
	} else {
		dns.Port = workload.DefaultDNSPort
	}
	if dns.Address.Zone() != "" || dns.Address.IsUnspecified() || dns.Address.IsMulticast() || dns.Port == 0 {
		return errors.New("not an address of a server")
	}
	dns.Address = dns.Address.Unmap()
	if err := agree(asked, asked.DNS, dns); err != nil {
		return err
	}
	asked.DNS = dns
	return nil
}

func applyExcludedInbound(value string, asked *jobRequest) error {
	list, err := asked.exclusions(value, "inbound ports")
	if err != nil {
		return err
	}
	ports, err := parsePorts(list)
	asked.ExcludeInboundPorts = joined(asked.ExcludeInboundPorts, ports)
	return err
}

func applyExcludedOutbound(value string, asked *jobRequest) error {
	list, err := asked.outboundExclusions(value, "outbound ports")
	if err != nil {
		return err
	}
	ports, err := parsePorts(list)
	asked.ExcludeOutboundPorts = joined(asked.ExcludeOutboundPorts, ports)
	return err
}

func applyExcludedCIDRs(value string, asked *jobRequest) error {
	list, err := asked.outboundExclusions(value, "outbound CIDRs")
	if err != nil {
		return err
	}
	for _, text := range list {
		cidr, err := parseCIDR(text)
		if err != nil {
			return err
		}
		if !slices.Contains(asked.ExcludeOutboundCIDRs, cidr) {
			asked.ExcludeOutboundCIDRs = append(asked.ExcludeOutboundCIDRs, cidr)
		}
	}
	return nil
}

func applyExcludedUIDs(value string, asked *jobRequest) error {
	list, err := asked.outboundExclusions(value, "UIDs")
	if err != nil {
		return err
	}
	for _, text := range list {
		uid, err := parseUID(text)
		if err != nil {
			return err
		}
		asked.ExcludeUIDs = joined(asked.ExcludeUIDs, []uint32{uid})
	}
	return nil
}

func (asked *jobRequest) outboundExclusions(value, what string) ([]string, error) {
	// The egress guard of a plain allocation has exceptions, too.
	if asked.Egress == "" {
		if err := asked.wantTransparent(); err != nil {
			return nil, err
		}
	}
	return asked.exclusions(value, what)
}

// exclusions splits a list "value, name@value, ...". It keeps the list as a
// note, so that its names are seen where the workload is shown.
func (asked *jobRequest) exclusions(value, what string) ([]string, error) {
	var list, shown []string
	for item := range strings.SplitSeq(value, ",") {
		item = strings.TrimSpace(item)
		name, text, named := strings.Cut(item, "@")
		if !named {
			text = name
		} else if !isName(name) {
			return nil, fmt.Errorf("%s: want a name of letters, digits, - and _ before the @", Quote(item))
		}
		if text == "" {
			return nil, fmt.Errorf("%s: want items value or name@value, separated by commas", Quote(item))
		}
		list, shown = append(list, text), append(shown, item)
	}
	asked.Notes = append(asked.Notes, fmt.Sprintf("the job excludes %s %s", what, shortenList(shown)))
	return list, nil
}

func isName(text string) bool {
	const longest = 40
	return text != "" && len(text) <= longest && !strings.ContainsFunc(text, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '_'
	})
}

// shortenList keeps a note readable: the list itself is in the record.
func shortenList(list []string) string {
	const most = 16
	if len(list) > most {
		return strings.Join(list[:most], ", ") + fmt.Sprintf(" and %d more", len(list)-most)
	}
	return strings.Join(list, ", ")
}

func parsePort(text string) (uint16, error) {
	port, err := strconv.ParseUint(text, 10, 16)
	if err != nil || port == 0 {
		return 0, errors.New("want a port, 1 to 65535")
	}
	return uint16(port), nil
}

func joined[T uint16 | uint32](lists ...[]T) []T {
	all := slices.Concat(lists...)
	slices.Sort(all)
	return slices.Compact(all)
}
