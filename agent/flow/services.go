// SPDX-License-Identifier: MPL-2.0

package flow

import (
	"context"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/catalog/virtual"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/agent/wait"
)

// The pace of questions about virtual IPs that tasks dial. What Consul has to do for them
// depends on what the node's tasks dial, not on the catalog's changes.
const (
	virtualRest   = 5 * time.Second  // between two questions
	virtualAgain  = 10 * time.Minute // until a name is asked for again, where it is still dialled
	virtualAbsent = time.Minute      // ... where there was none
	virtualNames  = 8192             // that are kept
)

// virtualServices are the services whose virtual IPs tasks dialled though none is an
// upstream of theirs: in transparent mode a task may dial any of the mesh.
type virtualServices struct {
	ranges atomic.Pointer[[]netip.Prefix] // of virtual IPs; nil: Consul is not asked
	wanted chan struct{}                  // something is to be asked

	mu    sync.Mutex
	named map[netip.Addr]*virtualName
	asked shareTable[virtualKey, virtualQuestion] // that have no name, or none yet
}

type virtualName struct {
	service string
	since   time.Time // the first connection that is known to be to it
	seen    time.Time
	next    time.Time // when to ask again
}

// virtualKey is who dialled what: a task that scans fills no more than its share.
type virtualKey struct {
	cookie uint64
	addr   netip.Addr
}

func (k virtualKey) workload() uint64 { return k.cookie }

type virtualQuestion struct{ since, seen, next time.Time }

func NewVirtualServices() *virtualServices {
	return &virtualServices{
		wanted: make(chan struct{}, 1), named: make(map[netip.Addr]*virtualName), asked: newShareTable[virtualKey, virtualQuestion](),
	}
}

// name is that of the service which a new record's connection is to.
func (v *virtualServices) name(r *Record, dialled netip.Addr) string {
	ranges := v.ranges.Load()
	if ranges == nil || r.peer != nil || !r.Verdict.IsConnection() || !slices.ContainsFunc(*ranges, func(p netip.Prefix) bool { return p.Contains(dialled) }) {
		return ""
	}
	return v.Dialled(r.Workload.Cookie, dialled, time.Unix(0, r.At))
}

// Dialled is the service that has a virtual IP which a workload dialled; where it is not
// known it will be asked for.
func (v *virtualServices) Dialled(cookie uint64, addr netip.Addr, at time.Time) (service string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	var next time.Time
	if known := v.named[addr]; known != nil {
		known.seen, next, service = at, known.next, known.service
	} else if question := v.asked.entry(virtualKey{cookie, addr}, virtualQuestion{since: at}); question != nil {
		question.seen, next = at, question.next
	} else {
		return ""
	}
	if !at.Before(next) {
		select {
		case v.wanted <- struct{}{}:
		default:
		}
	}
	return service
}

// of is the service of a record; one that was not known when it was made may be by now.
func (v *virtualServices) of(r *Record) string {
	if v == nil || r.service != "" || r.peer != nil || api.DirectionOf(r.Verdict) != api.DirectionOutbound {
		return r.service
	}
	return v.Named(netip.AddrFrom16(r.Origin).Unmap(), time.Unix(0, r.At))
}

// Named is the service that had the address then, as far as it is known.
func (v *virtualServices) Named(addr netip.Addr, at time.Time) string {
	v.mu.Lock()
	defer v.mu.Unlock()
	if known := v.named[addr]; known != nil && !at.Before(known.since) {
		return known.service
	}
	return ""
}

// Due are the addresses to ask for now, and forgets what nobody dialled for as long as the
// ring goes back.
func (v *virtualServices) Due(now time.Time, history time.Duration) (list []netip.Addr) {
	v.mu.Lock()
	defer v.mu.Unlock()
	set := make(map[netip.Addr]bool)
	want := func(addr netip.Addr, seen, next time.Time) {
		if len(set) < virtual.AtOnce && !seen.Before(next) && !now.Before(next) {
			set[addr] = true
		}
	}
	for key, question := range v.asked.Entries {
		if now.Sub(question.seen) > virtualAgain {
			v.asked.delete(key)
			continue
		}
		want(key.addr, question.seen, question.next)
	}
	for addr, known := range v.named {
		if now.Sub(known.seen) > max(history, virtualAgain) {
			delete(v.named, addr)
			continue
		}
		want(addr, known.seen, known.next)
	}
	for addr := range set {
		list = append(list, addr)
	}
	slices.SortFunc(list, netip.Addr.Compare)
	return list
}

// Settle takes in what Consul said of the addresses, or that it said nothing. began is
// when it was asked.
func (v *virtualServices) Settle(addresses []netip.Addr, found map[netip.Addr]registration.Service, err error, began time.Time) {
	v.mu.Lock()
	defer v.mu.Unlock()
	since := v.answered(addresses, found, err, began)
	for _, addr := range addresses {
		known, of := v.named[addr], found[addr]
		switch {
		case err != nil && known != nil:
			known.next = began.Add(virtualAbsent)
		case err != nil:
		case of.Name == "":
			delete(v.named, addr)
		case known == nil && len(v.named) < virtualNames:
			first, ok := since[addr]
			if !ok {
				first = began
			}
			v.named[addr] = &virtualName{service: of.Label(), since: first, seen: began, next: began.Add(virtualAgain)}
		case known != nil:
			if known.service != of.Label() {
				known.service, known.since = of.Label(), began
			}
			known.next = began.Add(virtualAgain)
		}
	}
}

// answered takes the answers out of what is asked, and says since when each was dialled. The
// caller holds mu.
func (v *virtualServices) answered(addresses []netip.Addr, found map[netip.Addr]registration.Service, err error, began time.Time) map[netip.Addr]time.Time {
	since := make(map[netip.Addr]time.Time)
	for key, question := range v.asked.Entries {
		if !slices.Contains(addresses, key.addr) {
			continue
		}
		if _, ok := found[key.addr]; !ok {
			question.next = began.Add(virtualAbsent)
			if err == nil {
				question.since = began // before that it was nobody's
			}
			continue
		}
		if first, ok := since[key.addr]; !ok || question.since.Before(first) {
			since[key.addr] = question.since
		}
		v.asked.delete(key)
	}
	return since
}

// nameServices asks Consul for the services behind the virtual IPs that tasks dial, until
// ctx ends.
func (f *Recorder) nameServices(ctx context.Context, consul *catalog.Client) {
	ranges, told := virtual.DefaultRanges(), false
	f.services.ranges.Store(&ranges)
	for {
		var again <-chan time.Time
		if !told {
			found, err := virtual.Ranges(ctx, consul)
			if told = err == nil; told {
				f.services.ranges.Store(&found)
			} else {
				again = time.After(virtualAbsent)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-again:
			continue
		case <-f.services.wanted:
		}
		if !f.askServices(ctx, consul) {
			return
		}
	}
}

// askServices asks for what is due, until nothing is. It reports false when ctx ended.
func (f *Recorder) askServices(ctx context.Context, consul *catalog.Client) bool {
	for {
		began := time.Now()
		list := f.services.Due(began, f.Ring.history)
		if len(list) == 0 {
			return ctx.Err() == nil
		}
		found, err := virtual.Services(ctx, consul, list)
		if err != nil {
			f.log.Debug("services of virtual IPs stay without a name", "error", err)
		}
		f.services.Settle(list, found, err, began)
		if _, alive := wait.Pause(ctx, virtualRest, nil); !alive {
			return false
		}
	}
}
