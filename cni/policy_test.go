// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/redirect/workload"
)

// configured is a bench whose node has files of the agent's configuration.
func configured(t *testing.T, files map[string]string) *bench {
	t.Helper()
	b := newBench()
	b.ConfigDir = t.TempDir()
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(b.ConfigDir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// A job author is not an operator: what takes traffic out of the mesh needs
// the operator's word, what puts a job into it does not.
func TestPolicyOfJobArguments(t *testing.T) {
	const base = "weir.mode=transparent;weir.inbound-port=20000"
	const excluding = base + ";weir.exclude-outbound-ports=22"
	for _, c := range []struct {
		name, args, conf string
		files            map[string]string
		refused          string // empty: allowed
	}{
		{name: "by default into the mesh", args: base + ";weir.outbound-port=15002;weir.guard=enforce"},
		{name: "by default no exclusion", args: excluding, refused: "weir.exclude-outbound-ports: the operator"},
		{name: "by default no inbound exclusion", args: base + ";weir.exclude-inbound-ports=22", refused: "weir.exclude-inbound-ports"},
		{name: "by default no CIDR", args: base + ";weir.exclude-outbound-cidrs=::/0", refused: "weir.exclude-outbound-cidrs"},
		{name: "by default no UID", args: base + ";weir.exclude-uids=0", refused: "weir.exclude-uids"},
		{name: "by default no UID of the proxy", args: base + ";weir.proxy-uid=0", refused: "weir.proxy-uid"},
		{name: "by default no resolver", args: base + ";weir.dns=10.0.0.1:5432", refused: "weir.dns"},
		{name: "by default no forwarding", args: base + ";weir.forward=true", refused: "weir.forward: the operator"},
		{name: "beside Consul's request too", args: "weir.exclude-uids=0;" + meshArgs, refused: "weir.exclude-uids"},
		{name: "the network allows", args: excluding, conf: `"jobArgs":["mode","inbound-port","exclude-outbound-ports"]`},
		{name: "the network allows none", args: "weir.mode=direct", conf: `"jobArgs":[]`, refused: "allowed by jobArgs of the network configuration: none"},
		{name: "the list is the whole list", args: base, conf: `"jobArgs":["mode"]`, refused: "weir.inbound-port"},
		{name: "the file allows", args: excluding, files: map[string]string{
			"weir.hcl": "log_level = \"info\"\ncni {\n  cache_dir = \"/x\"\n  job_args = [\"mode\", \"inbound-port\", \"exclude-outbound-ports\"]\n}\ntelemetry {}\n"}},
		{name: "the later file wins", args: excluding, files: map[string]string{
			"a.hcl": "cni { job_args = [\"mode\", \"inbound-port\", \"exclude-outbound-ports\"] }", "b.hcl": "cni { job_args = [] }"},
			refused: "allowed by job_args of"},
		{name: "a file without the key changes nothing", args: excluding, files: map[string]string{
			"a.hcl": "cni { job_args = [\"mode\", \"inbound-port\", \"exclude-outbound-ports\"] }", "b.hcl": "cni {}\n", "c.txt": "cni { job_args = [] }"}},
		{name: "the network wins over the file", args: excluding, conf: `"jobArgs":["mode"]`, files: map[string]string{
			"a.hcl": "cni { job_args = [\"mode\", \"inbound-port\", \"exclude-outbound-ports\"] }"}, refused: "weir."},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := configured(t, c.files)
			conf := confJSON
			if c.conf != "" {
				conf = confWith(c.conf)
			}
			args := c.args
			if !strings.Contains(args, "NOMAD_ALLOC_ID") {
				args = ownArgs(args)
			}
			err := b.Add(call(args, conf))
			if c.refused == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			wantError(t, err, types.ErrInvalidEnvironmentVariables, allocID, c.refused)
			if !b.fake.untouched() || b.stdout.Len() != 0 {
				t.Errorf("left behind: %+v, stdout %q", b.fake, b.stdout.String())
			}
		})
	}
}

// A policy that cannot be read may have forbidden what the default allows.
func TestUnreadablePolicyRefuses(t *testing.T) {
	for _, c := range []struct {
		conf  string
		files map[string]string
		part  string
	}{
		{files: map[string]string{"weir.hcl": "cni {"}, part: "weir.hcl:1"},
		{files: map[string]string{"weir.hcl": "cni {\n  job_args = \"mode\"\n}"}, part: "weir.hcl:2"},
		{files: map[string]string{"weir.hcl": "cni {\n  job_args = [\"mod\"]\n}"}, part: `"mod"`},
		{conf: `"jobArgs":"mode"`, part: "jobArgs"},
		{conf: `"jobArgs":["weir.mode"]`, part: `"weir.mode"`},
		{conf: `"consulExclusions":"no"`, part: "consulExclusions"},
	} {
		b := configured(t, c.files)
		conf := confJSON
		if c.conf != "" {
			conf = confWith(c.conf)
		}
		wantError(t, b.Add(call(ownArgs("weir.mode=transparent"), conf)), types.ErrInvalidNetworkConfig, allocID, "policy", c.part)
		if !b.fake.untouched() {
			t.Errorf("%+v: data path touched", c)
		}
		if err := b.Del(call("", conf)); err != nil {
			t.Errorf("DEL: %v", err)
		}
		if err := b.Add(call(meshArgs, conf)); err != nil {
			t.Errorf("ADD of a request that no policy concerns: %v", err)
		}
	}
	b := newBench()
	b.ConfigDir = ""
	wantError(t, b.Add(call(ownArgs("weir.mode=direct"), confWith(`"configDir":"etc"`))), types.ErrInvalidNetworkConfig, `"etc"`)
}

func TestConfigDirOfTheNetwork(t *testing.T) {
	dir := configured(t, map[string]string{"weir.hcl": "cni { job_args = [] }"}).ConfigDir
	b := newBench()
	b.ConfigDir = ""
	wantError(t, b.Add(call(ownArgs("weir.mode=direct"), confWith(`"configDir":"`+dir+`"`))), types.ErrInvalidEnvironmentVariables, dir)
}

func TestProxyUIDOfTheNode(t *testing.T) {
	b := configured(t, map[string]string{"weir.hcl": "proxy { default_uid = 200000 }"})
	if err := b.Add(call(ownArgs("weir.mode=direct"), confJSON)); err != nil {
		t.Fatal(err)
	}
	if got := b.fake.added[0].Request; got.ProxyUID != 200000 || got.Mode != workload.ModeDirect {
		t.Errorf("request %+v", got)
	}
}

// Exclusions in Consul's argument cannot be told from those that a job's author
// wrote there himself; an operator can refuse both. Inbound ports stay: Nomad
// writes static ports there.
func TestPolicyOfConsulsExclusions(t *testing.T) {
	with := func(field, value string) string {
		return ownArgs("CONSUL_IPTABLES_CONFIG=" + withField(field, value))
	}
	for _, where := range []string{"network", "file"} {
		for args, allowed := range map[string]bool{
			with("ExcludeOutboundPorts", `["22"]`):      false,
			with("ExcludeOutboundCIDRs", `["::/0"]`):    false,
			with("ExcludeUIDs", `["0"]`):                false,
			with("ExcludeInboundPorts", `["0","8181"]`): true,
			with("ExcludeUIDs", `[]`):                   true,
			meshArgs:                                    true,
		} {
			b, conf := newBench(), confWith(`"consulExclusions":false`)
			if where == "file" {
				b, conf = configured(t, map[string]string{"weir.hcl": "cni { consul_exclusions = false }"}), confJSON
			}
			err := b.Add(call(args, conf))
			if allowed && err != nil {
				t.Errorf("%s: %v", args, err)
			}
			if !allowed {
				wantError(t, err, types.ErrInvalidEnvironmentVariables, allocID, "CONSUL_IPTABLES_CONFIG", "operator")
			}
			if b := newBench(); b.Add(call(args, confJSON)) != nil {
				t.Errorf("%s: refused by default", args)
			}
		}
	}
}

// The network's own word is enough for what its allocations forward, and only true is one.
func TestForwardOfTheNetwork(t *testing.T) {
	for value, want := range map[string]bool{"true": true, "false": false, "null": false} {
		b := newBench()
		if err := b.Add(call(meshArgs, confWith(`"forward":`+value))); err != nil {
			t.Fatal(err)
		}
		if got := b.fake.added[0].Request.Forward; got != want {
			t.Errorf("forward %s: the request says %t", value, got)
		}
	}
	b := newBench()
	if err := b.Add(call(meshArgs, confWith(`"forward":"allow"`))); err == nil || !strings.Contains(err.Error(), "forward") || len(b.fake.added) > 0 {
		t.Errorf("forward of another type: %v, want an error that names the key", err)
	}
}
