// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"encoding/base64"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/cni/request"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// cachedConfig is, as libcni keeps it: {"name":"nomad","plugins":[{"type":"bridge"},{"type":"consul-cni","jobArgs":["mode"]}]}
const cachedConfig = "eyJuYW1lIjoibm9tYWQiLCJwbHVnaW5zIjpbeyJ0eXBlIjoiYnJpZGdlIn0seyJ0eXBlIjoiY29uc3VsLWNuaSIsImpvYkFyZ3MiOlsibW9kZSJdfV19"

// A result as libcni 1.3 writes it after Nomad's bridge network.
const cachedResult = `{
  "kind": "cniCacheV1", "containerId": "b412a0b1-e285-703a-01ba-3d1b2e2228f7", "config": "` + cachedConfig + `", "ifName": "eth0", "networkName": "nomad",
  "netns": "/var/run/netns/b412a0b1-e285-703a-01ba-3d1b2e2228f7",
  "cniArgs": [["IgnoreUnknown","true"],["NOMAD_JOB_ID","j1"],["NOMAD_GROUP_NAME","g"],["NOMAD_NAMESPACE","default"],["NOMAD_REGION","global"],
              ["NOMAD_ALLOC_ID","b412a0b1-e285-703a-01ba-3d1b2e2228f7"],["CONSUL_IPTABLES_CONFIG","{\"ExcludeInboundPorts\":[\"0\",\"7071\"]}"]],
  "capabilityArgs": {"portMappings": [
    {"hostPort": 23435, "containerPort": 23435, "protocol": "tcp", "hostIP": "10.99.0.1"},
    {"hostPort": 23435, "containerPort": 23435, "protocol": "udp", "hostIP": "10.99.0.1"},
    {"hostPort": 8181, "containerPort": 8181, "protocol": "tcp", "hostIP": "10.99.0.1"},
    {"hostPort": 25000, "containerPort": 8080, "protocol": "tcp", "hostIP": "10.99.0.1"}]},
  "result": {"cniVersion": "0.4.0",
    "interfaces": [{"name": "nomad"}, {"name": "veth0"}, {"name": "eth0", "sandbox": "/var/run/netns/b412a0b1-e285-703a-01ba-3d1b2e2228f7"}],
    "ips": [{"version": "4", "interface": 2, "address": "172.26.64.13/20"}, {"version": "4", "interface": 0, "address": "172.26.64.1/20"},
            {"version": "6", "interface": 2, "address": "fd00::2/64"}]}}`

func TestParseCache(t *testing.T) {
	got, ok, err := discover.ParseCache([]byte(cachedResult))
	if err != nil || !ok {
		t.Fatalf("parse = %v, %v", ok, err)
	}
	const id = "b412a0b1-e285-703a-01ba-3d1b2e2228f7"
	want := discover.Attachment{
		Key: workload.AttachmentID{ContainerID: id, IfName: "eth0"}, Network: "nomad", NetNS: "/var/run/netns/" + id,
		Job:       workload.Job{Region: "global", Namespace: "default", ID: "j1", Group: "g", AllocID: id},
		Addresses: []netip.Addr{netip.MustParseAddr("172.26.64.13"), netip.MustParseAddr("fd00::2")},
		Ports: []discover.PortMapping{
			{HostPort: 23435, ContainerPort: 23435, Protocol: "tcp"}, {HostPort: 23435, ContainerPort: 23435, Protocol: "udp"},
			{HostPort: 8181, ContainerPort: 8181, Protocol: "tcp"}, {HostPort: 25000, ContainerPort: 8080, Protocol: "tcp"},
		},
		Args: request.Args{Mesh: []request.Arg{{Key: "CONSUL_IPTABLES_CONFIG", Value: `{"ExcludeInboundPorts":["0","7071"]}`}}},
		Conf: &request.Network{Name: "nomad", JobArgs: json.RawMessage(`["mode"]`)},
	}
	if diff := cmp.Diff(want, got, sameAddrs()); diff != "" {
		t.Errorf("attachment (-want +got):\n%s", diff)
	}
}

// A job's own arguments are known, too, where a plugin of ours was given them: a job's
// author can write them in any network, and is not out of the agent's sight by it.
func TestParseCacheSeesJobArguments(t *testing.T) {
	text := strings.Replace(cachedResult, `["IgnoreUnknown","true"]`, `["IgnoreUnknown","true"],["weir.mode","transparent"]`, 1)
	got, ok, err := discover.ParseCache([]byte(text))
	want := []request.Arg{{Key: "weir.mode", Value: "transparent"}}
	if err != nil || !ok || !slices.Equal(got.Args.Own, want) {
		t.Errorf("parse = %+v, %v, %v; want an attachment with arguments %v", got, ok, err, want)
	}
	if got, _, _ := discover.ParseCache([]byte(cachedResult)); len(got.Args.Own) > 0 || !got.Asked() {
		t.Errorf("arguments of Nomad's and Consul's count as the job's own: %+v", got.Args)
	}
	for config, asked := range map[string]bool{
		`{"name":"nomad","plugins":[{"type":"bridge"},{"type":"portmap"}]}`: false,
		`{"name":"weir","type":"bridge"}`:                                   false,
		`{"name":"weir","type":"weir"}`:                                     true,
		`{"name":"nomad","plugins":[{"type":"bridge"},{"type":"weir"}]}`:    true,
		`{"name":"nomad","plugins":[`:                                       true, // not known, so not denied
		``:                                                                  true,
	} {
		got, _, err := discover.ParseCache([]byte(strings.Replace(text, cachedConfig, base64.StdEncoding.EncodeToString([]byte(config)), 1)))
		if err != nil || got.Asked() != asked {
			t.Errorf("network %s: %+v, %v; a plugin of ours was asked: want %t", config, got.Args, err, asked)
		}
		if known := strings.Contains(config, `"type":"weir"`); (got.Conf != nil) != known {
			t.Errorf("network %s: configuration %+v", config, got.Conf)
		}
	}
}

// Older libraries do not write the namespace beside the result.
func TestParseCacheFindsTheNamespaceInTheResult(t *testing.T) {
	var entry map[string]any
	if err := json.Unmarshal([]byte(cachedResult), &entry); err != nil {
		t.Fatal(err)
	}
	delete(entry, "netns")
	data, err := json.Marshal(entry)
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := discover.ParseCache(data)
	if err != nil || got.NetNS != "/var/run/netns/b412a0b1-e285-703a-01ba-3d1b2e2228f7" {
		t.Errorf("namespace = %q, %v", got.NetNS, err)
	}
}

func TestParseCacheLeavesOthersAlone(t *testing.T) {
	for _, text := range []string{`{}`, `{"kind":"cniCacheV1","containerId":"pod","ifName":"eth0"}`, `{"kind":"later","containerId":"a","ifName":"b"}`} {
		if got, ok, err := discover.ParseCache([]byte(text)); ok || err != nil {
			t.Errorf("parse of %s = %+v, %v, %v; want nothing", text, got, ok, err)
		}
	}
}

func TestCacheReadsChangesAndTellsOfDamage(t *testing.T) {
	c := &discover.Cache{Dir: filepath.Join(t.TempDir(), "results")}
	if found, problems, err := c.Read(); err != nil || len(found)+len(problems) > 0 {
		t.Fatalf("read of a directory that is not there = %v, %v, %v; want nothing", found, problems, err)
	}
	if err := os.Mkdir(c.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	path := test.WriteFile(t, filepath.Join(c.Dir, "nomad-b412-eth0"), cachedResult[:200])
	if found, problems, err := c.Read(); err != nil || len(found)+len(problems) != 0 || !c.Halfway {
		t.Fatalf("read of a file that is being written = %v, %v, %v, halfway %v; want to be told so", found, problems, err, c.Halfway)
	}
	for _, age := range []time.Duration{time.Minute, -time.Minute} { // a clock may be set back
		then := time.Now().Add(-age)
		if err := os.Chtimes(path, then, then); err != nil {
			t.Fatal(err)
		}
		if found, problems, err := c.Read(); err != nil || len(found) != 0 || len(problems) != 1 || c.Halfway {
			t.Fatalf("read of half a file = %v, %v, %v, halfway %v; want one problem", found, problems, err, c.Halfway)
		}
	}
	test.WriteFile(t, path, cachedResult)
	found, problems, err := c.Read()
	if err != nil || len(found) != 1 || len(problems) != 0 {
		t.Fatalf("read of the whole file = %v, %v, %v; want one attachment", found, problems, err)
	}
	if c.Halfway {
		t.Error("a whole file counts as half of one")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if found, _, err := c.Read(); err != nil || len(found) != 0 {
		t.Errorf("read after the file is gone = %v, %v; want nothing", found, err)
	}
}

// A file that cannot be read says nothing of an end: what was last read of it stays until
// the file is gone. It is read again each time, since what hindered need not change it.
func TestCacheKeepsWhatItCannotRead(t *testing.T) {
	c := &discover.Cache{Dir: t.TempDir()}
	path := test.WriteFile(t, filepath.Join(c.Dir, "nomad-b412-eth0"), cachedResult)
	want, problems, err := c.Read()
	if err != nil || len(want) != 1 || len(problems) > 0 {
		t.Fatalf("read = %v, %v, %v; want one attachment", want, problems, err)
	}
	reads := func(problems int, halfway bool) {
		t.Helper()
		found, told, err := c.Read()
		if diff := cmp.Diff(want, found, sameAddrs()); err != nil || diff != "" || len(told) != problems || c.Halfway != halfway {
			t.Errorf("problems %q, %v, halfway %v, attachments (-want +got):\n%s", told, err, c.Halfway, diff)
		}
	}
	for _, half := range []string{"", cachedResult[:200]} {
		test.WriteFile(t, path, half)
		reads(0, true)
		reads(0, true)
	}
	then := time.Now().Add(-time.Minute)
	damaged := strings.Repeat(" ", len(cachedResult))
	for _, step := range []struct {
		text     string
		problems int
	}{{damaged, 1}, {cachedResult, 0}} { // of one size and one time
		test.WriteFile(t, path, step.text)
		if err := os.Chtimes(path, then, then); err != nil {
			t.Fatal(err)
		}
		reads(step.problems, false)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	clear(want)
	reads(0, false)
}

func TestStaticPortsWithoutTo(t *testing.T) {
	mapping := func(host, container uint16) discover.PortMapping {
		return discover.PortMapping{HostPort: host, ContainerPort: container, Protocol: "tcp"}
	}
	for _, c := range []struct {
		name    string
		ports   []discover.PortMapping
		unnamed int
		want    []uint16
	}{
		{"none is unnamed", []discover.PortMapping{mapping(8181, 8181)}, 0, nil},
		{"the numbers add up", []discover.PortMapping{mapping(8181, 8181), mapping(25001, 25001)}, 2, []uint16{8181, 25001}},
		{"a dynamic one is left out", []discover.PortMapping{mapping(8181, 8181), mapping(25001, 25001)}, 1, []uint16{8181}},
		{"the proxy's own is no static port", []discover.PortMapping{mapping(20000, 20000), mapping(8181, 8181)}, 1, []uint16{8181}},
		{"one with to is named elsewhere", []discover.PortMapping{mapping(8181, 80), mapping(8182, 8182)}, 1, []uint16{8182}},
		{"both protocols count once", []discover.PortMapping{mapping(8181, 8181), mapping(8181, 8181)}, 1, []uint16{8181}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, discover.Attachment{Ports: c.ports}.StaticPorts(c.unnamed, 20000)); diff != "" {
				t.Errorf("ports (-want +got):\n%s", diff)
			}
		})
	}
}
