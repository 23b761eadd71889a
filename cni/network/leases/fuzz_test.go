// SPDX-License-Identifier: MPL-2.0

package leases

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
)

// FuzzConfig holds what a network says of addresses, and what CNI_ARGS ask for: it is
// refused by the name of a key, or each range lies in its subnet, each set has one
// family, no two overlap, and a set hands out what is its own.
func FuzzConfig(f *testing.F) {
	for _, seed := range []struct{ text, args string }{
		{`{"name":"weir","ipam":{"type":"host-local","ranges":[[{"subnet":"172.26.64.0/20"}],[{"subnet":"fd00::/64","gateway":"fd00::9"}]]}}`, ""},
		{`{"ipam":{"subnet":"10.0.0.0/30","rangeStart":"10.0.0.2","rangeEnd":"10.0.0.2","routes":[{"dst":"0.0.0.0/0"}]}}`, "IgnoreUnknown=true;IP=10.0.0.2/30"},
		{`{"ipam":{"ranges":[[]]}}`, ""}, {`{"ipam":{"ranges":[]}}`, "IP="}, {`{"ipam":null}`, ""}, {`{"ipam":{"subnet":"10.0.0.0/24","routes":[{"dst":"x"}]}}`, ""}, {`{"ipam":{"subnet":"x"}}`, ""}, {`{"ipam":{"subnet":7}}`, "IP=x"},
		{`{"ipam":{"ranges":[[{"subnet":"10.0.0.0/24","rangeStart":"10.0.1.1"}]]},"runtimeConfig":{"ips":[""]}}`, ""},
		{`{"ipam":{"ranges":[[{"subnet":"::ffff:10.0.0.0/120"},{"subnet":"0.0.0.0/0","rangeEnd":"fe80::1%eth0"}]]},"args":{"cni":{"ips":["10.0.0.1/99","x"]}}}`, ";="},
		{`{"ipam":{"ranges":[[{"subnet":"255.255.255.252/30"}],[{"subnet":"255.255.255.252/30"}]]}}`, "IP=1.2.3.4"}, {"", ""}, {"null", "A"}, {"[]", ""},
	} {
		f.Add([]byte(seed.text), seed.args)
	}
	f.Fuzz(func(t *testing.T, text []byte, args string) {
		conf, err := Parse(text, args)
		if err != nil {
			if json.Valid(text) && !namesAKey(err) {
				t.Errorf("%q, %q: the error names no key: %v", text, args, err)
			}
			return
		}
		for i, set := range conf.Sets {
			wantSet(t, set)
			for _, other := range conf.Sets[:i] {
				if other.Contains(set[0].First) || set.Contains(other[0].First) {
					t.Errorf("%q: %s and %s overlap", text, set, other)
				}
			}
		}
		for _, addr := range conf.Asked {
			if !addr.IsValid() || addr.Is4In6() || addr.Zone() != "" {
				t.Errorf("%q, %q: address %s is asked for", text, args, addr)
			}
		}
	})
}

// namesAKey reports an error that says which key, or that it is CNI_ARGS.
func namesAKey(err error) bool {
	for _, key := range []string{"ipam", "range", "subnet", "gateway", "ips", "routes", "network configuration", "ARGS", "Go struct field"} {
		if strings.Contains(err.Error(), key) {
			return true
		}
	}
	return false
}

func wantSet(t *testing.T, set Set) {
	t.Helper()
	if len(set) == 0 {
		t.Fatal("a set without a range")
	}
	for _, r := range set {
		for _, addr := range []netip.Addr{r.First, r.Last} {
			if !r.Subnet.Contains(addr) || addr.Is4() != set[0].First.Is4() {
				t.Errorf("%s of %s is not in %s", addr, set, r.Subnet)
			}
		}
		if r.Last.Less(r.First) || !r.Gateway.IsValid() {
			t.Errorf("range %s, gateway %s", r, r.Gateway)
		}
	}
	taken := 0
	for addr, r := range set.after(netip.Addr{}) {
		if !r.contains(addr) || !set.Contains(addr) || addr == r.Gateway {
			t.Errorf("%s is handed out of %s, gateway %s", addr, r, r.Gateway)
		}
		if taken++; taken > 8 {
			break
		}
	}
}
