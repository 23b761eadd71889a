// SPDX-License-Identifier: MPL-2.0

// Package readiness tells which allocations of the mesh on a node nothing guards, without an
// agent.
package readiness

import (
	"errors"
	"path/filepath"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
)

// Allocations names the allocations of the mesh on this node that have no
// record: those of libcni's results that asked for it, or that Consul has proxies
// of. before says that Weir is not installed yet: it takes none of them over.
func Allocations(config configfile.Config, known []inspect.Record, services []byte, before bool) []health.Check {
	c := &health.Checks{Group: "allocations"}
	cached, unreadable, err := (&discover.Cache{Dir: filepath.Join(config.CNI.CacheDir, "results")}).Read()
	var spaces discover.Namespaces
	if err = errors.Join(err, spaces.Find(config.CNI.NetNSDir, discover.Containers{})); err != nil {
		c.Fault("allocation-unreadable", "set cni { cache_dir, netns_dir } to where Nomad's client has them", "%v", err)
		return c.List
	}
	for _, what := range unreadable {
		c.Warn("allocation-unreadable", "remove that file, and 'nomad alloc stop' the allocation that it is of", "%s", what)
	}
	proxies, _, err := registration.ParseServices(services, registration.Loopback4())
	if services != nil && err != nil {
		c.Warn("allocation-unreadable", "see what answers at consul { address }", "the services of this node cannot be read: %v", err)
	}
	for _, s := range desired.Gather(cached, known, spaces, catalog.Snapshot{Proxies: catalog.ByAllocation(proxies)}) {
		if s.Record != nil || s.Over() || !s.Asked() && len(s.Proxies) == 0 {
			continue
		}
		name := api.WorkloadView{ID: s.Job.AllocID, Job: s.Job.ID, Group: s.Job.Group}.Name()
		switch {
		case len(s.Args.Mesh) > 0:
			c.Warn("allocation-consul", "nothing, it goes on as it is; 'nomad alloc stop' it for one that is under Weir",
				"allocation %s was redirected by consul-cni: its own rules hold until Nomad starts a new one in its place", name)
		case before:
			c.OK("allocation-unprotected", "allocation %s is in the mesh; the agent guards it once it runs", name)
		case s.Asked():
			c.Fault("allocation-unprotected", "'nomad alloc stop' it; a new one is redirected", "allocation %s asks for Weir, and Weir has no record of it: its connections go past the proxy", name)
		default:
			c.Fault("allocation-unprotected", "start the agent, which guards it: 'systemctl enable --now weir-agent'", "allocation %s is in the mesh, and nothing guards it: no agent put it under Weir", name)
		}
	}
	if len(c.List) == 0 {
		c.OK("allocation-unprotected", "no allocation of the mesh on this node is without Weir")
	}
	return c.List
}
