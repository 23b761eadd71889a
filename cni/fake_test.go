// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"

	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/weirmesh/weir/redirect"
)

// fakeDatapath records what it was asked for and answers as it was told.
type fakeDatapath struct {
	paths     store.Paths
	added     []redirect.Attachment
	removed   []workload.AttachmentID
	checked   []workload.AttachmentID
	collected map[string][]workload.AttachmentID

	addErr, removeErr, checkErr, collectErr, probeErr error
	repaired                                          []program.Repair
	inForce                                           bool
	garbage                                           []workload.AttachmentID
}

func (f *fakeDatapath) Add(a redirect.Attachment) error {
	f.added = append(f.added, a)
	return f.addErr
}

func (f *fakeDatapath) Remove(key workload.AttachmentID) error {
	f.removed = append(f.removed, key)
	return f.removeErr
}

func (f *fakeDatapath) Check(key workload.AttachmentID, _ string) ([]program.Repair, error) {
	f.checked = append(f.checked, key)
	return f.repaired, f.checkErr
}

func (f *fakeDatapath) GC(network string, valid []workload.AttachmentID) ([]workload.AttachmentID, error) {
	f.collected = map[string][]workload.AttachmentID{network: valid}
	return f.garbage, f.collectErr
}

func (f *fakeDatapath) InForce(string) (bool, error) { return f.inForce, nil }

func (f *fakeDatapath) Probe() error { return f.probeErr }

func (f *fakeDatapath) untouched() bool {
	return len(f.added)+len(f.removed)+len(f.checked)+len(f.collected) == 0
}

// fakeNetwork records what it was asked for and answers as it was told.
type fakeNetwork struct {
	config   attachment.Config
	stateDir string
	calls    []string
	previous *current.Result // of CHECK

	owns                                           bool
	addErr, undoErr, removeErr, checkErr, probeErr error
	repaired                                       []string
}

func (f *fakeNetwork) Add(a attachment.Attachment) (*current.Result, func() error, error) {
	f.calls = append(f.calls, "ADD "+a.NetNS)
	built := &current.Result{
		CNIVersion: "1.1.0",
		Interfaces: []*current.Interface{{Name: f.config.Bridge}, {Name: attachment.HostDevice(a.Key)}, {Name: a.Key.IfName, Sandbox: a.NetNS}},
		IPs:        []*current.IPConfig{{Interface: current.Int(2), Address: net.IPNet{IP: net.IPv4(172, 26, 128, 2), Mask: net.CIDRMask(20, 32)}}},
	}
	return built, func() error {
		f.calls = append(f.calls, "undo")
		return f.undoErr
	}, f.addErr
}

func (f *fakeNetwork) Check(_ attachment.Attachment, previous *current.Result) ([]string, error) {
	f.calls, f.previous = append(f.calls, "CHECK"), previous
	return f.repaired, f.checkErr
}

func (f *fakeNetwork) Remove(attachment.Attachment) error {
	f.calls = append(f.calls, "DEL")
	return f.removeErr
}

func (f *fakeNetwork) Owns(workload.AttachmentID) bool { return f.owns }

func (f *fakeNetwork) Collect(valid []workload.AttachmentID, _ string) ([]workload.AttachmentID, error) {
	f.calls = append(f.calls, fmt.Sprintf("GC %v", valid))
	return nil, nil
}

func (f *fakeNetwork) Probe(string) error {
	f.calls = append(f.calls, "STATUS")
	return f.probeErr
}

// bench is a Plugin over a fakeDatapath, with what it printed.
type bench struct {
	Plugin
	fake           *fakeDatapath
	net            *fakeNetwork
	stdout, stderr bytes.Buffer
	consuls        bool
	present        []netip.Addr
}

func newBench() *bench {
	b := &bench{fake: &fakeDatapath{}, net: &fakeNetwork{}, present: []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("172.26.64.2")}}
	b.Plugin = Plugin{
		Open: func(paths store.Paths) Datapath {
			b.fake.paths = paths
			return b.fake
		},
		ConfigDir:          "/proc/self/no-configuration",
		RedirectedByConsul: func(string) (bool, error) { return b.consuls, nil },
		Network: func(config attachment.Config, stateDir string) Network {
			b.net.config, b.net.stateDir = config, stateDir
			return b.net
		},
		AddressesIn: func(string) ([]netip.Addr, error) { return b.present, nil },
		Stdout:      &b.stdout,
		Stderr:      &b.stderr,
	}
	return b
}

const (
	allocID  = "b412a0b1-e285-703a-01ba-3d1b2e2228f7"
	netnsDir = "/var/run/netns/"
	meshJSON = `{"ConsulDNSIP":"10.99.0.1","ConsulDNSPort":8600,"ProxyUserID":"101","ProxyInboundPort":20000,"ProxyOutboundPort":15001}`
	meshArgs = "IgnoreUnknown=true;NOMAD_ALLOC_ID=" + allocID + ";CONSUL_IPTABLES_CONFIG=" + meshJSON
	prevJSON = `{"cniVersion":"1.0.0","interfaces":[{"name":"br0"},{"name":"eth0","sandbox":"/var/run/netns/x"}],"ips":[{"interface":1,"address":"172.26.64.2/20"}]}`
	confJSON = `{"cniVersion":"1.0.0","name":"nomad","type":"consul-cni","log_level":"debug","prevResult":` + prevJSON + `}`
)

func call(args, stdin string) *skel.CmdArgs {
	return &skel.CmdArgs{
		ContainerID: allocID, IfName: "eth0", Netns: netnsDir + allocID,
		Args: args, StdinData: []byte(stdin),
	}
}

func key() workload.AttachmentID { return workload.AttachmentID{ContainerID: allocID, IfName: "eth0"} }

// recorded is one request as Nomad sent it, with the answer of consul-cni.
type recorded struct {
	Command string            `json:"command"`
	Env     map[string]string `json:"env"`
	Stdin   json.RawMessage   `json:"stdin"`
	Exit    int               `json:"consul_cni_exit"`
	Stdout  json.RawMessage   `json:"consul_cni_stdout"`
}

func (r recorded) call() *skel.CmdArgs {
	return &skel.CmdArgs{
		ContainerID: r.Env["CNI_CONTAINERID"], IfName: r.Env["CNI_IFNAME"], Netns: r.Env["CNI_NETNS"],
		Args: r.Env["CNI_ARGS"], Path: r.Env["CNI_PATH"], StdinData: r.Stdin,
	}
}

// recordings are requests recorded from Nomad 1.11.1, by scenario.
func recordings(t *testing.T) map[string][]recorded {
	t.Helper()
	data, err := os.ReadFile("testdata/nomad-1.11.1-cni.json")
	if err != nil {
		t.Fatal(err)
	}
	var all map[string][]recorded
	if err := json.Unmarshal(data, &all); err != nil {
		t.Fatal(err)
	}
	return all
}

// wantError checks that err is an error of CNI with the code, and that its
// text holds every one of the parts.
func wantError(t *testing.T, err error, code uint, parts ...string) {
	t.Helper()
	cniErr, ok := err.(*types.Error)
	if !ok {
		t.Fatalf("error %v (%T): want a *types.Error", err, err)
	}
	if cniErr.Code != code {
		t.Errorf("code %d: want %d (%s)", cniErr.Code, code, cniErr.Msg)
	}
	for _, part := range parts {
		if !bytes.Contains([]byte(cniErr.Msg), []byte(part)) {
			t.Errorf("error %q: does not name %q", cniErr.Msg, part)
		}
	}
}
