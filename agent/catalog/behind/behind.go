// SPDX-License-Identifier: MPL-2.0

// Package behind asks Consul what is behind a connection of one of the node's
// workloads: the service, its instances, and whether an intention lets it through.
package behind

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"time"

	consulapi "github.com/hashicorp/consul/api"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/catalog/failure"
	"github.com/weirmesh/weir/agent/registration"
)

// The remedies where the token lacks a right, which docs/install.md has too.
const (
	serviceRight   = `give the agent's token service_prefix "" { policy = "read" }`
	instancesRight = `give the agent's token service_prefix "" and node_prefix "", each { policy = "read" }: instances are on nodes of the whole cluster`
)

// notLookedAt tells what Consul did not answer: right is the remedy where it is one that
// the token lacks.
func notLookedAt(what, right string, err error) api.Unknown {
	remedy := right
	var status consulapi.StatusError
	if denied := errors.As(err, &status) && status.Code == http.StatusForbidden; !denied && !errors.Is(err, errHidden) {
		remedy = failure.Problem(err).Remedy
	}
	return api.Unknown{What: what, Why: err.Error(), Remedy: remedy}
}

var errHidden = errors.New("some are hidden from the agent's token")

// Ask asks what is behind a connection of one of the workloads.
func Ask(ctx context.Context, c *catalog.Client, known catalog.Snapshot, workloads []api.WorkloadView, query api.BehindQuery) api.Behind {
	const timeout = 5 * time.Second
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	b := api.Behind{Schema: 1, VirtualIPs: []netip.Addr{}, Unknown: []api.Unknown{}}
	from, to := ends(known, workloads, query)
	b.Service, b.Source = to.Of.Label(), from.Label()
	if to.Of.Name == "" {
		return b
	}
	if to.Remote {
		b.Unknown = append(b.Unknown, api.Unknown{What: "consul", Why: "it is a service of another datacenter, or a prepared query", Remedy: "ask there"})
		return b
	}
	if !query.To.IsValid() {
		addresses, err := c.VirtualIPs(ctx, to.Of)
		if err != nil {
			b.Unknown = append(b.Unknown, notLookedAt("virtual_ips", serviceRight, err))
		}
		b.VirtualIPs = append(b.VirtualIPs, addresses...)
		return b
	}
	var err error
	if b.Instances, err = countInstances(ctx, c, to.Of); err != nil {
		b.Unknown = append(b.Unknown, notLookedAt("instances", instancesRight, err))
	}
	switch {
	case to.Of.Peer != "":
		b.Unknown = append(b.Unknown, api.Unknown{What: "intention", Why: "the intentions are those of peer " + to.Of.Peer, Remedy: "ask there"})
	case from.Name != "":
		if b.Intention, err = intention(ctx, c, from, to.Of); err != nil {
			b.Unknown = append(b.Unknown, notLookedAt("intention", serviceRight, err))
		}
	}
	return b
}

// shownProxies are those that the node shows to be a workload's.
func shownProxies(known catalog.Snapshot, shown []api.ProxyView) (proxies []registration.Proxy) {
	for _, list := range known.Proxies {
		proxies = append(proxies, list...)
	}
	return slices.DeleteFunc(proxies, func(p registration.Proxy) bool {
		return !slices.ContainsFunc(shown, func(v api.ProxyView) bool { return v.ID == p.ID })
	})
}

// leadsTo reports whether the connection is one to the upstream.
func leadsTo(u registration.Upstream, known catalog.Data, query api.BehindQuery) bool {
	return u.Listener == query.To || query.SentTo.IsValid() && u.Listener == query.SentTo ||
		slices.Contains(known.VirtualIPs[u.Of], query.To.Addr()) || query.Service != "" && u.Of.Label() == query.Service
}

// ends finds whose proxy makes the connection, and to which service.
func ends(known catalog.Snapshot, workloads []api.WorkloadView, query api.BehindQuery) (from registration.Service, to registration.Upstream) {
	i := slices.IndexFunc(workloads, func(w api.WorkloadView) bool { return w.Key == query.Key })
	if i < 0 {
		return from, to
	}
	proxies := shownProxies(known, workloads[i].Proxies)
	for _, p := range proxies {
		meant := func(u registration.Upstream) bool { return leadsTo(u, known.Facts, query) }
		if i := slices.IndexFunc(p.Upstreams, meant); i >= 0 {
			return p.OwnService(), p.Upstreams[i]
		}
	}
	for _, p := range proxies {
		if len(proxies) == 1 || query.SentTo.IsValid() && p.Outbound == query.SentTo.Port() {
			from = p.OwnService()
		}
	}
	for of, addresses := range known.Facts.VirtualIPs {
		if query.To.IsValid() && slices.Contains(addresses, query.To.Addr()) {
			return from, registration.Upstream{Of: of}
		}
	}
	return from, registration.Upstream{Of: registration.Service{Name: query.Service, Namespace: from.Namespace, Partition: from.Partition}}
}

// countInstances counts those of a service in the mesh.
func countInstances(ctx context.Context, c *catalog.Client, of registration.Service) (*api.Instances, error) {
	var seen catalog.Headers
	ctx, cancel := context.WithTimeout(seen.Watch(ctx), c.Read)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return nil, err
	}
	options.Namespace, options.Partition, options.Peer = of.Namespace, of.Partition, of.Peer
	list, _, err := c.Client.Health().Connect(of.Name, "", false, options)
	if err != nil {
		return nil, fmt.Errorf("read instances of %s from Consul: %w", of.Label(), failure.Brief(err))
	}
	if seen.Filtered || seen.HidesFromAnonymous(options.Token, len(list)) {
		return nil, fmt.Errorf("read instances of %s from Consul: %w", of.Label(), errHidden)
	}
	found := api.Instances{Total: len(list)}
	for _, instance := range list {
		switch instance.Checks.AggregatedStatus() {
		case consulapi.HealthPassing:
			found.Passing++
		case consulapi.HealthWarning:
			found.Warning++
		}
	}
	return &found, nil
}

// intention asks whether a service may dial another. Consul answers "no" also where an
// intention has permissions, so the one that decides is looked for then.
func intention(ctx context.Context, c *catalog.Client, from, to registration.Service) (api.Intention, error) {
	ctx, cancel := context.WithTimeout(ctx, c.Read)
	defer cancel()
	fail := func(err error) (api.Intention, error) {
		return "", fmt.Errorf("read intention from %s to %s from Consul: %w", from.Label(), to.Label(), failure.Brief(err))
	}
	options, err := c.Options(ctx)
	if err != nil {
		return "", err
	}
	allowed, _, err := c.Client.Connect().IntentionCheck(&consulapi.IntentionCheck{Source: qualified(from), Destination: qualified(to)}, options)
	if err != nil {
		return fail(err)
	}
	if allowed {
		return api.IntentionAllow, nil
	}
	matches, _, err := c.Client.Connect().IntentionMatch(&consulapi.IntentionMatch{By: consulapi.IntentionMatchDestination, Names: []string{qualified(to)}}, options)
	if err != nil {
		return fail(err)
	}
	for _, list := range matches { // of one name, in the order of precedence
		for _, i := range list {
			if i.SourcePeer == "" && (i.SourceName == from.Name || i.SourceName == "*") {
				if len(i.Permissions) > 0 {
					return api.IntentionByRequest, nil
				}
				return api.IntentionDeny, nil
			}
		}
	}
	return api.IntentionDeny, nil // by default
}

// qualified is the name as Consul's questions about intentions take it.
func qualified(s registration.Service) string {
	const standard = "default"
	name := func(text string) string {
		if text == "" {
			return standard
		}
		return text
	}
	switch {
	case s.Partition != "":
		return name(s.Partition) + "/" + name(s.Namespace) + "/" + s.Name
	case s.Namespace != "":
		return s.Namespace + "/" + s.Name
	}
	return s.Name
}
