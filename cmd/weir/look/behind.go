// SPDX-License-Identifier: MPL-2.0

package look

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/explain"
)

// askConsul asks the agent what Consul says. Where none answers, that is what is not known.
func askConsul(c *base.Command, query api.BehindQuery) api.Behind {
	const timeout = 6 * time.Second // a little more than the agent gives Consul
	ctx, cancel := context.WithTimeout(c.Ctx, timeout)
	defer cancel()
	b, err := c.AskBehind(ctx, c.StateDir(), query)
	if err == nil {
		return b
	}
	unknown := api.Unknown{What: "consul", Why: err.Error(), Remedy: "see the agent's log, 'journalctl -u weir-agent' or that of Nomad's job"}
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, api.ErrNotRunning) {
		unknown = api.Unknown{What: "consul", Why: "no agent answers, and it is who asks Consul", Remedy: base.StartAgent}
	}
	return api.Behind{Unknown: []api.Unknown{unknown}}
}

// ofMesh is the service that a name is of in the mesh; empty: it is another host's.
func ofMesh(host string) string {
	name := strings.TrimSuffix(host, ".virtual.consul")
	if strings.Contains(name, ".") {
		return ""
	}
	return name
}

// virtualIP is the address by which the mesh knows a service.
func virtualIP(c *base.Command, query api.BehindQuery) (netip.Addr, bool) {
	if query.Service == "" {
		return netip.Addr{}, false
	}
	b := askConsul(c, query)
	if len(b.VirtualIPs) == 0 {
		return netip.Addr{}, false
	}
	return b.VirtualIPs[0], true
}

// meetsConsul reports whether a connection is the proxy's to make, so that Consul has a say.
func meetsConsul(e explain.Explanation, connection explain.Connection, service string) bool {
	switch e.Verdict { //nolint:exhaustive // the others never reach a service by the proxy
	case bpfmap.Redirected, bpfmap.ToUpstream, bpfmap.RefusedNoProxy:
		return !connection.Inbound()
	case bpfmap.Local:
		return !connection.Inbound() && service != ""
	}
	return false
}

// take puts what Consul says into the answer, and reports whether the connection fails for it.
func (answer *Explained) take(b api.Behind) (fails bool) {
	answer.Instances, answer.Unknown = b.Instances, b.Unknown
	if answer.Unknown == nil {
		answer.Unknown = []api.Unknown{}
	}
	if answer.Service == nil && b.Service != "" {
		answer.Service = &b.Service
	}
	remedy := ""
	if b.Instances != nil && b.Instances.Passing+b.Instances.Warning == 0 {
		fails, remedy = true, fmt.Sprintf("see the checks of service %s in Consul, and whether its job runs", b.Service)
	}
	if b.Intention != "" {
		intention := string(b.Intention)
		answer.Intention = &intention
	}
	if b.Intention == api.IntentionDeny {
		fails, remedy = true, fmt.Sprintf("let an intention allow it: 'consul intention create -allow %s %s'", b.Source, b.Service)
	}
	if answer.Remedy == "" {
		answer.Remedy = remedy
	}
	return fails
}

// renderBehind says what Consul does.
func renderBehind(b api.Behind) string {
	var lines []string
	switch b.Intention {
	case api.IntentionAllow:
		lines = append(lines, fmt.Sprintf("Intention: Consul lets %s dial %s.", b.Source, b.Service))
	case api.IntentionDeny:
		lines = append(lines, fmt.Sprintf("Intention: Consul denies %s the service %s, whose proxies refuse it.", b.Source, b.Service))
	case api.IntentionByRequest:
		lines = append(lines, fmt.Sprintf("Intention: Consul lets %s dial %s for some requests, by method, path or header.", b.Source, b.Service))
	}
	if i := b.Instances; i != nil {
		line := fmt.Sprintf("Instances: %d of %d passing", i.Passing, i.Total)
		if i.Warning > 0 {
			line += fmt.Sprintf(", %d with a warning", i.Warning)
		}
		lines = append(lines, line)
	}
	for _, unknown := range b.Unknown {
		what := map[string]string{"consul": "what Consul says"}[unknown.What]
		if what == "" {
			what = "the " + unknown.What
		}
		lines = append(lines, fmt.Sprintf("Not looked at: %s: %s. Remedy: %s", what, unknown.Why, unknown.Remedy))
	}
	for i, line := range lines {
		lines[i] = base.Hang(line) + "\n"
	}
	return strings.Join(lines, "")
}
