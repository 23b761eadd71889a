// SPDX-License-Identifier: MPL-2.0

package flow

import (
	"net/netip"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/monitor"
)

// flowFacts are what a pass of the loop found, from which flows get their names.
type flowFacts struct {
	known  []inspect.Record
	consul catalog.Snapshot
}

// flowNames puts names to what the kernel tells. It belongs to who records flows
// and to nobody else.
type flowNames struct {
	known      func() ([]inspect.Record, error)
	cgroupPath func(uint64) (string, error)
	containers func() discover.Containers

	services  *virtualServices // that are no upstream of anybody
	facts     *flowFacts       // that the rest was made from
	workloads map[uint64]*Workload
	addresses map[netip.Addr]*Workload // of workloads; nil: more than one has it
	virtual   map[netip.Addr]string    // services by virtual IP
	listeners map[flowListener]string  // services by the upstream's or the proxy's listener
	tasks     map[uint64]flowTask      // by cgroup
	lookedAt  time.Time                // for a workload that was not known
}

type flowListener struct {
	cookie uint64
	addr   netip.AddrPort // inbound: without an address
}

type flowTask struct {
	name  string
	until time.Time // when to look again; zero: it stays so
}

// The bounds of what is kept of cgroups, and how often something is looked for
// that nobody knows.
const (
	flowTasks     = 4096
	flowLookAgain = time.Second
)

// learn takes in what a pass found.
func (n *flowNames) learn(facts *flowFacts) {
	before := n.workloads
	n.facts = facts
	n.workloads = make(map[uint64]*Workload, len(facts.known))
	n.addresses = make(map[netip.Addr]*Workload, len(facts.known))
	n.virtual, n.listeners = make(map[netip.Addr]string), make(map[flowListener]string)
	for of, addresses := range facts.consul.Facts.VirtualIPs {
		for _, addr := range addresses {
			n.virtual[addr.Unmap()] = of.Label()
		}
	}
	for _, k := range facts.known {
		w := Workload{
			Cookie: k.Cookie, AllocID: k.Request.Job.AllocID, namespace: k.Request.Job.Namespace,
			Job: k.Request.Job.ID, Group: k.Request.Job.Group,
		}
		if w.AllocID == "" {
			w.AllocID = k.Key.ContainerID
		}
		n.ownServices(&w, facts.consul.Proxies[w.AllocID])
		for _, upstream := range k.MeshConfig.Upstreams {
			n.listeners[flowListener{k.Cookie, upstream.Listener}] = upstream.Name
			for _, addr := range upstream.Addresses {
				n.virtual[addr.Unmap()] = upstream.Name
			}
		}
		// Records point to it: as long as nothing changes it is the same one.
		if known := before[k.Cookie]; known != nil && *known == w {
			n.workloads[k.Cookie] = known
		} else {
			n.workloads[k.Cookie] = &w
		}
		for _, addr := range k.Request.Addresses {
			n.addAddress(addr.Unmap(), n.workloads[k.Cookie])
		}
	}
}

// addAddress notes whose an address is; one that two workloads have is nobody's.
func (n *flowNames) addAddress(addr netip.Addr, w *Workload) {
	if _, twice := n.addresses[addr]; twice {
		w = nil
	}
	n.addresses[addr] = w
}

// ownServices notes what the workload's proxies are the sidecars of.
func (n *flowNames) ownServices(w *Workload, proxies []registration.Proxy) {
	for i, p := range proxies {
		name := p.Service
		if p.IsGateway() {
			name = p.Self.Name
		}
		if i == 0 {
			w.service = name
		} else if w.service != name {
			w.service = ""
		}
		for _, port := range []uint16{p.Inbound, p.Local} {
			if port != 0 {
				n.listeners[flowListener{w.Cookie, netip.AddrPortFrom(netip.Addr{}, port)}] = name
			}
		}
		for _, u := range p.Upstreams {
			n.listeners[flowListener{w.Cookie, u.Listener}] = u.Of.Label()
		}
	}
}

// workload is whose event it is. One that came after the last pass is looked for
// among the records.
func (n *flowNames) workload(cookie uint64) *Workload {
	if w := n.workloads[cookie]; w != nil {
		return w
	}
	if time.Since(n.lookedAt) > flowLookAgain {
		n.lookedAt = time.Now()
		if list, _ := n.known(); list != nil { // what can be read of them
			n.learn(&flowFacts{known: list, consul: n.facts.consul})
		}
		if w := n.workloads[cookie]; w != nil {
			return w
		}
	}
	return &Workload{Cookie: cookie}
}

// task names the task of the workload that a cgroup belongs to.
func (n *flowNames) task(w *Workload, cgroup uint64) string {
	if cgroup == 0 || w.AllocID == "" {
		return ""
	}
	now := time.Now()
	if task, ok := n.tasks[cgroup]; ok && (task.until.IsZero() || now.Before(task.until)) {
		return task.name
	}
	if len(n.tasks) >= flowTasks || n.tasks == nil {
		n.tasks = make(map[uint64]flowTask)
	}
	var task flowTask
	if path, err := n.cgroupPath(cgroup); err == nil {
		task.name = discover.TaskOf(path, w.AllocID, n.containers())
	}
	if task.name == "" {
		task.until = now.Add(flowLookAgain) // Docker may not have told yet
	}
	n.tasks[cgroup] = task
	return task.name
}

// record is what the ring keeps of an event.
func (n *flowNames) record(event monitor.Event) Record {
	r := Record{
		At: event.Time.UnixNano(), cgroup: event.Cgroup, Uid: event.UID, Pid: event.PID, Verdict: event.Verdict,
		Transport: event.Transport, Lost: uint32(min(event.Lost, 1<<32-1)), Workload: n.workload(event.Cookie),
	}
	copy(r.Command[:], event.Command)
	r.Source, r.SourcePort, r.Valid[0] = PackAddr(event.Source)
	r.Origin, r.OriginPort, r.Valid[1] = PackAddr(event.Origin)
	r.destination, r.destinationPort, r.Valid[2] = PackAddr(event.Destination)
	if event.Verdict == bpfmap.EventsLost {
		return r
	}
	dialled := event.Origin.Addr().Unmap()
	if api.DirectionOf(event.Verdict) == api.DirectionInbound {
		r.peer = n.addresses[event.Source.Addr().Unmap()]
		if r.service = n.listeners[flowListener{event.Cookie, netip.AddrPortFrom(netip.Addr{}, event.Origin.Port())}]; r.service == "" {
			r.service = r.Workload.service
		}
		return r
	}
	r.Task = n.task(r.Workload, event.Cgroup)
	if r.peer = n.addresses[dialled]; dialled.IsLoopback() && event.Verdict == bpfmap.Local {
		r.peer = r.Workload
	}
	if r.service = n.virtual[dialled]; r.service == "" {
		r.service = n.listeners[flowListener{event.Cookie, netip.AddrPortFrom(dialled, event.Origin.Port())}]
	}
	if r.service == "" && r.peer != nil {
		r.service = n.listeners[flowListener{r.peer.Cookie, netip.AddrPortFrom(netip.Addr{}, event.Origin.Port())}]
	}
	if r.service == "" {
		r.service = n.services.name(&r, dialled)
	}
	return r
}

// flow is what readers see of a record.
func (f *Recorder) flow(r *Record) api.Flow {
	flow := api.Flow{Schema: 1, Time: time.Unix(0, r.At), Node: f.Node, Verdict: r.Verdict.String(), Refused: r.Verdict.Refused()}
	source, destination := r.Workload, r.peer
	if r.Verdict == bpfmap.EventsLost {
		flow.Lost, flow.Cause = uint64(r.Lost), api.LostInKernel
		fillSource(&flow.Source, source)
		return flow
	}
	flow.Direction = api.DirectionOf(r.Verdict)
	switch flow.Direction {
	case api.DirectionInbound:
		source, destination = r.peer, r.Workload
	case api.DirectionForwarded: // either end may be any other
		source, destination = nil, r.peer
		flow.Through = api.FlowThrough{AllocID: r.Workload.AllocID, Namespace: r.Workload.namespace, Job: r.Workload.Job, TaskGroup: r.Workload.Group}
	}
	fillSource(&flow.Source, source)
	if destination != nil {
		flow.Destination = api.FlowDestination{
			AllocID: destination.AllocID, Namespace: destination.namespace, Job: destination.Job, TaskGroup: destination.Group,
		}
	}
	flow.Destination.Service = f.services.of(r)
	origin := unpackAddr(r.Origin, r.OriginPort, r.Valid[1])
	flow.Destination.IP, flow.Destination.Port = origin.Addr(), origin.Port()
	from := unpackAddr(r.Source, r.SourcePort, r.Valid[0])
	flow.Source.IP, flow.Source.Port = from.Addr(), from.Port()
	if r.Pid != 0 || r.Verdict == bpfmap.Held { // of a socket that waits, the process is not known
		uid := r.Uid
		flow.Source.Task, flow.Source.PID, flow.Source.UID, flow.Source.Command = r.Task, r.Pid, &uid, r.commandName()
	}
	return flow
}

func fillSource(s *api.FlowSource, w *Workload) {
	if w != nil {
		s.AllocID, s.Namespace, s.Job, s.TaskGroup, s.Service = w.AllocID, w.namespace, w.Job, w.Group, w.service
	}
}
