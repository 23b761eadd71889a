// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"
)

// RejectedListener is a socket that listens on a port of a workload's proxy and
// gets none of the proxy's connections, because it is not told to be the proxy's.
type RejectedListener struct {
	Address netip.AddrPort
	UID     uint32 // of whoever made it
	Usable  bool   // its address is one that connections can be sent to
	// Of a process that has it; 0 and empty where none is found.
	PID     int
	Command string
	Cgroup  string // path, as /proc/<pid>/cgroup has it
}

// ProxyPorts say where the proxies of a workload should listen, and do not.
type ProxyPorts struct {
	UID     uint32   // that they have
	Missing []uint16 // without a registered listener
}

// RejectedListeners returns the ports of a workload's proxies without a listener,
// and the sockets on their ports that are not registered. It takes no lock, and
// walks the processes of the node once for each socket.
func (d *Datapath) RejectedListeners(key AttachmentID) (ports ProxyPorts, list []RejectedListener, err error) {
	fail := func(err error) (ProxyPorts, []RejectedListener, error) {
		return ports, nil, fmt.Errorf("look at listeners of workload %s: %w", key, err)
	}
	r, err := d.paths.readRecord(key)
	if err != nil {
		return fail(err)
	}
	tables, err := openTables(d.paths.maps())
	if err != nil {
		return fail(err)
	}
	defer tables.Close()
	ns, err := openNamespaceOf(r)
	if err != nil {
		return fail(err)
	}
	defer ns.Close()
	w := r.desired()
	ports.UID = w.ProxyUID
	registered := make(map[uint64]bool)
	for _, port := range w.ports() {
		if port.outbound && w.Mode != ModeTransparent {
			continue // the default, which nothing is redirected to
		}
		four, six := listenerRoles(port)
		before := len(registered)
		for _, role := range []bpfListenerRole{four, six} {
			slots, err := tables.registered(r.Cookie, role, port.port)
			if err != nil {
				return fail(err)
			}
			for _, socket := range slots {
				registered[socket] = true
			}
		}
		if len(registered) == before {
			ports.Missing = append(ports.Missing, port.port)
		}
	}
	sockets, err := ns.listening()
	if err != nil {
		return fail(err)
	}
	for _, s := range sockets {
		if _, ok := w.portOf(s.port); !ok || registered[s.cookie] {
			continue
		}
		_, roles := socketRoles(s, w)
		rejected := RejectedListener{Address: netip.AddrPortFrom(s.addr, s.port), UID: s.uid, Usable: len(roles) > 0}
		err := ns.eachOwner(s.inode, func(pid, _ int) (bool, error) {
			rejected.PID, rejected.Command, rejected.Cgroup = pid, commandOf(pid), ""
			if path, _, err := cgroupOfProcess(strconv.Itoa(pid)); err == nil {
				rejected.Cgroup = path
			}
			return true, nil
		})
		if err != nil && !errors.Is(err, errNoOwner) {
			return fail(err)
		}
		list = append(list, rejected)
	}
	return ports, list, nil
}
