// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"errors"
	"fmt"
	"net/netip"
	"strconv"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
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
func (d *Reader) RejectedListeners(key workload.AttachmentID) (ports ProxyPorts, list []RejectedListener, err error) {
	fail := func(err error) (ProxyPorts, []RejectedListener, error) {
		return ports, nil, fmt.Errorf("look at listeners of workload %s: %w", key, err)
	}
	r, err := d.paths.ReadRecord(key)
	if err != nil {
		return fail(err)
	}
	tables, err := bpfmap.OpenTables(d.paths.Maps())
	if err != nil {
		return fail(err)
	}
	defer tables.Close()
	ns, err := OpenNamespaceOf(r)
	if err != nil {
		return fail(err)
	}
	defer ns.Close()
	w := r.Desired()
	ports.UID = w.ProxyUID
	registered := make(map[uint64]bool)
	for _, port := range w.Ports() {
		if port.Outbound && w.Mode != workload.ModeTransparent {
			continue // the default, which nothing is redirected to
		}
		before := len(registered)
		if err := addRegistered(tables, r.Cookie, port, registered); err != nil {
			return fail(err)
		}
		if len(registered) == before {
			ports.Missing = append(ports.Missing, port.Port)
		}
	}
	if list, err = rejectedIn(ns, w, registered); err != nil {
		return fail(err)
	}
	return ports, list, nil
}

// addRegistered adds the sockets that are registered for a port, of both families.
func addRegistered(tables *bpfmap.Tables, cookie uint64, port workload.ProxyPort, sockets map[uint64]bool) error {
	four, six := bpfmap.ListenerRoles(port)
	for _, role := range []bpfmap.BpfListenerRole{four, six} {
		slots, err := tables.Registered(cookie, role, port.Port)
		if err != nil {
			return err
		}
		for _, socket := range slots {
			sockets[socket] = true
		}
	}
	return nil
}

// rejectedIn are the listeners on the proxies' ports that are not registered, with who has
// them open.
func rejectedIn(ns *host.Namespace, w workload.Workload, registered map[uint64]bool) (list []RejectedListener, err error) {
	sockets, err := ns.Listening()
	if err != nil {
		return nil, err
	}
	for _, s := range sockets {
		if _, ok := w.PortOf(s.Port); !ok || registered[s.Cookie] {
			continue
		}
		_, roles := SocketRoles(s, w)
		rejected := RejectedListener{Address: netip.AddrPortFrom(s.Addr, s.Port), UID: s.UID, Usable: len(roles) > 0}
		err := ns.EachOwner(s.Inode, func(pid, _ int) (bool, error) {
			rejected.PID, rejected.Command, rejected.Cgroup = pid, host.CommandOf(pid), ""
			if path, _, err := host.CgroupOfProcess(strconv.Itoa(pid)); err == nil {
				rejected.Cgroup = path
			}
			return true, nil
		})
		if err != nil && !errors.Is(err, host.ErrNoOwner) {
			return nil, err
		}
		list = append(list, rejected)
	}
	return list, nil
}

// SocketRoles is the test that weir_sockops makes on a new listener: which roles of
// the workload's proxies it can serve, and on which port of theirs.
func SocketRoles(s host.Socket, w workload.Workload) (port workload.ProxyPort, roles []bpfmap.BpfListenerRole) {
	port, ok := w.PortOf(s.Port)
	if !ok {
		return port, nil
	}
	mapped := s.Addr.Is4() || s.Addr.Is4In6()
	take4 := mapped || s.Addr.IsUnspecified() && !s.V6Only
	addr := s.Addr.Unmap()
	if port.Outbound && !addr.IsUnspecified() && addr != netip.AddrFrom4([4]byte{127, 0, 0, 1}) && addr != netip.IPv6Loopback() {
		return port, nil
	}
	if port.Exposed && addr.IsLoopback() {
		return port, nil // kept to the namespace
	}
	four, six := bpfmap.ListenerRoles(port)
	if take4 {
		roles = append(roles, four)
	}
	if !mapped {
		roles = append(roles, six)
	}
	return port, roles
}
