// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
)

// Gate holds the connections that the tasks of a workload open before its proxy
// listens: they wait, as if their SYN had been lost, and the application's own
// retransmission finds the proxy. The kernel sends a connection to the gate only
// where no listener of the proxy is registered. It ends with its process.
type Gate struct {
	datapath *Datapath
	key      workload.AttachmentID
	cookie   uint64
	ports    []uint16 // outbound, of the proxies
	holder   *os.File
}

// GateState is how a gate stands.
type GateState struct {
	Listens bool            // every proxy has its outbound listener: nothing is held any more
	Waiting map[uint64]bool // cookies of the sockets that wait now
}

// OpenGate makes a gate for a workload in transparent mode, until Close. It takes
// no lock.
func (d *Datapath) OpenGate(key workload.AttachmentID) (*Gate, error) {
	fail := func(err error) (*Gate, error) { return nil, fmt.Errorf("open gate of %s: %w", key, err) }
	r, err := d.paths.ReadRecord(key)
	if err != nil {
		return fail(err)
	}
	g := &Gate{datapath: d, key: key, cookie: r.Cookie}
	for _, port := range r.Desired().MeshPorts() {
		if port.Outbound {
			g.ports = append(g.ports, port.Port)
		}
	}
	ns, err := openNamespaceOf(r)
	if err != nil {
		return fail(err)
	}
	defer ns.Close()
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
	tables, err := bpfmap.OpenTables(g.datapath.paths.Maps())
	if err != nil {
		return err
	}
	defer tables.Close()
	for _, port := range g.ports {
		key := bpfmap.ListenerKey(g.cookie, bpfmap.BpfListenerRoleLISTENER_OUTBOUND4, port, bpfmap.GateSlot)
		if err := tables.Put("listeners", key, uint64(g.holder.Fd()), ebpf.UpdateAny); err != nil {
			return err
		}
	}
	return nil
}

// Look says how the gate stands, and puts it back where its rows are lost.
func (g *Gate) Look() (state GateState, err error) {
	fail := func(err error) (GateState, error) { return state, fmt.Errorf("look at gate of %s: %w", g.key, err) }
	r, err := g.datapath.paths.ReadRecord(g.key)
	if err != nil {
		return fail(err)
	}
	ns, err := openNamespaceOf(r)
	if err != nil {
		return fail(err)
	}
	defer ns.Close()
	if state.Waiting, err = ns.Waiting(); err != nil {
		return fail(err)
	}
	tables, err := bpfmap.OpenTablesToRead(g.datapath.paths.Maps())
	if err != nil {
		return fail(err)
	}
	defer tables.Close()
	state.Listens = true
	whole := true
	for _, port := range g.ports {
		listens := false
		for _, role := range []bpfmap.BpfListenerRole{bpfmap.BpfListenerRoleLISTENER_OUTBOUND4, bpfmap.BpfListenerRoleLISTENER_OUTBOUND6} {
			sockets, err := tables.Registered(g.cookie, role, port)
			if err != nil {
				return fail(err)
			}
			listens = listens || len(sockets) > 0
		}
		holds, err := tables.GateHolds(g.cookie, port)
		if err != nil {
			return fail(err)
		}
		state.Listens, whole = state.Listens && listens, whole && holds
	}
	if state.Listens || whole {
		return state, nil
	}
	return state, g.register()
}

// Close lets nothing wait any more: what waits now is refused at its next attempt
// where no proxy listens by then. The kernel takes the rows away with the socket.
func (g *Gate) Close() error { return g.holder.Close() }
