// SPDX-License-Identifier: MPL-2.0

// Package view is what operators see of attachments, and of proxies that belong to none.
package view

import (
	"net/netip"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/desired"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/workload"
)

// Of is the view of one attachment.
func Of(s desired.Allocation, state api.State, w desired.Plan, problems []health.Problem, known catalog.Data) api.WorkloadView {
	v := api.WorkloadView{
		Key: s.Key, ID: s.Job.AllocID, Job: s.Job.ID, Group: s.Job.Group, NomadNames: s.Job.Names(s.Key), NetNS: s.NetNS, State: state,
		Proxies: []api.ProxyView{}, Open: []uint16{}, Upstreams: []api.UpstreamView{}, Problems: []health.Problem{},
	}
	if v.ID == "" {
		v.ID = s.Key.ContainerID
	}
	for _, problem := range problems {
		if state == api.StateUnclaimed { // its ID is the registration's
			problem = problem.Of("proxy "+v.ID, "")
		} else {
			problem = problem.Of("allocation "+v.Name(), v.ID)
		}
		v.Problems = append(v.Problems, problem)
	}
	meshConfig := w.MeshConfig
	if s.Record != nil {
		v.Mode = s.Record.Request.Mode
		if meshConfig == nil {
			meshConfig = &s.Record.MeshConfig
		}
	} else if w.Add != nil {
		v.Mode = w.Add.Mode
	}
	if meshConfig != nil && state == api.StateManaged {
		v.Guard, v.Open = meshConfig.Guard, desired.OpenPorts(*meshConfig)
		v.Egress = workload.MaxGuard(workload.GuardOff, meshConfig.Egress)
		if s.Record != nil {
			v.Egress = workload.MaxGuard(v.Egress, s.Record.Request.Egress)
		}
	}
	for _, p := range s.Proxies {
		v.Proxies = append(v.Proxies, api.ProxyView{ID: p.ID, Kind: p.Kind, Task: p.Task(), Inbound: p.Inbound, Outbound: p.Outbound})
		for _, u := range p.Upstreams {
			v.Upstreams = append(v.Upstreams, api.UpstreamView{Name: u.Of.Label(), Listener: u.Listener, VirtualIPs: append([]netip.Addr{}, known.VirtualIPs[u.Of]...)})
		}
	}
	return v
}
