// SPDX-License-Identifier: MPL-2.0

// Package leases takes and gives back addresses as the reference plugin host-local
// does: from the same configuration, in the same order, with its files and its lock,
// which are the reference's own package. Only the choice of an address is done here:
// the reference's package for that links in iptables, nftables and regular expressions,
// whose start every call of the plugin would pay.
package leases

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// Config is what a network configuration says of addresses.
type Config struct {
	Name       string // of the network
	DataDir    string
	ResolvConf string
	Routes     []*types.Route
	Sets       []Set        // one address is taken of each
	Asked      []netip.Addr // these, where they are not empty
}

// Set is a set of ranges, of one family.
type Set []Range

// Range is where addresses are taken from, both ends included.
type Range struct {
	Subnet      netip.Prefix
	First, Last netip.Addr
	Gateway     netip.Addr // never taken
}

// rangeKeys is a range as it is written. Its values are read here, as encoding/json
// does not tell of which key one is that a type of its own refuses.
type rangeKeys struct {
	Subnet  string `json:"subnet"`
	First   string `json:"rangeStart"`
	Last    string `json:"rangeEnd"`
	Gateway string `json:"gateway"`
}

func (k rangeKeys) parse() (r Range, err error) {
	if k.Subnet != "" {
		if r.Subnet, err = netip.ParsePrefix(k.Subnet); err != nil {
			return r, fmt.Errorf("subnet: %w", err)
		}
	}
	for _, key := range []struct {
		name, text string
		into       *netip.Addr
	}{{"rangeStart", k.First, &r.First}, {"rangeEnd", k.Last, &r.Last}, {"gateway", k.Gateway, &r.Gateway}} {
		if key.text == "" {
			continue
		}
		if *key.into, err = netip.ParseAddr(key.text); err != nil {
			return r, fmt.Errorf("%s: %w", key.name, err)
		}
		if key.into.Zone() != "" {
			return r, fmt.Errorf("%s: address %s has a zone", key.name, key.text)
		}
		*key.into = key.into.Unmap()
	}
	return r, nil
}

func parseSets(texts [][]rangeKeys) ([]Set, error) {
	sets := make([]Set, 0, len(texts))
	for i, text := range texts {
		set := make(Set, 0, len(text))
		for _, keys := range text {
			r, err := keys.parse()
			if err != nil {
				return nil, fmt.Errorf("set of ranges %d: %w", i, err)
			}
			set = append(set, r)
		}
		sets = append(sets, set)
	}
	return sets, nil
}

// asked is an address with or without the length of its prefix.
type asked struct{ addr netip.Addr }

func (a *asked) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		a.addr = netip.Addr{}
		return nil
	}
	addr, _, prefixed := strings.Cut(string(text), "/")
	parsed := net.ParseIP(addr)
	if prefixed {
		if _, _, err := net.ParseCIDR(string(text)); err != nil {
			return fmt.Errorf("ips: %w", err)
		}
	}
	if parsed == nil {
		return fmt.Errorf("ips: invalid address %q", text)
	}
	a.addr = addrOf(parsed)
	return nil
}

// addrOf is an IP in its shortest form.
func addrOf(ip net.IP) netip.Addr {
	addr, _ := netip.AddrFromSlice(ip)
	return addr.Unmap()
}

// Parse reads a network configuration and the CNI_ARGS that go with it.
func Parse(text []byte, args string) (*Config, error) {
	var network struct {
		Name string `json:"name"`
		IPAM *struct {
			rangeKeys
			Routes     json.RawMessage `json:"routes"`
			DataDir    string          `json:"dataDir"`
			ResolvConf string          `json:"resolvConf"`
			Ranges     [][]rangeKeys   `json:"ranges"`
		} `json:"ipam"`
		RuntimeConfig struct {
			IPRanges [][]rangeKeys `json:"ipRanges"`
			IPs      []asked       `json:"ips"`
		} `json:"runtimeConfig"`
		Args struct {
			CNI struct {
				IPs []asked `json:"ips"`
			} `json:"cni"`
		} `json:"args"`
	}
	if err := json.Unmarshal(text, &network); err != nil {
		return nil, err
	}
	if network.IPAM == nil {
		return nil, errors.New("the network configuration has no key ipam")
	}
	var environment struct {
		types.CommonArgs
		IP asked
	}
	if err := types.LoadArgs(args, &environment); err != nil {
		return nil, err
	}
	conf := &Config{
		Name: network.Name, DataDir: network.IPAM.DataDir, ResolvConf: network.IPAM.ResolvConf,
	}
	if len(network.IPAM.Routes) > 0 {
		if err := json.Unmarshal(network.IPAM.Routes, &conf.Routes); err != nil {
			return nil, fmt.Errorf("routes: %w", err)
		}
	}
	if environment.IP.addr.IsValid() {
		conf.Asked = append(conf.Asked, environment.IP.addr)
	}
	for _, each := range append(network.Args.CNI.IPs, network.RuntimeConfig.IPs...) {
		if !each.addr.IsValid() {
			return nil, errors.New("ips: an address that was asked for is empty")
		}
		conf.Asked = append(conf.Asked, each.addr)
	}
	texts := network.RuntimeConfig.IPRanges
	if network.IPAM.Subnet != "" { // the first versions had one range, beside the other keys
		texts = append(texts, []rangeKeys{network.IPAM.rangeKeys})
	}
	var err error
	if conf.Sets, err = parseSets(append(texts, network.IPAM.Ranges...)); err != nil {
		return nil, err
	}
	return conf, conf.complete()
}

// complete fills in what the ranges leave out, and refuses what does not fit together.
func (c *Config) complete() error {
	if len(c.Sets) == 0 {
		return errors.New("no ranges of addresses")
	}
	for i, set := range c.Sets {
		if err := set.complete(); err != nil {
			return fmt.Errorf("set of ranges %d: %w", i, err)
		}
		for k, other := range c.Sets[:i] {
			if set.overlaps(other) {
				return fmt.Errorf("sets of ranges %d and %d overlap", k, i)
			}
		}
	}
	return nil
}

func (s Set) complete() error {
	if len(s) == 0 {
		return errors.New("it is empty")
	}
	for i := range s {
		if err := s[i].complete(); err != nil {
			return err
		}
		if s[i].Subnet.Addr().Is4() != s[0].Subnet.Addr().Is4() {
			return errors.New("it has both families")
		}
		for _, other := range s[:i] {
			if other.overlaps(s[i]) {
				return fmt.Errorf("%s and %s overlap", other, s[i])
			}
		}
	}
	return nil
}

func (r *Range) complete() error {
	subnet := r.Subnet
	switch {
	case !subnet.IsValid() || subnet.Addr().Is4In6():
		return errors.New("a range has no subnet")
	case subnet.Bits() > subnet.Addr().BitLen()-2:
		return fmt.Errorf("subnet %s is too small to take addresses from", subnet)
	case subnet != subnet.Masked():
		return fmt.Errorf("subnet %s is the address of a host, want %s", subnet, subnet.Masked())
	}
	first, last := subnet.Addr().Next(), lastOf(subnet)
	if !r.First.IsValid() {
		r.First = first
	}
	if !subnet.Contains(r.First) {
		return fmt.Errorf("rangeStart %s is not in %s", r.First, subnet)
	}
	if !r.Last.IsValid() {
		r.Last = last
	}
	if !subnet.Contains(r.Last) || r.Last.Less(r.First) {
		return fmt.Errorf("rangeEnd %s is not in %s, from %s on", r.Last, subnet, r.First)
	}
	if !r.Gateway.IsValid() {
		r.Gateway = first
	}
	return nil
}

// lastOf is the last address of a subnet that a host may have: IPv4 has one for all.
func lastOf(subnet netip.Prefix) netip.Addr {
	bytes := subnet.Addr().AsSlice()
	for i := range bytes {
		bytes[i] |= byte(0xff >> min(max(subnet.Bits()-8*i, 0), 8))
	}
	last, _ := netip.AddrFromSlice(bytes)
	if last.Is4() {
		return last.Prev()
	}
	return last
}

func (r Range) String() string { return r.First.String() + "-" + r.Last.String() }

func (r Range) contains(addr netip.Addr) bool {
	return r.Subnet.Contains(addr) && !addr.Less(r.First) && !r.Last.Less(addr)
}

func (r Range) overlaps(other Range) bool {
	return r.contains(other.First) || r.contains(other.Last) || other.contains(r.First) || other.contains(r.Last)
}

func (s Set) overlaps(other Set) bool {
	for _, r := range s {
		for _, o := range other {
			if r.overlaps(o) {
				return true
			}
		}
	}
	return false
}

// Contains reports whether the address is in one of the ranges.
func (s Set) Contains(addr netip.Addr) bool { return s.at(addr) >= 0 }

// at is the place of the range that the address is in; -1 where none is.
func (s Set) at(addr netip.Addr) int {
	for i, r := range s {
		if r.contains(addr) {
			return i
		}
	}
	return -1
}

func (s Set) String() string {
	texts := make([]string, 0, len(s))
	for _, r := range s {
		texts = append(texts, r.String())
	}
	return strings.Join(texts, ",")
}
