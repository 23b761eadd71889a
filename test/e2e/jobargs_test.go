// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/test"
)

// asking is the request of a job without a transparent_proxy block, with
// arguments of Weir's own, on a node whose operator wrote the given policy.
func asking(t *testing.T, policy, args string) cniRequest {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "weir.hcl"), []byte(policy), 0o600); err != nil {
		t.Fatal(err)
	}
	add := recordedFor(t, "cni-mode-no-tproxy", "")
	return add.with(map[string]string{"WEIR_CONFIG_DIR": dir, "CNI_ARGS": add.Env["CNI_ARGS"] + ";" + args})
}

// A job asks for the redirect by itself, with exclusions that its operator
// allows: they hold in the kernel, and are told by name.
func TestJobArguments(t *testing.T) {
	n := newCNINode(t).loaded(t)
	const args = "weir.mode=transparent;weir.proxy-uid=1101;weir.inbound-port=23435;" +
		"weir.exclude-outbound-ports=backup@9191;weir.exclude-inbound-ports=health@7071"
	refused := asking(t, "", args)
	a := n.allocate(t, refused)
	wantRefusal(t, a.run(t, refused), 4, a.id, "the operator")
	a.wantRoutesBack(t)
	n.wantIdle(t)

	add := asking(t, `cni {
  job_args = ["mode", "proxy-uid", "inbound-port", "exclude-outbound-ports", "exclude-inbound-ports"]
}`, args)
	answer := a.run(t, add)
	wantAnswer(t, answer, a.in(add.Stdin["prevResult"]))
	for _, name := range []string{"backup@9191", "health@7071"} {
		if !strings.Contains(answer.stderr, name) {
			t.Errorf("stderr %q: want it to name %s", answer.stderr, name)
		}
	}
	a.wantRedirected(t, "23435")
	a.wantExclusions(t)

	check := add.with(map[string]string{"CNI_COMMAND": "CHECK"})
	wantSilence(t, a.run(t, check))
	removeFilesIn(t, filepath.Join(n.paths.StateDir, "workloads"))
	wantSilence(t, a.run(t, check))
	a.wantRedirected(t, "23435")
	a.wantExclusions(t)

	wantSilence(t, a.run(t, add.with(map[string]string{"CNI_COMMAND": "DEL", "CNI_ARGS": ""})))
	a.wantRoutesBack(t)
	n.wantIdle(t)
}

// wantExclusions checks that what the arguments of TestJobArguments exclude is
// reached directly, and its neighbour port is not.
func (a *cniAllocation) wantExclusions(t *testing.T) {
	t.Helper()
	backup := test.EchoProcess(t, test.Spec{NetNS: a.outside}, "tcp4", netip.AddrPortFrom(a.gateway, 9191).String())
	health := test.EchoProcess(t, test.Spec{NetNS: a.ns, UID: 1000, GID: 1000}, "tcp4", "0.0.0.0:7071")
	defer backup.Stop()
	defer health.Stop()
	for port, want := range map[uint16]string{9191: backup.Name, 9192: a.proxies["outbound"].Name} {
		target := netip.AddrPortFrom(a.gateway, port)
		if answer, err := a.client.Ask("tcp4", target.String()); err != nil || answer.Server != want {
			t.Errorf("dial %s from inside: %+v, %v: want %s", target, answer, err, want)
		}
	}
	target := netip.AddrPortFrom(a.addr, 7071)
	if answer, err := test.Ask(a.outside, "tcp4", target.String()); err != nil || answer.Server != health.Name {
		t.Errorf("dial %s from outside: %+v, %v: want the application", target, answer, err)
	}
}

// A guard that the job asks for is in force when its ADD returns: nobody has to
// hear of it from Consul first.
func TestJobArgumentGuardsFromADDOn(t *testing.T) {
	n := newCNINode(t).loaded(t)
	add := asking(t, `cni { job_args = ["mode", "guard", "exclude-inbound-ports"] }`,
		"weir.mode=direct;weir.guard=enforce;weir.exclude-inbound-ports=health@7071")
	a := n.allocate(t, add)
	application := netip.AddrPortFrom(a.addr, 8080)
	health := netip.AddrPortFrom(a.addr, 7071)
	for _, target := range []netip.AddrPort{application, health} {
		test.EchoProcess(t, test.Spec{NetNS: a.ns, UID: 1000, GID: 1000}, "tcp4", target.String())
	}
	if _, err := test.Ask(a.outside, "tcp4", application.String()); err != nil {
		t.Fatalf("dial %s before ADD: %v", application, err)
	}
	wantAnswer(t, a.run(t, add), a.in(add.Stdin["prevResult"]))
	if _, err := test.Ask(a.outside, "tcp4", application.String()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("dial %s after ADD: %v: want it refused", application, err)
	}
	if _, err := test.Ask(a.outside, "tcp4", health.String()); err != nil {
		t.Errorf("dial %s after ADD: %v", health, err)
	}
}
