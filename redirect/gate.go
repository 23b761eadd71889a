// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/host/sysctl"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// Gate holds the connections that the tasks of a workload open before its proxy
// listens: they wait, as if their SYN had been lost, and the application's own
// retransmission finds the proxy. The kernel sends a connection to the gate only
// where no listener of the proxy is registered. It ends with its process.
type Gate struct {
	datapath *Datapath
	key      workload.AttachmentID
	cookie   uint64
	ports    []uint16 // outbound, of the proxies in transparent mode
	proxyIDs uint8    // ... and a bit for each of them
	holder   *os.File
	netns    string // its path, and which it was
	inode    uint64

	upstreams map[uint16]bool // ports on which an explicit upstream is to listen

	held    uint32                   // segments that the holder has dropped, as of the last look
	waiting map[uint64]monitor.Event // what waited then
	counted time.Time                // when that was
}

// gateSeconds is how long what waits is tried again every second: as long as a gate is
// open by default. In one that is open for longer the gaps double after that.
const gateSeconds = 30

// countAgain is how soon the connections that wait are counted again where no more came:
// some may have given up.
const countAgain = time.Second

// GateState is how a gate stands.
type GateState struct {
	Listens bool                     // all that it holds for is there: nothing is held any more
	Waiting map[uint64]monitor.Event // the connections that wait now, verdict Held, by their sockets' cookies
}

// OpenGate makes a gate for a workload, until Close. In transparent mode it holds what
// is redirected; Hold adds explicit upstreams, in any mode. It takes no lock.
func (d *Datapath) OpenGate(key workload.AttachmentID) (*Gate, error) {
	fail := func(err error) (*Gate, error) { return nil, fmt.Errorf("open gate of %s: %w", key, err) }
	r, ns, err := d.OpenWorkload(key)
	if err != nil {
		return fail(err)
	}
	defer ns.Close()
	g := &Gate{datapath: d, key: key, cookie: r.Cookie, netns: r.NetNS, inode: ns.Inode, upstreams: make(map[uint16]bool)}
	for _, port := range r.Desired().MeshPorts() {
		if port.Outbound && r.Request.Mode == workload.ModeTransparent {
			g.ports, g.proxyIDs = append(g.ports, port.Port), g.proxyIDs|1<<port.ProxyID
		}
	}
	keys := sysctl.Among(d.Paths().Workloads())
	defer keys.Close()
	if err := ns.KeepDialling(gateSeconds, keys); err != nil {
		return fail(err)
	}
	if g.holder, err = ns.Holder(); err != nil {
		return fail(err)
	}
	if err := g.register(); err != nil {
		return fail(errors.Join(err, g.holder.Close()))
	}
	return g, nil
}

// register puts the gate behind the places of the proxies' listeners.
func (g *Gate) register() error {
	tables, err := bpfmap.OpenTables(g.datapath.Paths().Maps())
	if err != nil {
		return err
	}
	defer tables.Close()
	for _, port := range g.ports {
		if err := tables.Put("listeners", bpfmap.GateKey(g.cookie, port, false), uint64(g.holder.Fd()), ebpf.UpdateAny); err != nil {
			return err
		}
	}
	return nil
}

// Hold lets what is dialled to these ports of loopback wait until somebody listens
// there. The kernel ends that with the first listener, once for each port.
func (g *Gate) Hold(upstreams []uint16) error {
	fail := func(err error) error { return fmt.Errorf("hold upstreams of %s: %w", g.key, err) }
	fresh := slices.DeleteFunc(slices.Clone(upstreams), func(port uint16) bool { return g.upstreams[port] })
	if len(fresh) == 0 {
		return nil
	}
	tables, err := bpfmap.OpenTables(g.datapath.Paths().Maps())
	if err != nil {
		return fail(err)
	}
	defer tables.Close()
	for _, port := range fresh {
		if err := tables.Put("listeners", bpfmap.GateKey(g.cookie, port, true), uint64(g.holder.Fd()), ebpf.UpdateAny); err != nil {
			return fail(err)
		}
		g.upstreams[port] = true
	}
	// A listener that is older than the row did not take it away.
	_, ns, err := g.datapath.OpenWorkload(g.key)
	if err != nil {
		return fail(err)
	}
	defer ns.Close()
	sockets, err := ns.Listening()
	for _, s := range sockets {
		if slices.Contains(fresh, s.Port) {
			err = errors.Join(err, tables.Delete("listeners", bpfmap.GateKey(g.cookie, s.Port, true)))
		}
	}
	if err != nil {
		return fail(err)
	}
	return nil
}

// Look says how the gate stands, and puts it back where its rows are lost.
func (g *Gate) Look() (GateState, error) {
	states, errs := g.datapath.LookAtGates([]*Gate{g})
	return states[0], errs[0]
}

// LookAtGates looks at many gates. One at which nothing came costs a few system calls:
// neither its record nor its namespace is opened.
func (d *Datapath) LookAtGates(gates []*Gate) (states []GateState, errs []error) {
	states, errs = make([]GateState, len(gates)), make([]error, len(gates))
	tables, err := bpfmap.OpenTablesToRead(d.Paths().Maps())
	if err == nil {
		defer tables.Close()
	}
	for i, g := range gates {
		if errs[i] = err; err == nil {
			states[i], errs[i] = g.look(tables)
		}
		if errs[i] != nil {
			errs[i] = fmt.Errorf("look at gate of %s: %w", g.key, errs[i])
		}
	}
	return states, errs
}

func (g *Gate) look(tables *bpfmap.Tables) (state GateState, err error) {
	if err := g.lives(tables); err != nil {
		return state, err
	}
	listens, whole, err := g.served(tables)
	if err != nil {
		return state, err
	}
	state.Listens = listens
	if state.Waiting, err = g.count(tables, listens); err != nil {
		return state, err
	}
	if listens || whole {
		return state, nil
	}
	return state, g.register()
}

// lives returns an error where the workload or its namespace ended.
func (g *Gate) lives(tables *bpfmap.Tables) error {
	generation, err := tables.Generation(g.cookie)
	if err != nil {
		return err
	}
	var stat unix.Stat_t
	if generation != 0 && unix.Stat(g.netns, &stat) == nil && stat.Ino == g.inode {
		return nil
	}
	_, ns, err := g.datapath.OpenWorkload(g.key) // it says what ended
	if err != nil {
		return err
	}
	return ns.Close()
}

// served reports whether all listens that the gate holds for, and whether its own rows
// are there.
func (g *Gate) served(tables *bpfmap.Tables) (listens, whole bool, err error) {
	listens, whole = true, true
	known := false // a listener of one of the proxies is registered, wherever
	err = bpfmap.EachProxyID(g.cookie, g.proxyIDs, func(key bpfmap.BpfProxyKey) error {
		proxy, err := tables.ProxyState(g.cookie, uint8(key.Seat))
		known = known || proxy.Listeners > 0 || proxy.Flags&bpfmap.BpfProxyFlagPROXY_PINNED != 0
		return err
	})
	if err != nil {
		return false, false, err
	}
	for _, port := range g.ports {
		registered := false
		for _, role := range []bpfmap.BpfListenerRole{bpfmap.BpfListenerRoleLISTENER_OUTBOUND4, bpfmap.BpfListenerRoleLISTENER_OUTBOUND6} {
			if !known || registered {
				break
			}
			sockets, err := tables.Registered(g.cookie, role, port)
			if err != nil {
				return false, false, err
			}
			registered = len(sockets) > 0
		}
		holds, err := tables.GateHolds(g.cookie, port, false)
		if err != nil {
			return false, false, err
		}
		listens, whole = listens && registered, whole && holds
	}
	for port := range g.upstreams {
		holds, err := tables.GateHolds(g.cookie, port, true)
		if err != nil {
			return false, false, err
		}
		listens = listens && !holds
	}
	return listens, whole, nil
}

// count returns the sockets that wait. To list them the kernel walks the connections of
// all namespaces of the node, so it is asked only after the holder dropped a segment.
func (g *Gate) count(tables *bpfmap.Tables, last bool) (map[uint64]monitor.Event, error) {
	held, err := host.Drops(g.holder)
	if err != nil || held == 0 || held == g.held && !last && time.Since(g.counted) < countAgain {
		return g.waiting, err
	}
	_, ns, err := g.datapath.OpenWorkload(g.key)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	attempts, err := ns.Waiting()
	if err != nil {
		return nil, err
	}
	g.held, g.waiting, g.counted = held, g.events(tables, attempts), time.Now()
	return g.waiting, nil
}

// events are the connections that wait, with what each dialled.
func (g *Gate) events(tables *bpfmap.Tables, attempts map[uint64]host.Attempt) map[uint64]monitor.Event {
	waiting := make(map[uint64]monitor.Event, len(attempts))
	for socket, attempt := range attempts {
		waiting[socket] = monitor.WithOrigin(tables, monitor.Event{
			Time: time.Now(), Cookie: g.cookie, Verdict: bpfmap.Held, Name: bpfmap.Held.String(),
			Source: attempt.Source, Origin: attempt.Destination, Destination: attempt.Destination, UID: attempt.UID, Cgroup: attempt.Cgroup,
		})
	}
	return waiting
}

// Close lets nothing wait any more: what waits now is refused at its next attempt
// where no proxy listens by then. The kernel takes the rows away with the socket.
func (g *Gate) Close() error { return g.holder.Close() }
