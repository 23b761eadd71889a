// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"os"
	"slices"

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
	ports    []uint16 // outbound, of the proxies in transparent mode
	holder   *os.File

	upstreams map[uint16]bool // ports on which an explicit upstream is to listen
}

// GateState is how a gate stands.
type GateState struct {
	Listens bool            // all that it holds for is there: nothing is held any more
	Waiting map[uint64]bool // cookies of the sockets that wait now
}

// OpenGate makes a gate for a workload, until Close. In transparent mode it holds what
// is redirected; Hold adds explicit upstreams, in any mode. It takes no lock.
func (d *Datapath) OpenGate(key workload.AttachmentID) (*Gate, error) {
	fail := func(err error) (*Gate, error) { return nil, fmt.Errorf("open gate of %s: %w", key, err) }
	r, ns, err := d.openWorkload(key)
	if err != nil {
		return fail(err)
	}
	defer ns.Close()
	g := &Gate{datapath: d, key: key, cookie: r.Cookie, upstreams: make(map[uint16]bool)}
	for _, port := range r.Desired().MeshPorts() {
		if port.Outbound && r.Request.Mode == workload.ModeTransparent {
			g.ports = append(g.ports, port.Port)
		}
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
	tables, err := bpfmap.OpenTables(g.datapath.paths.Maps())
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
	tables, err := bpfmap.OpenTables(g.datapath.paths.Maps())
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
	_, ns, err := g.datapath.openWorkload(g.key)
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
func (g *Gate) Look() (state GateState, err error) {
	fail := func(err error) (GateState, error) { return state, fmt.Errorf("look at gate of %s: %w", g.key, err) }
	_, ns, err := g.datapath.openWorkload(g.key)
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
		holds, err := tables.GateHolds(g.cookie, port, false)
		if err != nil {
			return fail(err)
		}
		state.Listens, whole = state.Listens && listens, whole && holds
	}
	for port := range g.upstreams {
		holds, err := tables.GateHolds(g.cookie, port, true)
		if err != nil {
			return fail(err)
		}
		state.Listens = state.Listens && !holds
	}
	if state.Listens || whole {
		return state, nil
	}
	return state, g.register()
}

// Close lets nothing wait any more: what waits now is refused at its next attempt
// where no proxy listens by then. The kernel takes the rows away with the socket.
func (g *Gate) Close() error { return g.holder.Close() }
