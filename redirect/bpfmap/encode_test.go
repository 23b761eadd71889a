// SPDX-License-Identifier: MPL-2.0

package bpfmap

import (
	"encoding/binary"
	"maps"
	"net/netip"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// The programs read an address as 16 bytes in network order, IPv4 mapped.
func TestEncodeAddr(t *testing.T) {
	for text, want := range map[string][16]byte{
		"10.1.2.3":         {10: 0xff, 11: 0xff, 12: 10, 13: 1, 14: 2, 15: 3},
		"::ffff:10.1.2.3":  {10: 0xff, 11: 0xff, 12: 10, 13: 1, 14: 2, 15: 3},
		"0.0.0.0":          {10: 0xff, 11: 0xff},
		"255.255.255.255":  {10: 0xff, 11: 0xff, 12: 255, 13: 255, 14: 255, 15: 255},
		"::":               {},
		"::1":              {15: 1},
		"2001:db8:1:2::ab": {0x20, 0x01, 0x0d, 0xb8, 0, 1, 0, 2, 15: 0xab},
	} {
		addr := netip.MustParseAddr(text)
		row := EncodeAddr(addr)
		if got := *(*[16]byte)(unsafe.Pointer(&row.Word)); got != want {
			t.Errorf("encode %s: % x, want % x", text, got, want)
		}
		if got := DecodeAddr(row); got != addr.Unmap() {
			t.Errorf("decode %s: %s", text, got)
		}
	}
}

// The ends of the index space and of the two ranges, as addr.h has them.
func TestEncodedAddrs(t *testing.T) {
	for _, tc := range []struct {
		index  uint32
		v4, v6 string
	}{
		{IndexFirst, "127.128.0.1", "fd77:6569:7200::1"},
		{256, "127.128.1.0", "fd77:6569:7200::100"},
		{1 << 16, "127.129.0.0", "fd77:6569:7200::1:0"},
		{workload.MaxBudget, "127.255.255.254", "fd77:6569:7200::7f:fffe"},
	} {
		v4, v6 := workload.EncodedAddrs(tc.index)
		if v4.String() != tc.v4 || v6.String() != tc.v6 {
			t.Errorf("index %d is %s and %s, want %s and %s", tc.index, v4, v6, tc.v4, tc.v6)
		}
		if !workload.EncodedPrefix4.Contains(v4) || !workload.EncodedPrefix6.Contains(v6) {
			t.Errorf("index %d: %s or %s is not in the range that is routed", tc.index, v4, v6)
		}
	}
}

func TestEncodeCIDR(t *testing.T) {
	const cookie, generation = 0x0102030405060708, 0x1112131415161718
	var scope [16]byte
	binary.NativeEndian.PutUint64(scope[:8], cookie)
	binary.NativeEndian.PutUint64(scope[8:], generation)
	const both = 128 // bits of cookie and generation
	for _, tc := range []struct {
		cidr   string
		bits   uint32
		family uint32
	}{
		{"10.0.0.0/8", both + 96 + 8, 4},
		{"10.1.2.3/32", both + 128, 4},
		{"0.0.0.0/0", both + 96, 4},
		{"::ffff:10.0.0.0/104", both + 104, 4},
		{"::ffff:0.0.0.0/96", both + 96, 4},
		{"::/0", both, 6},
		{"::/80", both + 80, 6},
		{"2001:db8::/32", both + 32, 6},
		{"2001:db8::1/128", both + 128, 6},
	} {
		cidr := netip.MustParsePrefix(tc.cidr)
		key := EncodeCIDR(cidr, cookie, generation)
		if got := *(*[16]byte)(unsafe.Pointer(&key.Scope)); got != scope {
			t.Errorf("%s: scope % x, want % x", tc.cidr, got, scope)
		}
		if key.Prefixlen != tc.bits || key.Addr != EncodeAddr(cidr.Addr()) || CidrFamily(cidr) != tc.family {
			t.Errorf("%s: %d bits of %v, family %d; want %d bits, family %d",
				tc.cidr, key.Prefixlen, key.Addr, CidrFamily(cidr), tc.bits, tc.family)
		}
	}
}

func TestEncodeRows(t *testing.T) {
	const cookie, generation = 7, 8
	w := workload.Workload{
		Mode: workload.ModeTransparent, ProxyUID: 4_000_000_000, InboundPort: 20000, OutboundPort: 15001,
		DNS: workload.DNS{Address: netip.MustParseAddr("10.0.0.53"), Port: 8600}, Guard: workload.GuardEnforce, Budget: 99,
		ExcludeInboundPorts: []uint16{8080}, ExcludeOutboundPorts: []uint16{1, 65535},
		ExcludeOutboundCIDRs: test.Prefixes("10.0.0.0/8", "::/0"), ExcludeUIDs: []uint32{0, 70000},
		Addresses: test.Addrs("10.9.1.2", "fd09::2"),
		Upstreams: []workload.Upstream{{
			Name: "db", Addresses: test.Addrs("240.0.0.5", "fd00::5", "10.9.1.2"), Listener: netip.MustParseAddrPort("127.0.0.1:9191"),
		}},
		Ephemeral: workload.PortRange{First: 32768, Last: 60999},
	}
	exclusion := func(kind BpfExclusionKind, value uint32) BpfExclusionKey {
		return BpfExclusionKey{Cookie: cookie, Generation: generation, Kind: kind, Value: value}
	}
	address := func(text string) BpfAddressKey {
		return BpfAddressKey{Cookie: cookie, Generation: generation, Addr: EncodeAddr(netip.MustParseAddr(text))}
	}
	own := BpfAddress{Kind: BpfAddressKindADDRESS_OWN}
	upstream := BpfAddress{Kind: BpfAddressKindADDRESS_UPSTREAM, Port: 9191, Listener: EncodeAddr(netip.MustParseAddr("127.0.0.1"))}
	want := rows{
		config: BpfConfig{
			Flags: BpfConfigFlagCONFIG_TRANSPARENT | BpfConfigFlagCONFIG_DNS | BpfConfigFlagCONFIG_UIDS |
				BpfConfigFlagCONFIG_PORTS_OUT | BpfConfigFlagCONFIG_PORTS_IN | BpfConfigFlagCONFIG_CIDRS |
				BpfConfigFlagCONFIG_IPV6 | BpfConfigFlagCONFIG_ENFORCE,
			ProxyUid: 4_000_000_000, Budget: 99, OutboundPort: 15001, InboundPort: 20000,
			DnsAddr: EncodeAddr(netip.MustParseAddr("10.0.0.53")), DnsPort: 8600,
			EphemeralFirst: 32768, EphemeralLast: 60999, Seats: 1,
		},
		exclusions: map[BpfExclusionKey]uint32{
			exclusion(BpfExclusionKindEXCLUSION_UID, 0): 0, exclusion(BpfExclusionKindEXCLUSION_UID, 70000): 0,
		},
		ports: map[BpfExclusionKey]BpfPorts{
			exclusion(BpfExclusionKindEXCLUSION_PORT_OUT, 0):  {Bits: [16]uint64{0: 1 << 1}},
			exclusion(BpfExclusionKindEXCLUSION_PORT_OUT, 63): {Bits: [16]uint64{15: 1 << 63}},
			exclusion(BpfExclusionKindEXCLUSION_PORT_IN, 7):   {Bits: [16]uint64{(8080 - 7*1024) / 64: 1 << (8080 % 64)}},
		},
		addresses: map[BpfAddressKey]BpfAddress{
			// An address that is both stays the workload's own.
			address("10.9.1.2"): own, address("fd09::2"): own,
			address("240.0.0.5"): upstream, address("fd00::5"): upstream,
		},
		cidrs: map[BpfCidrKey]uint32{
			EncodeCIDR(netip.MustParsePrefix("10.0.0.0/8"), cookie, generation): 4,
			EncodeCIDR(netip.MustParsePrefix("::/0"), cookie, generation):       6,
		},
	}
	if diff := cmp.Diff(want, EncodeRows(w, cookie, generation, true), cmp.AllowUnexported(rows{}), cmpopts.EquateEmpty(),
		cmp.Comparer(func(a, b BpfConfig) bool { return a == b }), cmp.Comparer(func(a, b BpfAddress) bool { return a == b }),
		cmp.Comparer(func(a, b BpfPorts) bool { return a == b })); diff != "" {
		t.Errorf("rows (-want +got):\n%s", diff)
	}
}

// A flag that is clear spares the programs a lookup, so it must not be clear
// where there is a row, nor set where there is none.
func TestEncodeFlags(t *testing.T) {
	for name, tc := range map[string]struct {
		edit func(*workload.Workload)
		ipv6 bool
		want BpfConfigFlag
	}{
		"nothing":        {func(*workload.Workload) {}, false, 0},
		"transparent":    {func(w *workload.Workload) { w.Mode = workload.ModeTransparent }, false, BpfConfigFlagCONFIG_TRANSPARENT},
		"gateway":        {func(w *workload.Workload) { w.Mode = workload.ModeGateway }, false, 0},
		"IPv6":           {func(*workload.Workload) {}, true, BpfConfigFlagCONFIG_IPV6},
		"UIDs":           {func(w *workload.Workload) { w.ExcludeUIDs = []uint32{0} }, false, BpfConfigFlagCONFIG_UIDS},
		"ports out":      {func(w *workload.Workload) { w.ExcludeOutboundPorts = []uint16{1} }, false, BpfConfigFlagCONFIG_PORTS_OUT},
		"ports in":       {func(w *workload.Workload) { w.ExcludeInboundPorts = []uint16{1} }, false, BpfConfigFlagCONFIG_PORTS_IN},
		"CIDRs":          {func(w *workload.Workload) { w.ExcludeOutboundCIDRs = test.Prefixes("::/0") }, false, BpfConfigFlagCONFIG_CIDRS},
		"two proxies":    {func(w *workload.Workload) { w.Proxies = []workload.Sidecar{{InboundPort: 1}} }, false, BpfConfigFlagCONFIG_PROXIES},
		"audit":          {func(w *workload.Workload) { w.Guard = workload.GuardAudit }, false, BpfConfigFlagCONFIG_AUDIT},
		"egress audit":   {func(w *workload.Workload) { w.Egress = workload.GuardAudit }, false, BpfConfigFlagCONFIG_EGRESS_AUDIT},
		"egress enforce": {func(w *workload.Workload) { w.Egress = workload.GuardEnforce }, false, BpfConfigFlagCONFIG_EGRESS_ENFORCE},
		"enforce":        {func(w *workload.Workload) { w.Guard = workload.GuardEnforce }, false, BpfConfigFlagCONFIG_ENFORCE},
	} {
		w := workload.Workload{Mode: workload.ModeDirect, Guard: workload.GuardOff}
		tc.edit(&w)
		if got := EncodeRows(w, 1, 2, tc.ipv6).config.Flags; got != tc.want {
			t.Errorf("%s: flags %#x, want %#x", name, got, tc.want)
		}
	}
}

// The three forms of the request's two fields, as Consul's engine reads them.
func TestEncodeDNS(t *testing.T) {
	const one, every = BpfConfigFlagCONFIG_DNS, BpfConfigFlagCONFIG_DNS | BpfConfigFlagCONFIG_DNS_ANY
	resolver := netip.MustParseAddr("fd00::53")
	for _, tc := range []struct {
		dns   workload.DNS
		flags BpfConfigFlag
		addr  string
		port  uint16
	}{
		{workload.DNS{}, 0, "::", 0},
		{workload.DNS{Port: 8600}, one, "127.0.0.1", 8600},
		{workload.DNS{Address: resolver}, every, "fd00::53", 53},
		{workload.DNS{Address: resolver, Port: 8600}, one, "fd00::53", 8600},
	} {
		var got BpfConfig
		encodeDNS(tc.dns, &got)
		if got.Flags != tc.flags || got.DnsAddr != EncodeAddr(netip.MustParseAddr(tc.addr)) || got.DnsPort != tc.port {
			t.Errorf("%+v: flags %#x, %s port %d; want %#x, %s port %d",
				tc.dns, got.Flags, DecodeAddr(got.DnsAddr), got.DnsPort, tc.flags, tc.addr, tc.port)
		}
	}
}

// Of two that claim the same, the former proxy has it; before any proxy come
// what is excluded, upstreams and the workload's own addresses.
func TestEncodeProxies(t *testing.T) {
	const cookie, generation = 7, 8
	w := workload.Workload{
		Mode: workload.ModeTransparent, InboundPort: 20000, OutboundPort: 15001, ExcludeInboundPorts: []uint16{9000},
		Addresses: test.Addrs("10.9.1.2"), Seats: []uint8{2, 0, 5},
		Upstreams: []workload.Upstream{{Name: "db", Addresses: test.Addrs("240.0.0.9"), Listener: netip.MustParseAddrPort("127.0.0.1:9191")}},
		Proxies: []workload.Sidecar{
			{Service: "api", InboundPort: 20001, OutboundPort: 15002, ServicePorts: []uint16{8080, 9000}, VirtualIPs: test.Addrs("240.0.0.1", "240.0.0.9")},
			{Service: "web", InboundPort: 20002, ServicePorts: []uint16{8080, 20000, 8081}},
		},
	}
	exclusion := func(kind BpfExclusionKind, value uint32) BpfExclusionKey {
		return BpfExclusionKey{Cookie: cookie, Generation: generation, Kind: kind, Value: value}
	}
	const service, listener = BpfExclusionKindEXCLUSION_SERVICE, BpfExclusionKindEXCLUSION_LISTENER
	got := EncodeRows(w, cookie, generation, false)
	if diff := cmp.Diff(map[BpfExclusionKey]uint32{
		exclusion(service, 9000): 20001, exclusion(service, 8080): 20001, exclusion(service, 8081): 20002,
		exclusion(service, 20000): 20000, exclusion(service, 20001): 20001, exclusion(service, 20002): 20002,
		exclusion(listener, 15002): 0 | listensOutbound, exclusion(listener, 20001): 0, exclusion(listener, 20002): 5,
	}, got.exclusions); diff != "" {
		t.Errorf("exclusions (-want +got):\n%s", diff)
	}
	excluded := map[BpfExclusionKey]BpfPorts{
		exclusion(BpfExclusionKindEXCLUSION_PORT_IN, 8): {Bits: [16]uint64{(9000 - 8*1024) / 64: 1 << (9000 % 64)}},
	}
	if !maps.Equal(got.ports, excluded) {
		t.Errorf("excluded ports %v, want %v", got.ports, excluded)
	}
	kinds := make(map[string]BpfAddressKind)
	for key, row := range got.addresses {
		kinds[DecodeAddr(key.Addr).String()] = row.Kind
		if row.Kind == BpfAddressKindADDRESS_PROXY && (row.Port != 15002 || row.Seat != 0) {
			t.Errorf("the owner of %s is at port %d in proxy ID %d", DecodeAddr(key.Addr), row.Port, row.Seat)
		}
	}
	if diff := cmp.Diff(map[string]BpfAddressKind{
		"10.9.1.2": BpfAddressKindADDRESS_OWN, "240.0.0.9": BpfAddressKindADDRESS_UPSTREAM, "240.0.0.1": BpfAddressKindADDRESS_PROXY,
	}, kinds); diff != "" {
		t.Errorf("addresses (-want +got):\n%s", diff)
	}
	if got.config.Seat != 2 || got.config.Seats != 1<<2|1<<0|1<<5 {
		t.Errorf("seat %d of %#b", got.config.Seat, got.config.Seats)
	}
}

// A proxy keeps its proxy ID for as long as it can be recognised.
func TestSeats(t *testing.T) {
	of := func(proxyIDs []uint8, list ...workload.Sidecar) workload.Workload {
		return workload.Workload{Mode: workload.ModeTransparent, Service: list[0].Service, InboundPort: list[0].InboundPort, OutboundPort: list[0].OutboundPort, Proxies: list[1:], Seats: proxyIDs}
	}
	api, web, db := workload.Sidecar{Service: "api", InboundPort: 1, OutboundPort: 2}, workload.Sidecar{Service: "web", InboundPort: 3, OutboundPort: 4}, workload.Sidecar{Service: "db", InboundPort: 5, OutboundPort: 6}
	moved := workload.Sidecar{Service: "web", InboundPort: 13, OutboundPort: 14}
	plain := func(list ...workload.Sidecar) workload.Workload {
		list[0].OutboundPort = workload.DefaultOutboundPort // as Merge leaves it
		w := of(nil, list...)
		w.Mode = workload.ModeDirect
		return w
	}
	for name, tc := range map[string]struct {
		before, after workload.Workload
		want          []uint8
	}{
		"the same":                        {of(nil, api, web), of(nil, api, web), nil},
		"another comes before it":         {of(nil, web), of(nil, api, web), []uint8{1, 0}},
		"and goes again":                  {of([]uint8{1, 0}, api, web), of(nil, web), nil},
		"the first goes":                  {of(nil, api, web), of(nil, web), []uint8{1}},
		"a vacant proxy ID is not warm":   {of(nil, api, web), of(nil, db, web), []uint8{2, 1}},
		"both ports move":                 {of(nil, api, web), of(nil, moved, api), []uint8{1, 0}},
		"the only one":                    {of(nil, workload.Sidecar{OutboundPort: 15001}), of(nil, moved), nil},
		"by a port, while it has no name": {of(nil, workload.Sidecar{OutboundPort: 4}), of(nil, api, web), []uint8{1, 0}},
		"by the port that means something": {
			plain(workload.Sidecar{InboundPort: 3}), plain(workload.Sidecar{Service: "api", InboundPort: 1}, workload.Sidecar{Service: "web", InboundPort: 3}), []uint8{1, 0}},
		"all proxy IDs were taken": {
			of([]uint8{0, 1, 2, 3, 4, 5, 6, 7}, api, workload.Sidecar{}, workload.Sidecar{}, workload.Sidecar{}, workload.Sidecar{}, workload.Sidecar{}, workload.Sidecar{}, workload.Sidecar{}), of(nil, web, api), []uint8{1, 0}},
	} {
		if got := tc.before.NextProxyIDs(tc.after); !cmp.Equal(got, tc.want, cmpopts.EquateEmpty()) {
			t.Errorf("%s: proxy IDs %v, want %v", name, got, tc.want)
		}
	}
}
