// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"slices"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/registration"
)

// A server that is back has answered for a moment without any virtual IP, probably as a
// leader that has not read its log. What make soak found: connections to an upstream's went to the
// outbound listener until the next answer.
func TestVirtualIPsOutliveTheRestartOfConsul(t *testing.T) {
	fake := newFakeConsul(t)
	proxies, _, err := registration.ParseServices([]byte(oneProxy), registration.Loopback4())
	if err != nil {
		t.Fatal(err)
	}
	l, now := fake.lookups(t), time.Unix(1000, 0)
	l.Now = func() time.Time { return now }
	ask := func(when string, want ...string) {
		t.Helper()
		known, _ := l.Refresh(t.Context(), catalog.ByAllocation(proxies))
		if got := known.VirtualIPs[registration.Service{Name: "api"}]; !slices.Equal(got, addrs(want...)) {
			t.Errorf("%s: virtual IPs are %v, want %v", when, got, want)
		}
	}
	fake.chains(chainOf(`"240.0.0.1"`))
	ask("at first", "240.0.0.1")
	fake.chains(chainOf())
	l.Failed() // the bulk read
	now = now.Add(catalog.LookupInterval)
	ask("back, without its state", "240.0.0.1")
	fake.chains(chainOf(`"240.0.0.2"`))
	now = now.Add(catalog.ReplayTime)
	ask("with its state, in which the address is another", "240.0.0.2")
	now = now.Add(catalog.LookupInterval)
	fake.chains(say(500, "no cluster leader"))
	ask("without a leader", "240.0.0.2")
	fake.chains(chainOf())
	now = now.Add(catalog.LookupInterval)
	ask("with a leader, without its state", "240.0.0.2")
	now = now.Add(catalog.ReplayTime)
	ask("with its state, in which there is none", []string{}...)
	fake.chains(chainOf(`"240.0.0.3"`))
	now = now.Add(catalog.LookupInterval)
	ask("again", "240.0.0.3")
	fake.chains(chainOf())
	now = now.Add(catalog.LookupInterval)
	ask("gone while Consul answers", []string{}...)
}
