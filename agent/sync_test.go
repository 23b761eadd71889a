// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/agent/wait"
	"github.com/weirmesh/weir/test"
)

const oneProxy = `{"_nomad-task-b412a0b1-e285-703a-01ba-3d1b2e2228f7-group-g-web-1-sidecar-proxy": {"Kind": "connect-proxy", "Port": 20001,
	"Proxy": {"Upstreams": [{"DestinationName": "api", "LocalBindPort": 9191}]}}}`

func inSync(v catalog.Snapshot) bool { return v.InSync && len(v.Proxies[exampleAlloc]) == 1 }

func TestWatcherTellsAWeakTokenFromAnEmptyNode(t *testing.T) {
	for _, c := range []struct {
		name, token, header, value string
		want                       bool
	}{
		{"an empty node", "t", "", "", false},
		{"a weak token", "t", "X-Consul-Results-Filtered-By-ACLs", "true", true},
		{"no token where the policy is to deny", "", "X-Consul-Default-ACL-Policy", "deny", true},
		{"no token where the policy is to allow", "", "X-Consul-Default-ACL-Policy", "allow", false},
	} {
		t.Run(c.name, func(t *testing.T) {
			fake := newFakeConsul(t)
			fake.answers(func(w http.ResponseWriter, _ *http.Request) {
				if c.header != "" {
					w.Header().Set(c.header, c.value)
				}
				fmt.Fprint(w, "{}")
			})
			watcher := fake.follow(t, func(config *configfile.ConsulConfig) { config.Token = c.token })
			got := eventuallyKnown(t, watcher, "an answer", func(v catalog.Snapshot) bool { return v.InSync })
			if got.Hidden != c.want {
				t.Errorf("hidden = %v, want %v", got.Hidden, c.want)
			}
		})
	}
}

func TestWatcherReadsTheTokenFileAnew(t *testing.T) {
	fake := newFakeConsul(t)
	path := test.WriteFile(t, filepath.Join(t.TempDir(), "token"), "first\n")
	watcher := fake.follow(t, func(config *configfile.ConsulConfig) { config.TokenFile, config.Watch = path, false })
	eventuallyKnown(t, watcher, "an answer", func(v catalog.Snapshot) bool { return v.InSync })
	test.WriteFile(t, path, "second")
	watcher.Wake()
	eventuallyKnown(t, watcher, "another answer", func(v catalog.Snapshot) bool { return v.Counts.Reads > 1 })
	fake.mu.Lock()
	defer fake.mu.Unlock()
	if fake.tokens[0] != "first" || !slices.Contains(fake.tokens, "second") {
		t.Errorf("tokens = %q, want the first and then the second", fake.tokens)
	}
}

func TestWatcherSpeaksOverAUnixSocket(t *testing.T) {
	fake := newFakeConsul(t)
	fake.answers(say(200, oneProxy))
	path := filepath.Join(t.TempDir(), "consul.sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: fake.Config.Handler}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Close()
		if err := <-ended; !errors.Is(err, http.ErrServerClosed) {
			t.Errorf("serve: %v", err)
		}
	})
	config := *configfile.DefaultConfig().Consul
	config.Address = "unix://" + path
	eventuallyKnown(t, runWatcher(t, config), "an answer over the socket", inSync)
}

func TestWatcherAsksForVirtualIPsOnce(t *testing.T) {
	fake := newFakeConsul(t)
	fake.chain = say(200, `{"Chain":{"AutoVirtualIPs":["240.0.0.1","nonsense"],"ManualVirtualIPs":["10.1.1.1"]}}`)
	fake.answers(say(200, oneProxy))
	watcher := fake.follow(t)
	got := eventuallyKnown(t, watcher, "virtual IPs", func(v catalog.Snapshot) bool { return len(v.Facts.VirtualIPs) > 0 })
	want := map[registration.Service][]netip.Addr{{Name: "api"}: addrs("10.1.1.1", "240.0.0.1")}
	if diff := cmp.Diff(want, got.Facts.VirtualIPs, sameAddrs()); diff != "" {
		t.Errorf("virtual IPs (-want +got):\n%s", diff)
	}
	// A change elsewhere on the node asks nothing again.
	fake.answers(say(200, strings.Replace(oneProxy, "20001", "20002", 1)))
	watcher.Wake()
	eventuallyKnown(t, watcher, "the change", func(v catalog.Snapshot) bool { return v.InSync && v.Proxies[exampleAlloc][0].Inbound == 20002 })
	if times := fake.times("/v1/discovery-chain/api"); times != 1 {
		t.Errorf("asked %d times, want once", times)
	}
	if current := watcher.Current(); current.Counts.Changes != 2 {
		t.Errorf("%d changes, want 2", current.Counts.Changes)
	}
}

// An upstream's first instance comes later, on another node: nothing here tells.
func TestWatcherFindsAVirtualIPThatComesLater(t *testing.T) {
	t.Parallel()
	fake := newFakeConsul(t)
	fake.answers(say(200, oneProxy))
	watcher := fake.follow(t, unwatched)
	before := eventuallyKnown(t, watcher, "the proxy", inSync)
	fake.mu.Lock()
	fake.chain = say(200, `{"Chain":{"AutoVirtualIPs":["240.0.0.1"]}}`)
	fake.mu.Unlock()
	after := eventuallyKnown(t, watcher, "the virtual IP", func(v catalog.Snapshot) bool { return len(v.Facts.VirtualIPs[registration.Service{Name: "api"}]) == 1 })
	if after.Counts.Reads != before.Counts.Reads {
		t.Errorf("%d bulk reads for it, want none", after.Counts.Reads-before.Counts.Reads)
	}
}

func TestWatcherSaysWhyThereIsNoVirtualIP(t *testing.T) {
	fake := newFakeConsul(t)
	fake.chain = say(403, "Permission denied")
	fake.answers(say(200, oneProxy))
	got := eventuallyKnown(t, fake.follow(t), "the refusal", func(v catalog.Snapshot) bool { return len(v.Facts.Unanswered) > 0 })
	if why := got.Facts.Unanswered[registration.Service{Name: "api"}].What; !strings.Contains(why, "403") || !strings.Contains(why, "api") {
		t.Errorf("why = %q, want the service and 403", why)
	}
	if addrs, answered := got.Facts.VirtualIPs[registration.Service{Name: "api"}]; answered {
		t.Errorf("a refusal passes for the answer %v: what is on record would go", addrs)
	}
}

// Questions that had no turn in the first round have theirs at once, not at the
// next bulk read.
func TestWatcherAsksForManyVirtualIPsAtOnce(t *testing.T) {
	const count = 2*catalog.LookupsAtOnce + 10
	fake := newFakeConsul(t)
	fake.chain = say(200, `{"Chain":{"AutoVirtualIPs":["240.0.0.1"]}}`)
	var upstreams []string
	for i := range count {
		upstreams = append(upstreams, fmt.Sprintf(`{"DestinationName": "api-%d", "LocalBindPort": %d}`, i, 1000+i))
	}
	fake.answers(say(200, fmt.Sprintf(`{"_nomad-task-%s-group-g-web-1-sidecar-proxy": {"Kind": "connect-proxy", "Port": 20001,
		"Proxy": {"Upstreams": [%s]}}}`, exampleAlloc, strings.Join(upstreams, ","))))
	got := eventuallyKnown(t, fake.follow(t, unwatched), "all virtual IPs", func(v catalog.Snapshot) bool { return len(v.Facts.VirtualIPs) == count })
	if got.Counts.Reads != 1 {
		t.Errorf("%d bulk reads for it, want one", got.Counts.Reads)
	}
}

func TestWatcherTellsThatThereIsNoVirtualIP(t *testing.T) {
	fake := newFakeConsul(t)
	fake.chain = say(200, `{"Chain":{}}`)
	fake.answers(say(200, oneProxy))
	eventuallyKnown(t, fake.follow(t), "an answer without a virtual IP", func(v catalog.Snapshot) bool {
		addrs, answered := v.Facts.VirtualIPs[registration.Service{Name: "api"}]
		return answered && len(addrs) == 0
	})
}

func TestTempo(t *testing.T) {
	for _, c := range []struct {
		name     string
		tempo    wait.PollInterval
		min, max time.Duration
	}{
		{"calm, with a trigger", wait.PollInterval{Watch: true}, 30 * time.Second, 90 * time.Second},
		{"calm, without", wait.PollInterval{}, 7500 * time.Millisecond, 22500 * time.Millisecond},
		{"a new allocation", wait.PollInterval{Watch: true, Waiting: time.Second}, 50 * time.Millisecond, 50 * time.Millisecond},
		{"one beside many others", wait.PollInterval{Watch: true, Waiting: time.Second, Took: 10 * time.Millisecond}, 90 * time.Millisecond, 90 * time.Millisecond},
		{"one while all change", wait.PollInterval{Watch: true, Waiting: time.Second, Took: time.Second}, 150 * time.Millisecond, 150 * time.Millisecond},
		{"one that takes longer", wait.PollInterval{Watch: true, Waiting: 20 * time.Second}, time.Second, 3 * time.Second},
		{"one that is not in the mesh", wait.PollInterval{Watch: true, Waiting: time.Hour}, 30 * time.Second, 90 * time.Second},
		{"the first failure", wait.PollInterval{Failures: 1, Waiting: time.Second}, 500 * time.Millisecond, 1500 * time.Millisecond},
		{"the fourth", wait.PollInterval{Failures: 4}, 4 * time.Second, 12 * time.Second},
		{"very many", wait.PollInterval{Failures: 1000}, 30 * time.Second, 90 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got := c.tempo.Pause(0); got != c.min {
				t.Errorf("shortest pause = %s, want %s", got, c.min)
			}
			if got := c.tempo.Pause(1); got != c.max {
				t.Errorf("longest pause = %s, want %s", got, c.max)
			}
		})
	}
}
