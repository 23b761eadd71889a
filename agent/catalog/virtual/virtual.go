// SPDX-License-Identifier: MPL-2.0

// Package virtual asks Consul which service has a virtual IP. Nothing in Consul's API
// takes an address, so the catalog is asked, with a filter, for who carries it, and the
// service's own discovery chain whether it is so.
package virtual

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/catalog/failure"
	"github.com/weirmesh/weir/agent/registration"
)

// AtOnce is for how many addresses one question is.
const AtOnce = 32

const (
	tag             = "consul-virtual"      // of a sidecar or of a native service: its own address
	gatewayTag      = "consul-virtual:"     // of a terminating gateway: before the service behind it
	sidecar         = "connect-proxy"       // kinds, as the catalog has them
	terminating     = "terminating-gateway" // ...
	moreThanAskedOf = 64                    // terminating gateways: a Consul that tells more does not filter
)

// Services are those that have the addresses; one that nobody has is not among them.
// What the token may not read is nobody's.
func Services(ctx context.Context, c *catalog.Client, addresses []netip.Addr) (map[netip.Addr]registration.Service, error) {
	carried := make([]string, len(addresses))
	for i, addr := range addresses {
		carried[i] = fmt.Sprintf(`ServiceTaggedAddresses[%q].Address == %q`, tag, addr)
	}
	one := strings.Join(carried, " or ")
	var names map[string]catalog.Ignored
	if err := ask(ctx, c, "/v1/catalog/services", one+fmt.Sprintf(` or ServiceKind == %q`, terminating), &names); err != nil {
		return nil, err
	}
	if len(names) > len(addresses)+moreThanAskedOf {
		return nil, fmt.Errorf("read services by virtual IP from Consul: it names %d, so it does not filter", len(names))
	}
	found := make(map[netip.Addr]registration.Service)
	confirmed := make(map[registration.Service]bool)
	for name := range names {
		claims, err := claimsOf(ctx, c, name, one)
		if err != nil {
			return nil, err
		}
		for _, of := range claims {
			if confirmed[of] {
				continue
			}
			confirmed[of] = true
			// What a gateway's or a plain registration claims its author chose. The chain's
			// addresses are those that Consul gave.
			own, err := c.VirtualIPs(ctx, of)
			if err != nil {
				return nil, err
			}
			for _, addr := range own {
				found[addr] = of
			}
		}
	}
	maps.DeleteFunc(found, func(addr netip.Addr, _ registration.Service) bool { return !slices.Contains(addresses, addr) })
	return found, nil
}

// ServiceAt names the service that has a virtual IP; nothing where none has, or Consul does
// not tell.
func ServiceAt(ctx context.Context, c *catalog.Client, addr netip.Addr) string {
	if !slices.ContainsFunc(DefaultRanges(), func(p netip.Prefix) bool { return p.Contains(addr) }) {
		return ""
	}
	found, err := Services(ctx, c, []netip.Addr{addr})
	if err != nil {
		return ""
	}
	return found[addr].Label()
}

// claimsOf are the services that instances of the name say to have one of the addresses.
func claimsOf(ctx context.Context, c *catalog.Client, name, carried string) (claims []registration.Service, err error) {
	var instances []struct {
		ServiceName, ServiceKind, Namespace, Partition string
		ServiceTaggedAddresses                         map[string]struct{ Address string }
		ServiceProxy                                   struct{ DestinationServiceName string }
		ServiceConnect                                 struct{ Native bool }
	}
	filter := fmt.Sprintf(`ServiceKind == %q or %s`, terminating, carried)
	if err := ask(ctx, c, "/v1/catalog/service/"+url.PathEscape(name), filter, &instances); err != nil {
		return nil, err
	}
	claim := func(name, namespace, partition string) {
		if of := registration.ServiceOf(name, namespace, partition); name != "" && !slices.Contains(claims, of) {
			claims = append(claims, of)
		}
	}
	for _, i := range instances {
		switch {
		case i.ServiceKind == sidecar:
			claim(i.ServiceProxy.DestinationServiceName, i.Namespace, i.Partition)
		case i.ServiceKind == terminating:
			for key, value := range i.ServiceTaggedAddresses {
				behind, ok := strings.CutPrefix(key, gatewayTag)
				if ok && strings.Contains(carried, fmt.Sprintf("%q", value.Address)) {
					claim(behind[strings.LastIndexByte(behind, '/')+1:], i.Namespace, i.Partition)
				}
			}
		case i.ServiceConnect.Native:
			claim(i.ServiceName, i.Namespace, i.Partition)
		}
	}
	return claims, nil
}

// Ranges are the prefixes that Consul takes virtual IPs from.
func Ranges(ctx context.Context, c *catalog.Client) ([]netip.Prefix, error) {
	var self struct {
		DebugConfig struct{ ConnectVirtualIPCIDRv4, ConnectVirtualIPCIDRv6 string }
	}
	if err := ask(ctx, c, "/v1/agent/self", "", &self); err != nil {
		return nil, err
	}
	ranges := DefaultRanges()
	for _, text := range []string{self.DebugConfig.ConnectVirtualIPCIDRv4, self.DebugConfig.ConnectVirtualIPCIDRv6} {
		// Its default for IPv6 is half of the Internet, of which it takes the first addresses.
		if prefix, err := netip.ParsePrefix(text); err == nil && prefix.String() != "2000::/3" && !slices.Contains(ranges, prefix) {
			ranges = append(ranges, prefix)
		}
	}
	return ranges, nil
}

// DefaultRanges are those of a Consul that is not told otherwise, as far as it comes to
// use them: it counts from their first address.
func DefaultRanges() []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix("240.0.0.0/4"), netip.MustParsePrefix("2000::/64")}
}

// ask reads one answer of the catalog.
func ask(ctx context.Context, c *catalog.Client, path, filter string, into any) error {
	ctx, cancel := context.WithTimeout(ctx, c.Read)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return err
	}
	options.Filter = filter
	if _, err := c.Client.Raw().Query(path, into, options); err != nil {
		return fmt.Errorf("read services by virtual IP from Consul: %w", failure.Brief(err))
	}
	return nil
}
