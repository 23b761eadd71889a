// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/cni/request"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// confWith is a network configuration with more keys.
func confWith(keys string) string {
	return strings.Replace(confJSON, `"log_level":"debug"`, keys, 1)
}

// everyJobArg is a configuration whose operator allows everything.
func everyJobArg() string {
	return confWith(`"jobArgs":["` + strings.ReplaceAll(strings.Join(request.JobArgs(), ", "), ", ", `","`) + `"]`)
}

func ownArgs(args string) string { return "NOMAD_ALLOC_ID=" + allocID + ";" + args }

// ownBase is what an allocation asks for that says no more than its mode.
func ownBase(mode workload.Mode) workload.Request {
	request := workload.Request{
		Network: "nomad", Job: workload.Job{AllocID: allocID}, Mode: mode, ProxyUID: 101,
		Addresses: []netip.Addr{netip.MustParseAddr("172.26.64.2")},
	}
	if mode == workload.ModeTransparent {
		request.OutboundPort = workload.DefaultOutboundPort
	}
	return request
}

func TestJobArguments(t *testing.T) {
	unknownInbound := "weir.inbound-port missing: the request does not name the proxy's inbound listener; inbound connections are refused until it is known"
	for args, change := range map[string]func(*workload.Request){
		"weir.mode=transparent":                           func(r *workload.Request) { r.Notes = []string{unknownInbound} },
		"weir.mode= transparent ;weir.inbound-port=20000": func(r *workload.Request) { r.InboundPort = 20000 },
		"weir.mode=transparent;weir.inbound-port=20000;weir.outbound-port=15009;weir.proxy-uid=4294967294;weir.guard=enforce;weir.egress=audit": func(r *workload.Request) {
			r.InboundPort, r.OutboundPort, r.ProxyUID, r.Guard, r.Egress = 20000, 15009, 4294967294, workload.GuardEnforce, workload.GuardAudit
		},
		"weir.mode=transparent;weir.inbound-port=15001;weir.outbound-port=15002": func(r *workload.Request) {
			r.InboundPort, r.OutboundPort = 15001, 15002
		},
		"weir.mode=transparent;weir.inbound-port=1;weir.dns=10.99.0.1:8600": func(r *workload.Request) {
			r.InboundPort, r.DNS = 1, workload.DNS{Address: netip.MustParseAddr("10.99.0.1"), Port: 8600}
		},
		"weir.mode=transparent;weir.inbound-port=1;weir.dns=fd99::53": func(r *workload.Request) {
			r.InboundPort, r.DNS = 1, workload.DNS{Address: netip.MustParseAddr("fd99::53"), Port: 53}
		},
		"weir.mode=transparent;weir.inbound-port=1;weir.dns=[fd99::53]:8600": func(r *workload.Request) {
			r.InboundPort, r.DNS = 1, workload.DNS{Address: netip.MustParseAddr("fd99::53"), Port: 8600}
		},
		"weir.mode=transparent;weir.inbound-port=1;weir.exclude-outbound-ports=ssh@22, metrics@9102,8000:8002,22": func(r *workload.Request) {
			r.InboundPort, r.ExcludeOutboundPorts = 1, []uint16{22, 8000, 8001, 8002, 9102}
			r.Notes = []string{"the job excludes outbound ports ssh@22, metrics@9102, 8000:8002, 22"}
		},
		"weir.mode=transparent;weir.inbound-port=1;weir.exclude-outbound-cidrs=db@10.1.2.3/8,db:fd99::/64": func(r *workload.Request) {
			r.InboundPort = 1
			r.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("db:fd99::/64")}
			r.Notes = []string{"the job excludes outbound CIDRs db@10.1.2.3/8, db:fd99::/64"}
		},
		"weir.mode=transparent;weir.inbound-port=1;weir.exclude-uids=backup@1200,0;weir.exclude-inbound-ports=health@7071": func(r *workload.Request) {
			r.InboundPort, r.ExcludeUIDs, r.ExcludeInboundPorts = 1, []uint32{0, 1200}, []uint16{7071}
			r.Notes = []string{"the job excludes inbound ports health@7071", "the job excludes UIDs backup@1200, 0"}
		},
	} {
		t.Run(args, func(t *testing.T) {
			want := ownBase(workload.ModeTransparent)
			change(&want)
			wantRequest(t, ownArgs(args), everyJobArg(), want)
		})
	}
	forwarding := ownBase(workload.ModeDirect)
	forwarding.Forward = true
	wantRequest(t, ownArgs("weir.mode=direct;weir.forward=true"), everyJobArg(), forwarding)
	direct := ownBase(workload.ModeDirect)
	direct.Guard, direct.ExcludeInboundPorts, direct.ProxyUID = workload.GuardEnforce, []uint16{8080}, 7
	direct.Notes = []string{"the job excludes inbound ports http@8080"}
	wantRequest(t, ownArgs("weir.mode=direct;weir.guard=enforce;weir.exclude-inbound-ports=http@8080;weir.proxy-uid=7"), everyJobArg(), direct)
	wantRequest(t, ownArgs("weir.mode=gateway"), everyJobArg(), ownBase(workload.ModeGateway))
	guarded := ownBase(workload.ModeDirect)
	guarded.Egress, guarded.ExcludeOutboundPorts = workload.GuardEnforce, []uint16{123}
	guarded.Notes = []string{"the job excludes outbound ports ntp@123"}
	wantRequest(t, ownArgs("weir.mode=direct;weir.egress=enforce;weir.exclude-outbound-ports=ntp@123"), everyJobArg(), guarded)
}

func wantRequest(t *testing.T, args, conf string, want workload.Request) {
	t.Helper()
	b := newBench()
	if err := b.Add(call(args, conf)); err != nil {
		t.Fatalf("ADD with %s: %v", args, err)
	}
	if diff := cmp.Diff(want, b.fake.added[0].Request, cmp.Comparer(equalAddrs), cmp.Comparer(equalPrefixes)); diff != "" {
		t.Errorf("%s: request (-want +got):\n%s", args, diff)
	}
	if b.stdout.Len() == 0 {
		t.Error("no result on stdout")
	}
}

// Every key, each kind of nonsense: an error that names allocation, key and
// value, and nothing left behind.
func TestBadJobArguments(t *testing.T) {
	numbers := []string{"", "0", "-1", "+1", "65536", "http", "1.5", "0x50", "${NOMAD_PORT_connect_proxy_web}", "80,81"}
	lists := []string{"", ",", "80,", "@80", "a b@80", "ssh@", "x", "ssh=22", strings.Repeat("n", 41) + "@80"}
	for name, groups := range map[string][][]string{
		"mode":                   {{"", "x", "Transparent", "transparent,direct"}},
		"guard":                  {{"", "off", "x", "Enforce"}},
		"egress":                 {{"", "off", "x", "Enforce"}},
		"forward":                {{"", "false", "1", "True"}},
		"proxy-uid":              {{"", "-1", "+1", "envoy", "1-2", "4294967295", "4294967296"}},
		"inbound-port":           {numbers},
		"outbound-port":          {numbers},
		"dns":                    {{"", "off", "x", "53", "10.0.0.256", "10.0.0.1:0", "10.0.0.1:x", "10.0.0.1:65536", "fe80::1%eth0", "0.0.0.0", "::", "224.0.0.1:53"}},
		"exclude-inbound-ports":  {lists, {"0", "65536", "9:8", ":", "a@b@80"}},
		"exclude-outbound-ports": {lists, {"0", "65536", "9:8", ":", "a@b@80"}},
		"exclude-outbound-cidrs": {lists, {"10.0.0.0/33", "example.com", "db@fe80::1%eth0"}},
		"exclude-uids":           {lists, {"root", "1-2", "4294967295"}},
	} {
		for _, value := range slices.Concat(groups...) {
			t.Run(name+" "+value, func(t *testing.T) {
				args := "weir." + name + "=" + value
				if name != "mode" {
					args += ";weir.mode=transparent"
				}
				wantJobArgsRefused(t, ownArgs(args), everyJobArg(), "weir."+name, fmt.Sprintf("%q", value))
			})
		}
	}
	for args, part := range map[string]string{
		"weir.mod=transparent": "unknown",
		"weir.=x":              "unknown",
		"weir.mode=transparent;weir.Guard=enforce":                              `"weir.Guard": unknown`,
		"weir.guard=enforce":                                                    "weir.mode: missing",
		"weir.mode=transparent;weir.mode=direct":                                "weir.mode: given twice",
		"weir.mode=transparent;weir.inbound-port=15001":                         "port 15001",
		"weir.mode=direct;weir.inbound-port=80":                                 "weir.inbound-port",
		"weir.mode=direct;weir.outbound-port=80":                                "weir.outbound-port",
		"weir.mode=gateway;weir.dns=10.0.0.1":                                   "weir.dns",
		"weir.mode=direct;weir.exclude-uids=1":                                  "weir.exclude-uids",
		"weir.mode=transparent;weir.proxy-uid=" + strings.Repeat(`x\n`, 100000): "weir.proxy-uid",
	} {
		wantJobArgsRefused(t, ownArgs(args), everyJobArg(), part)
	}
}

func wantJobArgsRefused(t *testing.T, args, conf string, parts ...string) {
	t.Helper()
	b := newBench()
	err := b.Add(call(args, conf))
	shown := make([]string, 0, len(parts))
	for _, part := range parts {
		if len(part) > 80 { // as the error does
			part = part[:80]
		}
		shown = append(shown, part)
	}
	wantError(t, err, types.ErrInvalidEnvironmentVariables, append(shown, allocID)...)
	if err != nil && (len(err.Error()) > 500 || strings.Contains(err.Error(), "\n")) {
		t.Errorf("error of %d bytes: %.200q", len(err.Error()), err.Error())
	}
	if !b.fake.untouched() || b.stdout.Len() != 0 {
		t.Errorf("%s: left behind: %+v, stdout %q", args, b.fake, b.stdout.String())
	}
}

// Beside a transparent_proxy block a job's arguments add to what it says, and
// never contradict it.
func TestJobArgumentsBesideATransparentProxyBlock(t *testing.T) {
	b := newBench()
	const args = ";weir.mode=transparent;weir.guard=enforce;weir.proxy-uid=101;weir.inbound-port=20000;weir.outbound-port=15001;weir.dns=10.99.0.1:8600"
	consul := ownArgs(`CONSUL_IPTABLES_CONFIG={"ConsulDNSIP":"10.99.0.1","ConsulDNSPort":8600,"ProxyUserID":"101","ProxyInboundPort":20000,` +
		`"ExcludeInboundPorts":["7071"],"ExcludeOutboundPorts":["7777"],"ExcludeOutboundCIDRs":["10.0.0.0/8"],"ExcludeUIDs":["1200"]}`)
	if err := b.Add(call(consul, confJSON)); err != nil {
		t.Fatal(err)
	}
	want := b.fake.added[0].Request
	want.Guard = workload.GuardEnforce
	wantRequest(t, consul+args, everyJobArg(), want)

	want.ExcludeInboundPorts, want.ExcludeOutboundPorts, want.ExcludeUIDs = []uint16{7071, 7072}, []uint16{22, 7777}, []uint32{5, 1200}
	want.ExcludeOutboundCIDRs = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("192.0.2.1/32")}
	want.Notes = []string{
		"the job excludes inbound ports 7072", "the job excludes outbound ports ssh@22",
		"the job excludes outbound CIDRs 192.0.2.1, 10.0.0.0/8", "the job excludes UIDs 5",
	}
	wantRequest(t, consul+args+";weir.exclude-inbound-ports=7072;weir.exclude-outbound-ports=ssh@22;"+
		"weir.exclude-outbound-cidrs=192.0.2.1,10.0.0.0/8;weir.exclude-uids=5", everyJobArg(), want)

	for _, contradiction := range []string{
		"weir.mode=direct", "weir.mode=gateway", "weir.proxy-uid=102", "weir.inbound-port=20001", "weir.outbound-port=15002", "weir.dns=10.99.0.2:8600",
	} {
		wantJobArgsRefused(t, consul+";"+contradiction, everyJobArg(), strings.Split(contradiction, "=")[0], "transparent_proxy")
	}
}

// What the block leaves open, such as the inbound port of a custom
// sidecar_service.port, an argument fills.
func TestJobArgumentsFillWhatTheBlockLeavesOpen(t *testing.T) {
	want := ownBase(workload.ModeTransparent)
	want.InboundPort, want.DNS = 20000, workload.DNS{Address: netip.MustParseAddr("10.0.0.1"), Port: 53}
	wantRequest(t, ownArgs(`CONSUL_IPTABLES_CONFIG={"ProxyUserID":"101","ProxyInboundPort":0};weir.inbound-port=20000;weir.dns=10.0.0.1`), everyJobArg(), want)
}

func TestCheckReadsJobArguments(t *testing.T) {
	args := ownArgs("weir.mode=transparent;weir.inbound-port=20000")
	b := newBench()
	if err := b.Check(call(args, confJSON)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]workload.AttachmentID{key()}, b.fake.checked); diff != "" {
		t.Errorf("checked (-want +got):\n%s", diff)
	}
	lost, reference := newBench(), newBench()
	lost.fake.checkErr = store.ErrUnknown
	if err := lost.Check(call(args, confJSON)); err != nil {
		t.Fatal(err)
	}
	if err := reference.Add(call(args, confJSON)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(reference.fake.added, lost.fake.added, cmp.Comparer(equalAddrs)); diff != "" {
		t.Errorf("restored otherwise than ADD (-ADD +CHECK):\n%s", diff)
	}
}

// FuzzJobArguments holds the arguments to what they promise: whatever they say
// is refused, or is a request that the data path takes, that has the mode they
// name and a guard that is none or one of the two.
func FuzzJobArguments(f *testing.F) {
	for _, seed := range []string{
		"weir.mode=transparent", "weir.mode=direct;weir.guard=enforce", "weir.mode=transparent;weir.inbound-port=15001;weir.outbound-port=15001",
		"weir.mode=transparent;weir.exclude-outbound-ports=a@1:3,:5,65535:", "weir.mode=transparent;weir.exclude-outbound-cidrs=::/0,::ffff:1.2.3.4/97",
		"weir.mode=transparent;weir.dns=[::ffff:1.2.3.4]:1", "weir.mode=gateway;weir.exclude-inbound-ports=,", "weir.mode==;weir.=;weir.dns=@",
		"weir.guard=audit;CONSUL_IPTABLES_CONFIG={\"ProxyUserID\":\"1\"};weir.exclude-uids=0,1@2",
	} {
		f.Add(seed)
	}
	conf := everyJobArg()
	f.Fuzz(func(t *testing.T, args string) {
		if strings.ContainsRune(args, 0) {
			return // no environment holds it
		}
		b := newBench()
		if err := b.Add(call(args, conf)); err != nil {
			if !b.fake.untouched() || strings.Contains(err.Error(), "\n") {
				t.Errorf("%q: error %q, data path %+v", args, err, b.fake)
			}
			// What two of them contradict each other in is told by the value.
			_, given := request.ParseArgs(args)
			told := func(a request.Arg) bool { return a.Value != "" && strings.Contains(err.Error(), a.Value) }
			if !strings.Contains(err.Error(), "weir.") && !strings.Contains(err.Error(), "CONSUL_IPTABLES_CONFIG") &&
				!strings.Contains(err.Error(), "CONSUL_NFTABLES_CONFIG") && !slices.ContainsFunc(given.Own, told) {
				t.Errorf("%q: the error names no argument: %v", args, err)
			}
			return
		}
		if _, asked := request.ParseArgs(args); asked.None() {
			return
		}
		added := b.fake.added[0].Request
		if err := workload.Merge(added, workload.MeshConfig{}).Validate(); err != nil {
			t.Errorf("%q: the data path would refuse it: %v", args, err)
		}
		if workload.Merge(added, workload.MeshConfig{Guard: workload.GuardEnforce}).Guard != workload.GuardEnforce {
			t.Errorf("%q weakens the guard", args)
		}
		if added.Mode != workload.ModeTransparent && (added.InboundPort != 0 || len(added.ExcludeOutboundPorts) > 0) {
			t.Errorf("%q: request %+v", args, added)
		}
	})
}
