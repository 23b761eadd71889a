// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

var _ Datapath = (*redirect.Datapath)(nil)

func TestAddThreeTimesAndWithANewNamespace(t *testing.T) {
	b := newBench()
	for range 3 {
		if err := b.Add(call(meshArgs, confJSON)); err != nil {
			t.Fatal(err)
		}
	}
	moved := call(meshArgs, confJSON)
	moved.Netns = netnsDir + "another"
	if err := b.Add(moved); err != nil {
		t.Fatal(err)
	}
	if len(b.fake.added) != 4 || b.fake.added[3].NetNS != moved.Netns || b.fake.added[3].Key != key() {
		t.Errorf("added %+v: want 4, the last in %s", b.fake.added, moved.Netns)
	}
	if got, want := b.stdout.String(), strings.Repeat(prevJSON+"\n", 4); got != want {
		t.Errorf("stdout:\n%s\nwant the previous result each time:\n%s", got, want)
	}
	if b.stderr.Len() != 0 {
		t.Errorf("stderr %q: want nothing", b.stderr.String())
	}
}

func TestAddTakesTheNamespaceFromCNIAlone(t *testing.T) {
	b := newBench()
	args := strings.Replace(meshArgs, `"ProxyUserID"`, `"NetNS":"/proc/1/ns/net","ProxyUserID"`, 1)
	if err := b.Add(call(args, confJSON)); err != nil {
		t.Fatal(err)
	}
	if got := b.fake.added[0].NetNS; got != netnsDir+allocID {
		t.Errorf("namespace %s: want CNI_NETNS", got)
	}
}

func TestWithoutMeshArgumentNothingIsTouched(t *testing.T) {
	for _, args := range []string{"", "IgnoreUnknown=true;NOMAD_ALLOC_ID=" + allocID, "a=b=c;;;=;x"} {
		b := newBench()
		if err := b.Add(call(args, confJSON)); err != nil {
			t.Errorf("ADD with %q: %v", args, err)
		}
		if got := b.stdout.String(); got != prevJSON+"\n" {
			t.Errorf("ADD with %q: stdout %s", args, got)
		}
		if err := b.Check(call(args, confJSON)); err != nil {
			t.Errorf("CHECK with %q: %v", args, err)
		}
		if !b.fake.untouched() {
			t.Errorf("with %q: data path touched: %+v", args, b.fake)
		}
	}
}

func TestPassThroughRefusesThePluginsOwnNamespace(t *testing.T) {
	b := newBench()
	cmd := call("", confJSON)
	cmd.Netns = "/proc/self/ns/net"
	wantError(t, b.Add(cmd), types.ErrInvalidNetNS, cmd.Netns)
	if b.stdout.Len() != 0 {
		t.Errorf("stdout %q: want nothing beside the error", b.stdout.String())
	}
	for _, override := range []string{"1", "TRUE"} {
		cmd.NetnsOverride = override
		if err := b.Add(cmd); err != nil {
			t.Errorf("with CNI_NETNS_OVERRIDE=%s: %v", override, err)
		}
	}
}

func TestAddNeedsAPreviousResultWithAddresses(t *testing.T) {
	for name, tt := range map[string]struct {
		prev string
		part string
	}{
		"no addresses":          {`{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"/x"}]}`, "ips: none in the namespace"},
		"on the host only":      {`{"cniVersion":"1.0.0","interfaces":[{"name":"br0"}],"ips":[{"interface":0,"address":"172.26.64.1/20"}]}`, "ips: none in the namespace"},
		"loopback only":         {`{"cniVersion":"1.0.0","ips":[{"address":"127.0.0.1/8"},{"address":"::1/128"}]}`, "ips: none in the namespace"},
		"no such interface":     {`{"cniVersion":"1.0.0","interfaces":[],"ips":[{"interface":7,"address":"172.26.64.1/20"}]}`, "ips[0]: interface 7"},
		"unspecified address":   {`{"cniVersion":"1.0.0","ips":[{"address":"0.0.0.0/32"}]}`, "ips[0]: address"},
		"address is no address": {`{"cniVersion":"1.0.0","ips":[{"address":"null/32"}]}`, "prevResult: "},
		"not an object":         {`"x"`, "prevResult: "},
		"unknown version":       {`{"cniVersion":"7.0.0"}`, "7.0.0"},
		"version is a number":   {`{"cniVersion":1}`, "prevResult: cniVersion"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench()
			err := b.Add(call(meshArgs, `{"cniVersion":"1.0.0","name":"nomad","prevResult":`+tt.prev+`}`))
			var cniErr *types.Error
			if !errors.As(err, &cniErr) || !strings.Contains(cniErr.Msg, tt.part) {
				t.Fatalf("error %v: want one of CNI that says %q", err, tt.part)
			}
			if cniErr.Code != types.ErrInvalidNetworkConfig && cniErr.Code != types.ErrDecodingFailure {
				t.Errorf("code %d", cniErr.Code)
			}
			if !b.fake.untouched() || b.stdout.Len() != 0 {
				t.Errorf("something left behind: %+v, stdout %q", b.fake, b.stdout.String())
			}
		})
	}
}

func TestErrorsOfTheDatapath(t *testing.T) {
	for _, tt := range []struct {
		err  error
		code uint
	}{
		{host.ErrConsulRules, CodeConsulRules},
		{probe.ErrUnsupported, CodeUnsupported},
		{bpfmap.ErrIncompatible, CodeIncompatible},
		{host.ErrHostNetNS, types.ErrInvalidNetNS},
		{host.ErrNetNSGone, types.ErrInvalidNetNS},
		{workload.ErrFull, CodeDatapath},
		{syscall.EAGAIN, types.ErrTryAgainLater},
		{errors.New("anything else"), CodeDatapath},
	} {
		b := newBench()
		b.fake.addErr = fmt.Errorf("some step: %w", tt.err)
		b.fake.checkErr = b.fake.addErr
		for name, err := range map[string]error{
			"ADD":   b.Add(call(meshArgs, confJSON)),
			"CHECK": b.Check(call(meshArgs, confJSON)),
		} {
			t.Run(name+" "+tt.err.Error(), func(t *testing.T) {
				wantError(t, err, tt.code, allocID, "some step", tt.err.Error())
				if err.(*types.Error).Details == "" {
					t.Error("no remedy")
				}
			})
		}
		if b.stdout.Len() != 0 {
			t.Errorf("stdout %q: want nothing", b.stdout.String())
		}
	}
}

// Nomad shows an error as one line of an event.
func TestErrorsAreOneLine(t *testing.T) {
	b := newBench()
	b.fake.addErr = errors.Join(errors.New("write record: read-only file system"), errors.New("remove record: the same"))
	wantError(t, b.Add(call(meshArgs, confJSON)), CodeDatapath, "write record: read-only file system; remove record: the same")
}

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, syscall.EPIPE }

func TestAddThatCannotAnswerIsTakenBack(t *testing.T) {
	b := newBench()
	b.Stdout = brokenPipe{}
	wantError(t, b.Add(call(meshArgs, confJSON)), CodeDatapath, allocID, "print result")
	if diff := cmp.Diff([]workload.AttachmentID{key()}, b.fake.removed); diff != "" {
		t.Errorf("removed (-want +got):\n%s", diff)
	}
}

func TestDelNeedsNothingButTheID(t *testing.T) {
	for name, stdin := range map[string]string{
		"as Nomad sends it":            confJSON,
		"no prevResult":                `{"cniVersion":"0.4.0","name":"nomad"}`,
		"prevResult is nonsense":       `{"cniVersion":"0.4.0","name":"nomad","prevResult":"x"}`,
		"keys that ADD would not take": `{"cniVersion":"0.4.0","name":"nomad","bridge":"br0","ipam":{"type":"host-local"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench()
			cmd := call("", stdin)
			cmd.Netns = ""
			for range 2 {
				if err := b.Del(cmd); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff([]workload.AttachmentID{key(), key()}, b.fake.removed); diff != "" {
				t.Errorf("removed (-want +got):\n%s", diff)
			}
			if b.stdout.Len() != 0 {
				t.Errorf("stdout %q: want nothing", b.stdout.String())
			}
		})
	}
}

func TestCheckTellsWhatItRepaired(t *testing.T) {
	b := newBench()
	b.fake.repaired = []program.Repair{{Kind: program.Attached, Object: "connect4"}, {Kind: program.RoutesSet}}
	if err := b.Check(call(meshArgs, confJSON)); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("weir: allocation %s: repaired: attached connect4\nweir: allocation %s: repaired: routes to the proxy set\n", allocID, allocID)
	if got := b.stderr.String(); got != want {
		t.Errorf("stderr %q: want %q", got, want)
	}
	if b.stdout.Len() != 0 || len(b.fake.added) != 0 {
		t.Errorf("stdout %q, added %v: want neither", b.stdout.String(), b.fake.added)
	}
}

func TestCheckRestoresALostRecord(t *testing.T) {
	for _, lost := range []error{store.ErrUnknown, bpfmap.ErrNotLoaded} {
		b, reference := newBench(), newBench()
		b.fake.checkErr = fmt.Errorf("read record: %w", lost)
		if err := b.Check(call(meshArgs, confJSON)); err != nil {
			t.Fatal(err)
		}
		if err := reference.Add(call(meshArgs, confJSON)); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(reference.fake.added, b.fake.added, cmp.Comparer(equalAddrs)); diff != "" {
			t.Errorf("restored otherwise than ADD (-ADD +CHECK):\n%s", diff)
		}
		if !strings.Contains(b.stderr.String(), "repaired") || b.stdout.Len() != 0 {
			t.Errorf("stderr %q, stdout %q", b.stderr.String(), b.stdout.String())
		}
	}
}

func TestCheckFailsOnWhatItCannotRestore(t *testing.T) {
	for name, tt := range map[string]struct {
		args, stdin string
		present     []netip.Addr
		addErr      error
		code        uint
		part        string
	}{
		"empty namespace": {meshArgs, confJSON, []netip.Addr{netip.MustParseAddr("127.0.0.1")}, nil, types.ErrInvalidNetNS, "172.26.64.2"},
		"no prevResult":   {meshArgs, `{"cniVersion":"1.0.0","name":"nomad"}`, nil, nil, types.ErrUnknownContainer, "prevResult"},
		"bad argument":    {"NOMAD_ALLOC_ID=" + allocID + ";CONSUL_IPTABLES_CONFIG={}", confJSON, nil, nil, types.ErrInvalidEnvironmentVariables, "ProxyUserID"},
		"ADD fails":       {meshArgs, confJSON, []netip.Addr{netip.MustParseAddr("172.26.64.2")}, errors.New("no memory"), CodeDatapath, "no memory"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench()
			b.fake.checkErr, b.fake.addErr, b.present = store.ErrUnknown, tt.addErr, tt.present
			wantError(t, b.Check(call(tt.args, tt.stdin)), tt.code, allocID, tt.part)
			if tt.addErr == nil && len(b.fake.added) != 0 {
				t.Errorf("added %v: want nothing", b.fake.added)
			}
		})
	}
}

// What could not be looked at is told, and is no error where the kernel redirects
// the namespace: an error would end an allocation that runs.
func TestCheckThatCannotLook(t *testing.T) {
	for name, tt := range map[string]struct {
		checkErr, addErr error
		stdin            string
	}{
		"state directory is read-only":  {unix.EROFS, nil, confJSON},
		"lock is not given up":          {unix.EAGAIN, nil, confJSON},
		"another layout is loaded":      {bpfmap.ErrIncompatible, nil, confJSON},
		"record cannot be restored":     {store.ErrUnreadable, unix.EROFS, confJSON},
		"nothing to restore it from":    {store.ErrUnknown, nil, `{"cniVersion":"1.0.0","name":"nomad"}`},
		"pins are on a read-only bpffs": {fmt.Errorf("open map: %w", unix.EROFS), nil, confJSON},
	} {
		t.Run(name, func(t *testing.T) {
			for _, inForce := range []bool{true, false} {
				b := newBench()
				b.fake.checkErr, b.fake.addErr, b.fake.inForce = tt.checkErr, tt.addErr, inForce
				err := b.Check(call(meshArgs, tt.stdin))
				if !inForce && err == nil {
					t.Error("CHECK passes for a namespace that is not redirected")
				}
				if inForce && (err != nil || !strings.Contains(b.stderr.String(), "could not be checked")) {
					t.Errorf("CHECK of a namespace that is redirected: %v, stderr %q; want a remark", err, b.stderr.String())
				}
			}
		})
	}
	b := newBench()
	b.fake.checkErr, b.fake.inForce = host.ErrNetNSGone, true
	wantError(t, b.Check(call(meshArgs, confJSON)), types.ErrInvalidNetNS, allocID)
}

// A record that cannot be read is restored as one that is not there.
func TestCheckRestoresAnUnreadableRecord(t *testing.T) {
	b := newBench()
	b.fake.checkErr = fmt.Errorf("read record: %w", store.ErrUnreadable)
	if err := b.Check(call(meshArgs, confJSON)); err != nil || len(b.fake.added) != 1 {
		t.Errorf("CHECK: %v, added %v; want the record made anew", err, b.fake.added)
	}
}

// A namespace from before Weir passes, whatever its arguments look like: an
// error would end an allocation that runs.
func TestCheckLeavesConsulsRulesAlone(t *testing.T) {
	for _, args := range []string{meshArgs, "CONSUL_IPTABLES_CONFIG={}", "CONSUL_IPTABLES_CONFIG=x"} {
		b := newBench()
		b.consuls, b.fake.checkErr = true, store.ErrUnknown
		if err := b.Check(call(args, confJSON)); err != nil {
			t.Errorf("CHECK with %q: %v", args, err)
		}
		if len(b.fake.added) != 0 {
			t.Errorf("CHECK with %q: added %v", args, b.fake.added)
		}
	}
}

func TestStatus(t *testing.T) {
	b := newBench()
	cmd := &skel.CmdArgs{StdinData: []byte(`{"cniVersion":"1.1.0","name":"nomad"}`)}
	if err := b.Status(cmd); err != nil {
		t.Fatal(err)
	}
	b.fake.probeErr = probe.ErrUnsupported
	wantError(t, b.Status(cmd), types.ErrPluginNotAvailable, probe.ErrUnsupported.Error())
}

func TestGC(t *testing.T) {
	one := []workload.AttachmentID{{ContainerID: "a", IfName: "eth0"}}
	for name, tt := range map[string]struct {
		list string
		want []workload.AttachmentID
		part string // of the error
	}{
		"valid":           {`,"cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]`, one, ""},
		"older name":      {`,"cni.dev/attachments":[{"containerID":"a","ifname":"eth0"}]`, one, ""},
		"empty":           {`,"cni.dev/valid-attachments":[]`, []workload.AttachmentID{}, ""},
		"null":            {`,"cni.dev/valid-attachments":null`, []workload.AttachmentID{}, ""},
		"missing":         {``, nil, "cni.dev/valid-attachments: missing"},
		"not a list":      {`,"cni.dev/valid-attachments":{}`, nil, "cni.dev/valid-attachments"},
		"no container ID": {`,"cni.dev/valid-attachments":[{"ifname":"eth0"}]`, nil, "cni.dev/valid-attachments[0]"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench()
			b.fake.garbage = []workload.AttachmentID{{ContainerID: "gone", IfName: "eth0"}}
			err := b.GC(&skel.CmdArgs{StdinData: []byte(`{"cniVersion":"1.1.0","name":"meshy"` + tt.list + `}`)})
			if tt.part != "" {
				if err == nil || !strings.Contains(err.Error(), tt.part) || !b.fake.untouched() {
					t.Errorf("error %v, data path %+v: want %q and nothing touched", err, b.fake, tt.part)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(map[string][]workload.AttachmentID{"meshy": tt.want}, b.fake.collected); diff != "" {
				t.Errorf("collected (-want +got):\n%s", diff)
			}
			if !strings.Contains(b.stderr.String(), "gone") || b.stdout.Len() != 0 {
				t.Errorf("stderr %q, stdout %q", b.stderr.String(), b.stdout.String())
			}
		})
	}
}

func TestGCReportsWhatItCouldNotCollect(t *testing.T) {
	b := newBench()
	b.fake.collectErr = errors.New("read-only file system")
	err := b.GC(&skel.CmdArgs{StdinData: []byte(`{"cniVersion":"1.1.0","name":"meshy","cni.dev/valid-attachments":[]}`)})
	wantError(t, err, CodeDatapath, "meshy", "read-only file system")
}

func equalAddrs(a, b netip.Addr) bool { return a == b }
