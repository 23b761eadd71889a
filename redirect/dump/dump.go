// SPDX-License-Identifier: MPL-2.0

// Package dump prints what the kernel has of a workload.
package dump

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/weirmesh/weir/redirect/bpfmap"
)

// Row is a row of a workload in the kernel, as text. Neither the namespace's
// cookie nor the generation is in it: the same configuration has the same text on
// every node, after every change.
type Row struct {
	Table string `json:"table"`
	Key   string `json:"key"`
	Value string `json:"value"`
}

// Rows returns all rows that are in force for a workload, sorted; none where the
// kernel has none. Counters and what connections made, its origins, are left out.
// Who needs one state of them all compares the generation before and after.
func Rows(m *bpfmap.Tables, cookie, generation uint64) (list []Row, err error) {
	add := func(table, key, format string, values ...any) {
		list = append(list, Row{table, key, fmt.Sprintf(format, values...)})
	}
	var config bpfmap.BpfConfig
	found, err := m.Get("configs", bpfmap.BpfConfigKey{Cookie: cookie, Generation: generation}, &config)
	if err != nil || !found {
		return nil, err
	}
	add("configs", "flags", "%#x", uint32(config.Flags))
	add("configs", "proxy uid", "%d", config.ProxyUid)
	add("configs", "outbound port", "%d", config.OutboundPort)
	add("configs", "inbound port", "%d", config.InboundPort)
	add("configs", "budget", "%d", config.Budget)
	add("configs", "ephemeral ports", "%d-%d", config.EphemeralFirst, config.EphemeralLast)
	if config.DnsPort != 0 {
		add("configs", "dns", "%s", bpfmap.DecodeAddrPort(config.DnsAddr, config.DnsPort))
	}
	err = errors.Join(
		bpfmap.Walk(m, "exclusions", func(key bpfmap.BpfExclusionKey, value uint32) error {
			if key.Cookie == cookie && key.Generation == generation {
				add("exclusions", fmt.Sprintf("%s %d", kindName(key.Kind), key.Value), "%#x", value)
			}
			return nil
		}),
		bpfmap.Walk(m, "ports", func(key bpfmap.BpfExclusionKey, value bpfmap.BpfPorts) error {
			if key.Cookie == cookie && key.Generation == generation {
				add("ports", fmt.Sprintf("%s %d", kindName(key.Kind), key.Value*bpfmap.PortsPerRow), "%s", portList(value, key.Value*bpfmap.PortsPerRow))
			}
			return nil
		}),
		bpfmap.Walk(m, "addresses", func(key bpfmap.BpfAddressKey, value bpfmap.BpfAddress) error {
			if key.Cookie == cookie && key.Generation == generation {
				add("addresses", bpfmap.DecodeAddr(key.Addr).String(), "%s", addressText(value))
			}
			return nil
		}),
		addPrefixes(m, "cidrs", cookie, generation, add),
		addPrefixes(m, "sources", cookie, generation, add),
		bpfmap.EachProxyID(cookie, config.Seats, func(key bpfmap.BpfProxyKey) error {
			var row bpfmap.BpfProxy
			found, err := m.Get("proxies", key, &row)
			if found {
				// A cgroup's ID is another one at each start.
				add("proxies", fmt.Sprint(key.Seat), "flags %#x cgroup %s", uint32(row.Flags), map[bool]string{true: "known", false: "unknown"}[row.Cgroup != 0])
			}
			return err
		}),
		addListeners(m, cookie, add),
	)
	slices.SortFunc(list, func(a, b Row) int {
		return cmp.Or(cmp.Compare(a.Table, b.Table), cmp.Compare(a.Key, b.Key), cmp.Compare(a.Value, b.Value))
	})
	return list, err
}

func addPrefixes(m *bpfmap.Tables, name string, cookie, generation uint64, add func(table, key, format string, values ...any)) error {
	table, err := m.Table(name)
	if err != nil {
		return err
	}
	whole := netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	scope := bpfmap.EncodeCIDR(whole, cookie, generation)
	var key bpfmap.BpfCidrKey
	var value uint32
	rows := table.Iterate()
	for rows.Next(&key, &value) {
		if key.Scope != scope.Scope {
			continue
		}
		addr, bits := bpfmap.DecodeAddr(key.Addr), int(key.Prefixlen-scope.Prefixlen)
		if addr.Is4() {
			bits -= 96
		}
		add(name, fmt.Sprintf("%s/%d", addr, bits), "%d", value)
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("walk map %s: %w", name, err)
	}
	return nil
}

func addListeners(m *bpfmap.Tables, cookie uint64, add func(table, key, format string, values ...any)) error {
	table, err := m.Table("listeners")
	if err != nil {
		return err
	}
	var key bpfmap.BpfListenerKey
	var socket uint64
	rows := table.Iterate()
	for rows.Next(&key, &socket) {
		if key.Cookie == cookie {
			add("listeners", fmt.Sprintf("role %d port %d slot %d", key.Role, key.Port, key.Slot), "registered")
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("walk map listeners: %w", err)
	}
	return nil
}

func kindName(k bpfmap.BpfExclusionKind) string {
	switch k {
	case bpfmap.BpfExclusionKindEXCLUSION_PORT_OUT:
		return "outbound-port"
	case bpfmap.BpfExclusionKindEXCLUSION_PORT_IN:
		return "inbound-port"
	case bpfmap.BpfExclusionKindEXCLUSION_UID:
		return "uid"
	case bpfmap.BpfExclusionKindEXCLUSION_LISTENER:
		return "listener"
	case bpfmap.BpfExclusionKindEXCLUSION_SERVICE:
		return "service"
	}
	return fmt.Sprintf("kind-%d", uint32(k))
}

// portList is the ports of the row, which begins at first.
func portList(p bpfmap.BpfPorts, first uint32) string {
	var ports []string
	for i := range uint32(bpfmap.PortsPerRow) {
		if p.Bits[i/64]&(1<<(i%64)) != 0 {
			ports = append(ports, fmt.Sprint(first+i))
		}
	}
	return strings.Join(ports, " ")
}

func addressText(a bpfmap.BpfAddress) string {
	switch a.Kind {
	case bpfmap.BpfAddressKindADDRESS_OWN:
		return "own"
	case bpfmap.BpfAddressKindADDRESS_UPSTREAM:
		return "upstream " + bpfmap.DecodeAddrPort(a.Listener, a.Port).String()
	case bpfmap.BpfAddressKindADDRESS_PROXY:
		return fmt.Sprintf("proxy %d port %d", a.Seat, a.Port)
	case bpfmap.BpfAddressKindADDRESS_BROADCAST:
		return "broadcast"
	case bpfmap.BpfAddressKindADDRESS_SOURCE:
		return "source " + bpfmap.DecodeAddr(a.Listener).String()
	}
	return fmt.Sprintf("kind-%d", uint32(a.Kind))
}
