// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect/families"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/program/filter"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// Status is the state of the node's data path.
type Status struct {
	Loaded     bool              `json:"loaded"`
	Current    bool              `json:"current"` // the node runs this binary's programs
	Paths      store.Paths       `json:"paths"`
	CgroupRoot string            `json:"cgroup_root"` // what the programs are attached to
	Links      []string          `json:"links"`       // programs in force there
	Maps       []bpfmap.MapInfo  `json:"maps"`
	Barrier    bpfmap.ReaderWait `json:"barrier"` // the way in use, the weaker one where the kernel has no other
	Workloads  int               `json:"workloads"`
	Others     []Other           `json:"others,omitempty"` // programs of others on the same hooks
	Problems   []health.Problem  `json:"problems"`
}

// Healthy reports whether nothing is wrong.
func (s Status) Healthy() bool { return s.Loaded && len(s.Problems) == 0 }

// Probe reports whether an Add would find what it needs: the data path is
// loaded and of a layout that this binary knows, or the kernel can load it.
func (d *Reader) Probe() error {
	tables, err := bpfmap.OpenTables(d.paths.Maps())
	if errors.Is(err, bpfmap.ErrNotLoaded) {
		root, err := d.paths.OpenCgroupRoot()
		if err != nil {
			return err
		}
		return errors.Join(probe.Probe(), root.Close())
	}
	if err != nil {
		return err
	}
	return tables.Close()
}

// Identity says how the kernel tells a workload's proxy from its tasks.
type Identity string

// The ways to tell a proxy.
const (
	IdentityUID    Identity = "uid"     // its cgroup is not known yet, or shared with tasks
	IdentityCgroup Identity = "cgroup"  // by UID and cgroup: a task under the proxy's UID is redirected
	IdentityNone   Identity = "unknown" // rows are lost
)

// ProxyStatus is what the node knows of a workload's proxy.
type ProxyStatus struct {
	Service   string   `json:"service,omitempty"` // whose sidecar it is, where that is known
	UID       uint32   `json:"uid"`
	Cgroup    uint64   `json:"cgroup"` // ID; 0: not known yet
	Identity  Identity `json:"identity"`
	Inbound   uint16   `json:"inbound"`
	Outbound  uint16   `json:"outbound"`
	Listeners int      `json:"listeners"` // registered sockets, outbound and inbound
}

// WorkloadStatus is the state of one workload.
type WorkloadStatus struct {
	Key   workload.AttachmentID `json:"key"`
	ID    string                `json:"id"` // allocation ID
	Job   string                `json:"job"`
	Group string                `json:"group"`
	workload.NomadNames
	NetNS     string           `json:"netns"`
	Cookie    uint64           `json:"cookie,string"`
	Mode      workload.Mode    `json:"mode"`
	Guard     workload.Guard   `json:"guard"`
	Egress    workload.Guard   `json:"egress"` // the egress guard
	Addresses []netip.Addr     `json:"addresses"`
	Proxy     ProxyStatus      `json:"proxy"`              // the first one
	Sidecars  []ProxyStatus    `json:"sidecars,omitempty"` // the others
	Origins   uint32           `json:"origins"`            // destination addresses held
	Budget    uint32           `json:"budget"`             // ... of so many
	Notes     []string         `json:"notes"`
	Problems  []health.Problem `json:"problems"`
}

// Workloads returns the workloads on record that have one of the keys, all of them
// without any, sorted by key, without the lock. A record that cannot be read does not
// hide the others; it comes back in the error.
func (d *Reader) Workloads(keys ...workload.AttachmentID) ([]WorkloadStatus, error) {
	sound := make(soundWorkloads)
	return settled(d.paths, func() ([]WorkloadStatus, error) {
		tables, err := bpfmap.OpenTablesToRead(d.paths.Maps())
		if err != nil {
			return nil, err
		}
		defer tables.Close()
		return d.workloads(tables, sound, keys)
	}, func(list []WorkloadStatus) (wrong []health.Problem) {
		for _, w := range list {
			wrong = append(wrong, w.Problems...)
		}
		return wrong
	})
}

// soundWorkloads are those in which a look found nothing wrong. The next one, which is
// for what may have been half of a change, leaves them as they are.
type soundWorkloads map[workload.AttachmentID]WorkloadStatus

// FewWorkloads are looked at without what is worth its while only for many.
const FewWorkloads = 8

func (d *Reader) workloads(tables *bpfmap.Tables, sound soundWorkloads, keys []workload.AttachmentID) ([]WorkloadStatus, error) {
	records, unreadable := d.records(keys)
	if unreadable != nil && !errors.Is(unreadable, store.ErrUnreadable) {
		return nil, unreadable
	}
	if len(records) > FewWorkloads {
		if err := tables.RememberListeners(); err != nil {
			return nil, err
		}
	}
	filters, err := filter.NewFilterReader(d.paths)
	if err != nil {
		return nil, err
	}
	defer filters.Close()
	list := make([]WorkloadStatus, len(records))
	look := func(i int) {
		r := records[i]
		if before, ok := sound[r.Key]; ok && before.Cookie == r.Cookie {
			list[i] = before
			return
		}
		status, err := d.workload(tables, filters, r)
		if err != nil { // it says nothing of the others
			status.Problems = append(status.Problems, health.NewProblem(health.ProblemStateUnreadable, "what is in force stays; see the error",
				fmt.Sprintf("it cannot be looked at: %v", err)).Of("workload "+status.Key.String(), status.ID))
		}
		list[i] = status
	}
	var next atomic.Int64
	var lookers sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), len(records)) {
		lookers.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(records)); i = next.Add(1) - 1 {
				look(int(i))
			}
		})
	}
	lookers.Wait()
	for _, w := range list {
		if len(w.Problems) == 0 {
			sound[w.Key] = w
		}
	}
	slices.SortFunc(list, func(a, b WorkloadStatus) int {
		return strings.Compare(a.Key.String(), b.Key.String())
	})
	return list, unreadable
}

// records are those of the keys, all of them without any.
func (d *Reader) records(keys []workload.AttachmentID) (list []*store.Record, err error) {
	if len(keys) == 0 {
		return d.paths.ReadRecords()
	}
	var problems []error
	for _, key := range keys {
		r, err := d.paths.ReadRecord(key)
		switch {
		case errors.Is(err, store.ErrUnknown): // it went meanwhile
		case err != nil:
			problems = append(problems, err)
		default:
			list = append(list, r)
		}
	}
	return list, errors.Join(problems...)
}

func (d *Reader) workload(tables *bpfmap.Tables, filters *filter.FilterReader, r *store.Record) (WorkloadStatus, error) {
	w := r.Desired()
	status := WorkloadStatus{
		Key: r.Key, ID: r.Request.Job.AllocID, Job: r.Request.Job.ID, Group: r.Request.Job.Group,
		NomadNames: r.Request.Job.Names(r.Key), NetNS: r.NetNS, Cookie: r.Cookie, Mode: w.Mode, Guard: w.Guard, Egress: workload.MaxGuard(workload.GuardOff, w.Egress), Addresses: w.Addresses,
		Budget: w.Budget, Notes: append([]string{}, r.Request.Notes...), Problems: []health.Problem{},
	}
	if status.ID == "" {
		status.ID = r.Key.ContainerID
	}
	problem := func(code health.ProblemCode, remedy, what string, args ...any) {
		problem := health.NewProblem(code, remedy, fmt.Sprintf(what, args...))
		status.Problems = append(status.Problems, problem.Of("workload "+r.Key.String(), status.ID))
	}
	var err error
	if status.Origins, err = tables.Held(r.Cookie); err != nil {
		return status, err
	}
	proxies, shared, err := proxyStatus(tables, r.Cookie, w)
	if err != nil {
		return status, err
	}
	status.Proxy, status.Sidecars = proxies[0], proxies[1:]
	if shared {
		status.Notes = append(status.Notes, "proxy and tasks share a cgroup: the UID alone tells them apart, a task under the proxy's UID is not redirected")
	}
	if err := d.inspect(tables, filters, r, w, &status, problem); err != nil {
		return status, err
	}
	return status, nil
}

// problemNoter notes what is wrong with a workload.
type problemNoter func(code health.ProblemCode, remedy, what string, args ...any)

// anew is the remedy for most of it.
const anew = "restart the allocation, or run its CNI CHECK"

// inspect compares the kernel with the record.
func (d *Reader) inspect(tables *bpfmap.Tables, filters *filter.FilterReader, r *store.Record, w workload.Workload, status *WorkloadStatus, problem problemNoter) error {
	served, err := tables.Served(r.Cookie, w)
	if err != nil {
		return err
	}
	err = host.Within(r.NetNS, func(ns *host.Namespace) error {
		if err := isOf(ns, r); err != nil {
			return err
		}
		return d.inspectWithin(tables, filters, r, w, ns, served, status, problem)
	})
	if errors.Is(err, host.ErrNetNSGone) {
		problem(health.ProblemNamespaceGone, "run CNI DEL or GC; nothing of it is in use", "its namespace is gone")
		return nil
	}
	return err
}

// inspectWithin is inspect, in the workload's namespace.
func (d *Reader) inspectWithin(tables *bpfmap.Tables, filters *filter.FilterReader, r *store.Record, w workload.Workload, ns *host.Namespace, served map[bpfmap.BpfListenerKey]bool, status *WorkloadStatus, problem problemNoter) error {
	if r.State != store.Complete {
		problem(health.ProblemIncomplete, anew, "its ADD, CHECK or change did not finish")
	}
	moved := *r
	if changed, err := ObserveSources(&moved, ns); err != nil {
		return err
	} else if len(changed) > 0 {
		problem(health.ProblemAddressesChanged, "run its CNI CHECK; the agent does so at once", "%s: redirected connections may fail", changed[0])
	}
	written, err := tables.HasRows(r.Cookie, w, r.IPv6)
	if err != nil {
		return err
	}
	if !written {
		status.Proxy.Identity = IdentityNone
		problem(health.ProblemRowsMissing, anew, "rows are missing: its connections are refused or pass untouched")
	}
	routed, err := ns.HasRoutes(w, r.IPv6)
	if err != nil {
		return err
	}
	if !routed {
		problem(health.ProblemRoutesMissing, anew, "routes to the proxy are missing: redirected connections do not arrive")
	}
	filtered, err := filters.Filtered(ns, w)
	if err != nil {
		return err
	}
	if !filtered {
		problem(health.ProblemFilterMissing, anew, "its filter of forwarded packets is missing or changed: they pass the mesh, datagrams by broadcast or multicast the guard, and tunnels the egress guard")
	}
	if err := families.Inspect(d.paths, ns, w, problem); err != nil {
		return err
	}
	lookups, err := program.LookupsIn(tables, ns)
	if err != nil {
		return err
	}
	if lookups.Own == 0 {
		problem(health.ProblemLookupMissing, anew, "its lookup program is not attached: inbound connections pass the mesh")
	} else if _, err := os.Lstat(d.paths.Lookup(ns.Cookie)); errors.Is(err, fs.ErrNotExist) {
		problem(health.ProblemLookupMissing, anew, "its lookup program runs without a pin")
	}
	if lookups.Other != nil {
		problem(health.ProblemOtherInstance, "end the allocation with the paths that it was started with, or unload that instance",
			"another instance of Weir is attached to its namespace, as program %d: its connections are refused", lookups.Other.ID)
	}
	unserved, err := unservedListeners(ns, w, served)
	for _, listener := range unserved {
		problem(health.ProblemListenerMissing, "run its CNI CHECK; if that does not help it is an MPTCP socket, which the kernel cannot hand connections to, or a task's",
			"the listener on %s under the proxy's UID is not registered: it gets no connections", listener)
	}
	return err
}

// unservedListeners are those under the proxy's UID that no connection is sent to.
func unservedListeners(ns *host.Namespace, w workload.Workload, served map[bpfmap.BpfListenerKey]bool) (list []netip.AddrPort, err error) {
	sockets, err := ns.Listening()
	if err != nil {
		return nil, err
	}
	for _, s := range sockets {
		port, roles := SocketRoles(s, w)
		unserved := func(role bpfmap.BpfListenerRole) bool {
			return !served[bpfmap.ListenerKey(ns.Cookie, role, port.Port, 0)]
		}
		if s.UID == w.ProxyUID && slices.ContainsFunc(roles, unserved) {
			list = append(list, netip.AddrPortFrom(s.Addr, s.Port))
		}
	}
	return list, nil
}

// proxyStatus is what is known of each proxy, the first one first, and whether
// one of them shares its cgroup with tasks.
func proxyStatus(m *bpfmap.Tables, cookie uint64, w workload.Workload) (list []ProxyStatus, shared bool, err error) {
	for i, p := range w.All() {
		proxy, err := m.ProxyState(cookie, w.ProxyID(i))
		if err != nil {
			return nil, false, err
		}
		status := ProxyStatus{
			Service: p.Service, UID: w.ProxyUID, Cgroup: proxy.Cgroup, Identity: IdentityUID, Inbound: p.InboundPort, Outbound: p.OutboundPort,
		}
		switch {
		case proxy.Flags&bpfmap.BpfProxyFlagPROXY_SHARED != 0:
			shared = true
		case proxy.Cgroup != 0:
			status.Identity = IdentityCgroup
		}
		sockets := make(map[uint64]bool)
		for _, port := range w.Ports() {
			if port.ProxyID != w.ProxyID(i) {
				continue
			}
			if err := addRegistered(m, cookie, port, sockets); err != nil {
				return nil, false, err
			}
		}
		status.Listeners = len(sockets)
		list = append(list, status)
	}
	// Until each has shown itself, whoever has the UID may be one of them.
	if slices.ContainsFunc(list, func(p ProxyStatus) bool { return p.Cgroup == 0 }) {
		for i := range list {
			list[i].Identity = IdentityUID
		}
	}
	return list, shared, nil
}
