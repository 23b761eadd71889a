// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/weirmesh/weir/redirect/workload"
)

// requestOf is what an ADD with the given config asks the data path for.
func requestOf(t *testing.T, config string) workload.Request {
	t.Helper()
	b := newBench()
	if err := b.Add(call("NOMAD_ALLOC_ID="+allocID+";CONSUL_IPTABLES_CONFIG="+config, confJSON)); err != nil {
		t.Fatalf("ADD with %s: %v", config, err)
	}
	return b.fake.added[0].Request
}

// withField is a valid config in which one field has another value.
func withField(field, value string) string {
	fields := map[string]json.RawMessage{
		"ProxyUserID": json.RawMessage(`"101"`), "ProxyInboundPort": json.RawMessage("20000"),
	}
	fields[field] = json.RawMessage(value)
	text := "{"
	for name, raw := range fields {
		text += fmt.Sprintf("%q:%s,", name, raw)
	}
	return strings.TrimSuffix(text, ",") + "}"
}

func TestRequestDefaults(t *testing.T) {
	got := requestOf(t, `{"ProxyUserID":"0","Unknown":{"x":1},"NetNS":7,"IptablesProvider":null,"ExcludeUIDs":null}`)
	want := workload.Request{
		Network: "nomad", Job: workload.Job{AllocID: allocID}, Mode: workload.ModeTransparent,
		OutboundPort: workload.DefaultOutboundPort, Addresses: []netip.Addr{netip.MustParseAddr("172.26.64.2")},
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(equalAddrs), cmpopts.IgnoreFields(workload.Request{}, "Notes")); diff != "" {
		t.Errorf("request (-want +got):\n%s", diff)
	}
	if len(got.Notes) != 1 || !strings.Contains(got.Notes[0], "ProxyInboundPort 0") {
		t.Errorf("notes %q: want one on ProxyInboundPort", got.Notes)
	}
}

func TestRequestAcceptsEveryExclusion(t *testing.T) {
	var ports, cidrs, uids []string
	for i := range 3000 {
		ports = append(ports, fmt.Sprint(i+1))
		cidrs = append(cidrs, fmt.Sprintf("10.%d.%d.0/24", i/256, i%256))
		uids = append(uids, fmt.Sprint(100000+i))
	}
	list := func(texts []string) string {
		data, err := json.Marshal(texts)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	got := requestOf(t, fmt.Sprintf(`{"ProxyUserID":"4294967294","ExcludeInboundPorts":%s,"ExcludeOutboundPorts":%s,"ExcludeOutboundCIDRs":%s,"ExcludeUIDs":%s}`,
		list(ports), list(ports), list(cidrs), list(uids)))
	if got.ProxyUID != 4294967294 {
		t.Errorf("proxy UID %d", got.ProxyUID)
	}
	if len(got.ExcludeInboundPorts) != 3000 || len(got.ExcludeOutboundPorts) != 3000 || len(got.ExcludeOutboundCIDRs) != 3000 || len(got.ExcludeUIDs) != 3000 {
		t.Errorf("exclusions %d, %d, %d, %d: want 3000 each", len(got.ExcludeInboundPorts), len(got.ExcludeOutboundPorts), len(got.ExcludeOutboundCIDRs), len(got.ExcludeUIDs))
	}
	if got.ExcludeInboundPorts[2999] != 3000 || got.ExcludeOutboundCIDRs[2999] != netip.MustParsePrefix("10.11.183.0/24") || got.ExcludeUIDs[2999] != 102999 {
		t.Errorf("last exclusions %d, %s, %d", got.ExcludeInboundPorts[2999], got.ExcludeOutboundCIDRs[2999], got.ExcludeUIDs[2999])
	}
}

func TestRequestDNS(t *testing.T) {
	for config, want := range map[string]workload.DNS{
		`{"ProxyUserID":"1"}`: {},
		`{"ProxyUserID":"1","ConsulDNSIP":"","ConsulDNSPort":0}`:                  {},
		`{"ProxyUserID":"1","ConsulDNSIP":"10.99.0.1","ConsulDNSPort":8600}`:      {Address: netip.MustParseAddr("10.99.0.1"), Port: 8600},
		`{"ProxyUserID":"1","ConsulDNSIP":"fd99::53","ConsulDNSPort":65535}`:      {Address: netip.MustParseAddr("fd99::53"), Port: 65535},
		`{"ProxyUserID":"1","ConsulDNSIP":"::ffff:10.99.0.1"}`:                    {Address: netip.MustParseAddr("10.99.0.1")},
		`{"ProxyUserID":"1","ConsulDNSPort":8600}`:                                {Port: 8600},
		`{"ProxyUserID":"1","consuldnsip":"10.99.0.1","CONSULDNSPORT":53,"x":[]}`: {Address: netip.MustParseAddr("10.99.0.1"), Port: 53},
	} {
		if got := requestOf(t, config).DNS; got != want {
			t.Errorf("%s: %+v: want %+v", config, got, want)
		}
	}
}

func TestBothArgumentNames(t *testing.T) {
	for name, args := range map[string]string{
		"iptables": "CONSUL_IPTABLES_CONFIG=" + meshJSON,
		"nftables": "CONSUL_NFTABLES_CONFIG=" + meshJSON,
		"the same": "CONSUL_NFTABLES_CONFIG=" + meshJSON + ";CONSUL_IPTABLES_CONFIG=" + meshJSON,
	} {
		b := newBench()
		if err := b.Add(call(args, confJSON)); err != nil {
			t.Errorf("%s: %v", name, err)
		} else if got := b.fake.added[0].Request.InboundPort; got != 20000 {
			t.Errorf("%s: inbound port %d: want 20000", name, got)
		}
	}
	for _, args := range []string{
		"CONSUL_NFTABLES_CONFIG=" + withField("ProxyUserID", `"102"`) + ";CONSUL_IPTABLES_CONFIG=" + meshJSON,
		"CONSUL_IPTABLES_CONFIG={};CONSUL_IPTABLES_CONFIG=" + meshJSON,
	} {
		b := newBench()
		wantError(t, b.Add(call(args, confJSON)), types.ErrInvalidEnvironmentVariables, allocID, "differ")
		if !b.fake.untouched() {
			t.Errorf("%s: data path touched", args)
		}
	}
}

// Every field, each kind of nonsense: an error of CNI that names the
// allocation and the field, and nothing left behind.
func TestBadFields(t *testing.T) {
	texts := []string{`7`, `true`, `{}`, `[]`, `["1"]`}
	lists := []string{`7`, `true`, `{}`, `"80"`, `[80]`, `[["80"]]`, `[null]`, `[""]`, `[" 80"]`, `["-1"]`, `["1.5"]`, `["0x50"]`, `["http"]`, `["\u0000"]`}
	numbers := []string{`"80"`, `"http"`, `true`, `{}`, `[]`, `-1`, `65536`, `1.5`, `1e3`, `99999999999999999999`}
	portLists := []string{`["65536"]`, `[":"]`, `["0:5"]`, `["9:8"]`, `["1:2:3"]`, `["1:65536"]`, `["80","x"]`, `["80,81"]`}
	for field, values := range map[string][][]string{
		"ProxyUserID":          {texts, {`null`, `""`, `"envoy"`, `"-1"`, `"+1"`, `" 1"`, `"1-2"`, `"4294967295"`, `"4294967296"`, `"99999999999999999999"`}},
		"ProxyInboundPort":     {numbers, {`15001`}},
		"ProxyOutboundPort":    {numbers, {`20000`}},
		"ConsulDNSPort":        {numbers},
		"ConsulDNSIP":          {texts, {`"x"`, `"consul.local"`, `"10.0.0.256"`, `"10.0.0"`, `"010.0.0.1"`, `"10.0.0.1:53"`, `"[::1]"`, `"fe80::1%eth0"`, `"0.0.0.0"`, `"::"`, `"224.0.0.1"`, `" 10.0.0.1"`}},
		"ExcludeInboundPorts":  {lists, portLists, {`["0:0"]`, `["00"]`}},
		"ExcludeOutboundPorts": {lists, portLists, {`["0"]`}},
		"ExcludeOutboundCIDRs": {lists, {`["10.0.0.0/33"]`, `["10.0.0.0/255.0.0.0"]`, `["fd99::/129"]`, `["10.0.0.0/"]`, `["/8"]`, `["example.com"]`, `["fe80::1%eth0"]`, `["10.0.0.0/8","x"]`}},
		"ExcludeUIDs":          {lists, {`["root"]`, `["1000-2000"]`, `["4294967295"]`, `["4294967296"]`, `["1","x"]`}},
	} {
		for _, group := range values {
			for _, value := range group {
				t.Run(field+" "+value, func(t *testing.T) {
					b := newBench()
					err := b.Add(call("NOMAD_ALLOC_ID="+allocID+";CONSUL_NFTABLES_CONFIG="+withField(field, value), confJSON))
					part := field
					if field == "ProxyInboundPort" && value == "15001" {
						part = "ProxyOutboundPort: 15001: the proxy's inbound listener"
					}
					wantError(t, err, types.ErrInvalidEnvironmentVariables, allocID, "CONSUL_NFTABLES_CONFIG", part)
					if !b.fake.untouched() || b.stdout.Len() != 0 {
						t.Errorf("left behind: %+v, stdout %q", b.fake, b.stdout.String())
					}
				})
			}
		}
	}
}

func TestBadConfigs(t *testing.T) {
	for _, config := range []string{"", "x", "[]", `"x"`, "7", "{", meshJSON + "x", meshJSON + meshJSON, withField("ExcludeUIDs", `["1;2"]`)} {
		b := newBench()
		wantError(t, b.Add(call("CONSUL_IPTABLES_CONFIG="+config, confJSON)), types.ErrDecodingFailure, allocID, "CONSUL_IPTABLES_CONFIG")
		if !b.fake.untouched() || b.stdout.Len() != 0 {
			t.Errorf("%q: left behind: %+v, stdout %q", config, b.fake, b.stdout.String())
		}
	}
	b := newBench()
	wantError(t, b.Add(call("CONSUL_IPTABLES_CONFIG=null", confJSON)), types.ErrInvalidEnvironmentVariables, allocID, "ProxyUserID: missing")
}

// What a job's author writes must not fill the log or break its lines.
func TestErrorsShowUntrustedTextShortened(t *testing.T) {
	b := newBench()
	err := b.Add(call("CONSUL_IPTABLES_CONFIG="+withField("ProxyUserID", `"`+strings.Repeat(`x\n`, 50000)+`"`), confJSON))
	wantError(t, err, types.ErrInvalidEnvironmentVariables, "ProxyUserID")
	if text := err.Error(); len(text) > 400 || strings.Contains(text, "\n") {
		t.Errorf("error of %d bytes: %.200q", len(text), text)
	}
}
