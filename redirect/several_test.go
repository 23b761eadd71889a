// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"net/netip"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/test"
)

// Two services with a plain sidecar each: both proxies run under one UID, each
// in a cgroup of its own.
func TestSeveralPlainProxies(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	a.add(func(r *Request) { r.Mode = ModeDirect })
	upstream := func(name, vip, listener string) Upstream {
		return Upstream{Name: name, Addresses: addrs(vip), Listener: netip.MustParseAddrPort(listener)}
	}
	if err := n.SetOverlay(a.key, Overlay{
		Guard: GuardEnforce, InboundPort: inboundPort, ExcludeInboundPorts: []uint16{20001},
		Upstreams: []Upstream{upstream("db", "240.0.0.1", "127.0.0.1:9191"), upstream("cache", "240.0.0.2", "127.0.0.1:9292")},
	}); err != nil {
		t.Fatal(err)
	}
	second := test.NewCgroup(t)
	first := []*test.ServerProcess{a.serve(proxyUID, a.proxyCg, "tcp4", "0.0.0.0:20000"), a.serve(proxyUID, a.proxyCg, "tcp4", "127.0.0.1:9191")}
	other := []*test.ServerProcess{a.serve(proxyUID, second, "tcp4", "0.0.0.0:20001"), a.serve(proxyUID, second, "tcp4", "127.0.0.1:9292")}
	app := a.serve(taskUID, a.taskCg, "tcp4", "0.0.0.0:8080")
	for addr, want := range map[string]string{
		addrPort(a.v4, 20000): first[0].Name,
		addrPort(a.v4, 20001): other[0].Name,
	} {
		if answer, err := test.Ask(n.remote, "tcp4", addr); err != nil || answer.Server != want {
			t.Errorf("%s from outside: %q answers, %v; want %q", addr, answer.Server, err, want)
		}
	}
	if _, err := test.Ask(n.remote, "tcp4", addrPort(a.v4, 8080)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the application from outside: %v, want connection refused", err)
	}
	for addr, want := range map[string]string{
		"240.0.0.1:80": first[1].Name, "240.0.0.2:80": other[1].Name, "127.0.0.1:9292": other[1].Name, addrPort(a.v4, 8080): app.Name,
	} {
		if answer, err := a.ask("tcp4", addr); err != nil || answer.Server != want {
			t.Errorf("%s from a task: %q answers, %v; want %q", addr, answer.Server, err, want)
		}
	}
}
