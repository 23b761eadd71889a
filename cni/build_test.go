// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/cni/network"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/redirect/host"
	"golang.org/x/sys/unix"
)

var _ Network = (*network.Network)(nil)

func wantCalls(t *testing.T, b *bench, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, b.net.calls); diff != "" {
		t.Errorf("calls (-want +got):\n%s", diff)
	}
}

// ownResultJSON is what the fake network's result looks like to a runtime.
const ownResultJSON = `{"cniVersion":"1.0.0","interfaces":[{"name":"weir0"},{"name":"HOST"},{"name":"eth0","sandbox":"NETNS"}],"ips":[{"interface":2,"address":"172.26.128.2/20"}]}`

func own() string {
	return strings.NewReplacer("HOST", attachment.HostDevice(key()), "NETNS", netnsDir+allocID).Replace(ownResultJSON)
}

func TestAddBuildsTheNetworkAndRedirectsIt(t *testing.T) {
	b := newBench()
	if err := b.Add(call(meshArgs, with(``))); err != nil {
		t.Fatal(err)
	}
	wantCalls(t, b, "ADD "+netnsDir+allocID)
	if len(b.fake.added) != 1 || !slices.Equal(b.fake.added[0].Request.Addresses, []netip.Addr{netip.MustParseAddr("172.26.128.2")}) {
		t.Errorf("redirected %+v: want the address of the network", b.fake.added)
	}
	if diff := cmp.Diff(decoded(t, []byte(own())), decoded(t, b.stdout.Bytes())); diff != "" {
		t.Errorf("stdout (-want +got):\n%s", diff)
	}
}

func TestAddInEveryVersion(t *testing.T) {
	for _, version := range Versions().SupportedVersions() {
		b := newBench()
		if err := b.Add(call("", strings.Replace(with(``), "1.0.0", version, 1))); err != nil {
			t.Fatal(err)
		}
		printed := decoded(t, b.stdout.Bytes()).(map[string]any)
		ips, _ := printed["ips"].([]any)
		if printed["cniVersion"] != version || len(ips) != 1 {
			t.Errorf("%s: printed %v", version, printed)
		}
	}
}

// Nomad calls ADD for every allocation of a cni/* network, also without a mesh.
func TestAllocationWithoutAMeshGetsItsNetwork(t *testing.T) {
	b := newBench()
	if err := b.Add(call("NOMAD_ALLOC_ID="+allocID, with(``))); err != nil {
		t.Fatal(err)
	}
	wantCalls(t, b, "ADD "+netnsDir+allocID)
	if !b.fake.untouched() || b.stdout.Len() == 0 {
		t.Errorf("data path %+v, stdout %q: want only a result", b.fake, b.stdout.String())
	}
}

func TestAddThatFailsTakesItsNetworkBack(t *testing.T) {
	badMesh := "NOMAD_ALLOC_ID=" + allocID + ";CONSUL_IPTABLES_CONFIG={}"
	for name, tt := range map[string]struct {
		args  string
		harm  func(*bench)
		calls []string
		code  uint
	}{
		"the network":         {meshArgs, func(b *bench) { b.net.addErr = errors.New("no room") }, []string{"ADD"}, CodeNetwork},
		"a plugin is missing": {meshArgs, func(b *bench) { b.net.addErr = attachment.ErrMissing }, []string{"ADD"}, CodeMissing},
		"forwarding":          {meshArgs, func(b *bench) { b.net.addErr = attachment.ErrForward }, []string{"ADD"}, CodeForward},
		"tasks run elsewhere": {meshArgs, func(b *bench) { b.net.addErr = attachment.ErrInUse }, []string{"ADD"}, types.ErrTryAgainLater},
		"a name is taken":     {meshArgs, func(b *bench) { b.net.addErr = attachment.ErrTaken }, []string{"ADD"}, CodeNetwork},
		"the request":         {badMesh, func(*bench) {}, nil, types.ErrInvalidEnvironmentVariables},
		"the redirect":        {meshArgs, func(b *bench) { b.fake.addErr = errors.New("no memory") }, []string{"ADD", "undo"}, CodeDatapath},
		"the answer":          {meshArgs, func(b *bench) { b.Stdout = brokenPipe{} }, []string{"ADD", "undo"}, CodeDatapath},
		"no mesh, the answer": {"", func(b *bench) { b.Stdout = brokenPipe{} }, []string{"ADD", "undo"}, CodeDatapath},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench()
			tt.harm(b)
			wantError(t, b.Add(call(tt.args, with(``))), tt.code, allocID)
			for i, prefix := range tt.calls {
				if i >= len(b.net.calls) || !strings.HasPrefix(b.net.calls[i], prefix) {
					t.Errorf("calls %q: want %q", b.net.calls, tt.calls)
				}
			}
			if len(b.net.calls) != len(tt.calls) || b.stdout.Len() != 0 {
				t.Errorf("calls %q, stdout %q: want %q and nothing", b.net.calls, b.stdout.String(), tt.calls)
			}
		})
	}
}

func TestAddThatCannotUndoSaysSo(t *testing.T) {
	b := newBench()
	b.fake.addErr, b.net.undoErr = errors.New("no memory"), errors.New("device is busy")
	wantError(t, b.Add(call(meshArgs, with(``))), CodeDatapath, "no memory")
	if !strings.Contains(b.stderr.String(), "device is busy") {
		t.Errorf("stderr %q: want to hear what could not be undone", b.stderr.String())
	}
}

func TestBuildRefusesThePluginsOwnNamespace(t *testing.T) {
	b := newBench()
	cmd := call(meshArgs, with(``))
	cmd.Netns = "/proc/self/ns/net"
	wantError(t, b.Add(cmd), types.ErrInvalidNetNS, cmd.Netns)
	wantCalls(t, b)
}

// A runtime hands the last result to DEL and CHECK of both kinds of plugin:
// whose network it is must be told otherwise.
func TestWhoseNetworkItIs(t *testing.T) {
	for name, tt := range map[string]struct {
		stdin string
		owns  bool
		own   bool
	}{
		"behind another plugin":              {confJSON, false, false},
		"behind another, after a failed ADD": {`{"cniVersion":"1.0.0","name":"nomad"}`, false, false},
		"by the record":                      {with(``), true, true},
		"by the last result":                 {with(`,"prevResult":` + own()), false, true},
		"by the keys":                        {with(`,"bridge":"weir0"`), false, true},
		"by the record, keys are broken":     {with(`,"vlan":7`), true, true},
		"keys are broken":                    {with(`,"vlan":7`), false, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench()
			b.net.owns = tt.owns
			b.net.removeErr = errors.New("no host-local")
			if err := b.Check(call("", tt.stdin)); err != nil {
				t.Errorf("CHECK: %v", err)
			}
			if err := b.Del(call("", tt.stdin)); err != nil {
				t.Errorf("DEL: %v: want it to pass", err)
			}
			if tt.own {
				wantCalls(t, b, "CHECK", "DEL")
				if !strings.Contains(b.stderr.String(), "no host-local") {
					t.Errorf("stderr %q: want to hear what could not be removed", b.stderr.String())
				}
			} else {
				wantCalls(t, b)
			}
		})
	}
}

func TestDelRemovesTheNetworkAlsoWhereTheRedirectStays(t *testing.T) {
	b := newBench()
	b.net.owns, b.fake.removeErr = true, errors.New("read-only file system")
	if err := b.Del(call("", with(``))); err != nil {
		t.Errorf("DEL: %v: want it to pass, for the plugins before this one", err)
	}
	wantCalls(t, b, "DEL")
	if !strings.Contains(b.stderr.String(), "read-only") {
		t.Errorf("stderr %q: want to hear what could not be ended", b.stderr.String())
	}
}

func TestCheckOfTheNetwork(t *testing.T) {
	b := newBench()
	b.net.repaired = []string{"lo was down"}
	if err := b.Check(call(meshArgs, with(`,"prevResult":`+own()))); err != nil {
		t.Fatal(err)
	}
	wantCalls(t, b, "CHECK")
	if b.net.previous == nil || len(b.net.previous.Interfaces) != 3 || len(b.fake.checked) != 1 {
		t.Errorf("previous %+v, checked %v: want both", b.net.previous, b.fake.checked)
	}
	if want := fmt.Sprintf("weir: allocation %s: repaired: lo was down\n", allocID); b.stderr.String() != want {
		t.Errorf("stderr %q: want %q", b.stderr.String(), want)
	}
	for err, code := range map[error]uint{host.ErrNetNSGone: types.ErrInvalidNetNS, errors.New("else"): CodeNetwork} {
		b.net.checkErr = err
		wantError(t, b.Check(call(meshArgs, with(`,"prevResult":`+own()))), code, allocID)
	}
	for _, unseen := range []error{unix.EROFS, unix.EAGAIN} {
		b.stderr.Reset()
		b.net.checkErr = fmt.Errorf("write record: %w", unseen)
		if err := b.Check(call(meshArgs, with(`,"prevResult":`+own()))); err != nil || !strings.Contains(b.stderr.String(), "could not be checked") {
			t.Errorf("CHECK that could not look: %v, stderr %q; want a remark", err, b.stderr.String())
		}
	}
}

func TestStatusAndGCOfTheNetwork(t *testing.T) {
	b := newBench()
	cmd := &skel.CmdArgs{StdinData: []byte(with(`,"bridge":"weir0","cni.dev/valid-attachments":[{"containerID":"a","ifname":"eth0"}]`))}
	if err := b.Status(cmd); err != nil {
		t.Fatal(err)
	}
	if err := b.GC(cmd); err != nil {
		t.Fatal(err)
	}
	wantCalls(t, b, "STATUS", "GC [a-eth0]")
	b.net.probeErr = attachment.ErrMissing
	wantError(t, b.Status(cmd), types.ErrPluginNotAvailable, "weir")
}
