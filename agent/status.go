// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"maps"
	"slices"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/agent/server"
	"github.com/weirmesh/weir/agent/wait"
)

// Status returns the agent's view of the node. The allocations are those of the
// last pass of the loop; what Consul and Docker say is put together now, because
// it changes without a pass.
func (a *Agent) Status() api.Status {
	consul, docker := a.consulNow(), a.containers().Error
	a.mu.Lock()
	defer a.mu.Unlock()
	status := a.status
	status.Docker, status.Consul = docker, a.consulStatus(consul)
	status.Workloads = slices.Clone(status.Workloads)
	for i := range status.Workloads {
		w := &status.Workloads[i]
		w.InSync = w.InSync && consul.InSync
	}
	status.Problems = append(a.nodeProblems(consul, docker), status.ProblemsAt(time.Now())...)
	return status
}

// source is the agent as its server sees it.
type source struct{ *Agent }

// shown is what the agent's server shows.
func (a *Agent) shown() server.Options {
	options := server.Options{
		Source: source{a}, Config: a.config, Version: a.version, Log: a.log, Datapath: a.datapath, Flows: a.flows, Changes: a.changes, ConsulApply: a.consulApply,
	}
	if a.consul != nil {
		options.Catalog = a.consul.Client
	}
	return options
}

// Workloads is that of server.Source: a pass replaces the list and never writes to it.
func (s source) Workloads() []api.WorkloadView {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.status.Workloads
}

// Consul is that of server.Source.
func (s source) Consul() catalog.Snapshot { return s.consulNow() }

// Unseen is that of server.Source.
func (s source) Unseen() map[string]int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unseen.Reasons()
}

// Failed is that of server.Source.
func (s source) Failed(what string, err error) { s.warnOnce(what, err) }

// consulNow is what is known of Consul; nothing where it is not asked.
func (a *Agent) consulNow() catalog.Snapshot {
	if a.consul == nil {
		return catalog.Snapshot{}
	}
	return a.consul.Current()
}

func (a *Agent) consulStatus(consul catalog.Snapshot) api.ConsulStatus {
	proxies := 0
	for _, p := range consul.Proxies {
		proxies += len(p)
	}
	return api.ConsulStatus{
		Enabled: a.consul != nil, Address: a.config.Consul.Address, InSync: consul.InSync, Since: consul.Since,
		Error: consul.Error.What, Watch: consul.Watch.What, Hidden: consul.Hidden, Proxies: proxies, Counts: consul.Counts,
	}
}

// publish shows the allocations as a pass found them.
func (a *Agent) publish(more []api.WorkloadView) {
	var list []api.WorkloadView
	a.managed = a.managed[:0]
	for _, key := range slices.SortedFunc(maps.Keys(a.allocations), desired.CompareKeys) {
		v := a.allocations[key].view
		if v.State != api.StateOutside {
			list = append(list, v)
		}
		if v.State == api.StateManaged {
			a.managed = append(a.managed, key)
		}
	}
	list = append(list, more...)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.status.Workloads = list
}

// awaitRegistration tells the watcher which allocations that may be in the mesh wait for
// their registration, and since when the newest does.
func (a *Agent) awaitRegistration(allocations []desired.Allocation, now time.Time) {
	if a.consul == nil {
		return
	}
	waiting := wait.Arrivals{Now: now}
	for _, s := range allocations {
		if m := a.allocations[s.Key]; m != nil && len(s.Proxies) == 0 {
			waiting.Add(s.Job.AllocID, m.born)
		}
	}
	a.awaited = waiting.Soon
	a.expects.Store(!waiting.Newest.IsZero())
	a.consul.Await(waiting.Newest, waiting.Soon...)
}
