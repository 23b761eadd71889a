// SPDX-License-Identifier: MPL-2.0

// Package envoy runs a real Envoy as an allocation's sidecar: with the
// listeners that Consul gives a transparent proxy, from a static bootstrap
// instead of Consul's xDS. It does not import testing, so that programs can
// use it too.
package envoy

import (
	"encoding/json"
	"fmt"
	"net/netip"
)

// Config is what the bootstrap is made of. Listeners whose address is not
// valid are left out.
type Config struct {
	// Outbound takes the workload's own connections and passes each on to
	// the origin that the kernel names: filter original_dst, cluster
	// ORIGINAL_DST. Consul puts it on 127.0.0.1:15001.
	Outbound netip.AddrPort
	// Inbound takes connections from outside and passes them to Service.
	// Consul puts it on 0.0.0.0 or [::] and the port that Nomad chose.
	Inbound netip.AddrPort
	Service netip.AddrPort
	// Routes send the outbound connections to an origin (a virtual IP) to a
	// fixed address instead.
	Routes []Route
	// Admin is Envoy's own API. Consul puts it on 127.0.0.2:19000.
	Admin netip.AddrPort
}

// Route is one outbound filter chain: connections whose origin is in Prefix
// go to Address.
type Route struct {
	Name    string
	Prefix  netip.Prefix
	Address netip.AddrPort
}

// object is a piece of Envoy's configuration in its JSON form.
type object = map[string]any

const (
	typeTCPProxy    = "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
	typeOriginalDst = "type.googleapis.com/envoy.extensions.filters.listener.original_dst.v3.OriginalDst"
	typeFileLog     = "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog"
)

// Bootstrap renders Envoy's static configuration. A line of JSON goes to the
// file accessLog for every connection that has ended.
func (c Config) Bootstrap(accessLog string) ([]byte, error) {
	var listeners, clusters []object
	if c.Outbound.IsValid() {
		chains := []object{}
		for _, route := range c.Routes {
			chain := tcpProxy("outbound", route.Name, accessLog)
			chain["filter_chain_match"] = object{"prefix_ranges": []object{{
				"address_prefix": route.Prefix.Addr().String(),
				"prefix_len":     route.Prefix.Bits(),
			}}}
			chains = append(chains, chain)
			clusters = append(clusters, static(route.Name, route.Address))
		}
		outbound := listener("outbound", c.Outbound)
		outbound["listener_filters"] = []object{{
			"name":         "envoy.filters.listener.original_dst",
			"typed_config": object{"@type": typeOriginalDst},
		}}
		outbound["filter_chains"] = chains
		outbound["default_filter_chain"] = tcpProxy("outbound", "original-destination", accessLog)
		listeners = append(listeners, outbound)
		clusters = append(clusters, object{
			"name": "original-destination", "type": "ORIGINAL_DST",
			"lb_policy": "CLUSTER_PROVIDED", "connect_timeout": "5s",
		})
	}
	if c.Inbound.IsValid() {
		inbound := listener("inbound", c.Inbound)
		inbound["filter_chains"] = []object{tcpProxy("inbound", "service", accessLog)}
		listeners = append(listeners, inbound)
		clusters = append(clusters, static("service", c.Service))
	}
	bootstrap := object{
		"admin":            object{"address": address(c.Admin)},
		"static_resources": object{"listeners": listeners, "clusters": clusters},
	}
	text, err := json.MarshalIndent(bootstrap, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("render bootstrap: %w", err)
	}
	return text, nil
}

func listener(name string, at netip.AddrPort) object {
	return object{"name": name, "address": address(at)}
}

func static(name string, at netip.AddrPort) object {
	return object{
		"name": name, "type": "STATIC", "connect_timeout": "5s",
		"load_assignment": object{
			"cluster_name": name,
			"endpoints": []object{{"lb_endpoints": []object{
				{"endpoint": object{"address": address(at)}},
			}}},
		},
	}
}

func tcpProxy(listener, cluster, accessLog string) object {
	line := object{
		"listener": listener,
		"cluster":  cluster,
		"local":    "%DOWNSTREAM_LOCAL_ADDRESS%",
		"remote":   "%DOWNSTREAM_REMOTE_ADDRESS%",
		"direct":   "%DOWNSTREAM_DIRECT_LOCAL_ADDRESS%",
		"upstream": "%UPSTREAM_HOST%",
		"from":     "%UPSTREAM_LOCAL_ADDRESS%",
		"flags":    "%RESPONSE_FLAGS%",
	}
	return object{"filters": []object{{
		"name": "envoy.filters.network.tcp_proxy",
		"typed_config": object{
			"@type":       typeTCPProxy,
			"stat_prefix": listener,
			"cluster":     cluster,
			"access_log": []object{{
				"name": "envoy.access_loggers.file",
				"typed_config": object{
					"@type": typeFileLog, "path": accessLog,
					"log_format": object{"json_format": line},
				},
			}},
		},
	}}}
}

// address renders a socket address; the unspecified IPv6 address takes IPv4
// too, as Consul's does.
func address(at netip.AddrPort) object {
	socket := object{"address": at.Addr().String(), "port_value": at.Port()}
	if at.Addr() == netip.IPv6Unspecified() {
		socket["ipv4_compat"] = true
	}
	return object{"socket_address": socket}
}
