// SPDX-License-Identifier: MPL-2.0

package bpfmap

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/workload"
)

// EachProxyID calls do with the key of every proxy ID whose bit is set.
func EachProxyID(cookie uint64, proxyIDs uint8, do func(key BpfProxyKey) error) error {
	for proxyID := range uint32(workload.MaxProxies) {
		if proxyIDs>>proxyID&1 == 0 {
			continue
		}
		if err := do(BpfProxyKey{Cookie: cookie, Seat: proxyID}); err != nil {
			return err
		}
	}
	return nil
}

func ProxyKey(cookie uint64, proxyID uint8) BpfProxyKey {
	return BpfProxyKey{Cookie: cookie, Seat: uint32(proxyID)}
}

// DeleteProxies forgets the proxies that sat there.
func (m *Tables) DeleteProxies(cookie uint64, proxyIDs uint8) error {
	return EachProxyID(cookie, proxyIDs, func(key BpfProxyKey) error { return m.Delete("proxies", key) })
}

// ProxyState is what the kernel learned of a workload's proxy.
func (m *Tables) ProxyState(cookie uint64, proxyID uint8) (BpfProxy, error) {
	var proxy BpfProxy
	if _, err := m.Get("proxies", ProxyKey(cookie, proxyID), &proxy); err != nil {
		return proxy, err
	}
	return proxy, nil
}

// deleteListeners takes the sockets out that are still open. They leave by
// themselves when they close, so the proxies' rows say whether there are any.
func (m *Tables) deleteListeners(cookie uint64, applied *workload.Workload) error {
	if applied == nil {
		return m.DeleteListenersOn(cookie, nil)
	}
	for _, port := range applied.Ports() {
		if err := m.Delete("listeners", GateKey(cookie, port.Port, false)); err != nil {
			return err
		}
		proxy, err := m.ProxyState(cookie, port.ProxyID)
		if err != nil {
			return err
		}
		if proxy.Cgroup == 0 {
			continue
		}
		four, six := ListenerRoles(port)
		for _, role := range []BpfListenerRole{four, six} {
			for slot := range uint16(ListenerSlots) {
				if err := m.Delete("listeners", ListenerKey(cookie, role, port.Port, slot)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// DeleteListenersOn takes the listeners of a workload out that live on at other ports
// than these.
func (m *Tables) DeleteListenersOn(cookie uint64, ports []workload.ProxyPort) error {
	return m.DeleteListenersBut(map[uint64][]workload.ProxyPort{cookie: ports})
}

// DeleteListenersBut does so for many workloads, each with the ports that it keeps. It
// walks the table, which has a few rows a workload, once.
func (m *Tables) DeleteListenersBut(kept map[uint64][]workload.ProxyPort) error {
	return DeleteIf[BpfListenerKey, uint64](m, "listeners", func(k BpfListenerKey) bool {
		ports, concerned := kept[k.Cookie]
		if !concerned || k.Role == BpfListenerRoleLISTENER_UPSTREAM && ports != nil {
			return false // a gate's goes with the first listener, or with the gate
		}
		return !slices.ContainsFunc(ports, func(p workload.ProxyPort) bool {
			four, six := ListenerRoles(p)
			return p.Port == k.Port && (k.Role == four || k.Role == six)
		})
	})
}

func ListenerKey(cookie uint64, role BpfListenerRole, port, slot uint16) BpfListenerKey {
	return BpfListenerKey{Cookie: cookie, Role: role, Port: port, Slot: slot}
}

// Registered returns the cookies of the sockets that hold the slots of a role
// on the port.
func (m *Tables) Registered(cookie uint64, role BpfListenerRole, port uint16) (map[uint16]uint64, error) {
	if m.listeners != nil {
		return m.listeners[ListenerKey(cookie, role, port, 0)], nil
	}
	slots := make(map[uint16]uint64)
	for slot := range uint16(ListenerSlots) {
		var socket uint64
		found, err := m.Get("listeners", ListenerKey(cookie, role, port, slot), &socket)
		if err != nil {
			return nil, fmt.Errorf("read listeners: %w", err)
		}
		if found {
			slots[slot] = socket
		}
	}
	return slots, nil
}

// RememberListeners reads the table of listeners once, for who looks at many workloads:
// Registered answers from it, and asks for the slots of none of them any more, of which
// each role of each port has as many as a proxy may have workers.
func (m *Tables) RememberListeners() error {
	table, err := m.Table("listeners")
	if err != nil {
		return err
	}
	found := make(map[BpfListenerKey]map[uint16]uint64)
	var key BpfListenerKey
	var socket uint64
	rows := table.Iterate()
	for rows.Next(&key, &socket) {
		if key.Slot == GateSlot {
			continue
		}
		place := ListenerKey(key.Cookie, key.Role, key.Port, 0)
		if found[place] == nil {
			found[place] = make(map[uint16]uint64)
		}
		found[place][key.Slot] = socket
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("walk listeners: %w", err)
	}
	m.listeners = found
	return nil
}

// GateKey is the place of a gate for what is sent to the port: the outbound one of a
// proxy, or that of an explicit upstream.
func GateKey(cookie uint64, port uint16, upstream bool) BpfListenerKey {
	if upstream {
		return ListenerKey(cookie, BpfListenerRoleLISTENER_UPSTREAM, port, GateSlot)
	}
	return ListenerKey(cookie, BpfListenerRoleLISTENER_OUTBOUND4, port, GateSlot)
}

// GateHolds reports whether a gate holds what is sent to the port.
func (m *Tables) GateHolds(cookie uint64, port uint16, upstream bool) (bool, error) {
	var socket uint64
	return m.Get("listeners", GateKey(cookie, port, upstream), &socket)
}

// Served returns where listeners are registered: their keys, without the slot.
func (m *Tables) Served(cookie uint64, w workload.Workload) (map[BpfListenerKey]bool, error) {
	found := make(map[BpfListenerKey]bool)
	for _, port := range w.Ports() {
		four, six := ListenerRoles(port)
		for _, role := range []BpfListenerRole{four, six} {
			slots, err := m.Registered(cookie, role, port.Port)
			if err != nil {
				return nil, err
			}
			if len(slots) > 0 {
				found[ListenerKey(cookie, role, port.Port, 0)] = true
			}
		}
	}
	return found, nil
}

func RoleFlag(role BpfListenerRole) BpfProxyFlag {
	switch role {
	case BpfListenerRoleLISTENER_OUTBOUND4:
		return BpfProxyFlagPROXY_LISTENS4
	case BpfListenerRoleLISTENER_OUTBOUND6:
		return BpfProxyFlagPROXY_LISTENS6
	}
	return 0
}

// DeleteRegistered lets the kernel learn a proxy anew once the one that user space
// took in has no listener left. The kernel does not count those, so it waits.
func (m *Tables) DeleteRegistered(cookie uint64, proxyID uint8, proxy BpfProxy, w workload.Workload) (BpfProxy, error) {
	if proxy.Flags&BpfProxyFlagPROXY_PINNED == 0 {
		return proxy, nil
	}
	if listens, err := m.anyListener(cookie, proxyID, w); err != nil || listens {
		return proxy, err
	}
	return BpfProxy{}, m.Put("proxies", ProxyKey(cookie, proxyID), BpfProxy{}, ebpf.UpdateAny)
}

// DeleteProxy takes every listener of the proxies in these proxy IDs out, and the
// proxies with them.
func (m *Tables) DeleteProxy(cookie uint64, proxyIDs []uint8, w workload.Workload) error {
	var kept []workload.ProxyPort
	for _, port := range w.Ports() {
		if !slices.Contains(proxyIDs, port.ProxyID) {
			kept = append(kept, port)
		}
	}
	if err := m.DeleteListenersOn(cookie, kept); err != nil {
		return err
	}
	for _, proxyID := range proxyIDs {
		if err := m.Put("proxies", ProxyKey(cookie, proxyID), BpfProxy{}, ebpf.UpdateAny); err != nil {
			return err
		}
	}
	return nil
}

// anyListener reports whether a listener is registered on whatever port that is
// not another proxy's.
func (m *Tables) anyListener(cookie uint64, proxyID uint8, w workload.Workload) (bool, error) {
	table, err := m.Table("listeners")
	if err != nil {
		return false, err
	}
	var key BpfListenerKey
	var socket uint64
	rows := table.Iterate()
	for rows.Next(&key, &socket) {
		if key.Cookie != cookie || key.Slot == GateSlot {
			continue
		}
		if port, ok := w.PortOf(key.Port); !ok || port.ProxyID == proxyID {
			return true, nil
		}
	}
	if err := rows.Err(); err != nil {
		return false, fmt.Errorf("walk listeners: %w", err)
	}
	return false, nil
}

// MissingFrom are those of the roles for which the socket is not registered. It mostly
// has one of the first slots, so they are asked in turn.
func (m *Tables) MissingFrom(cookie uint64, roles []BpfListenerRole, port uint16, socket uint64) (missing []BpfListenerRole, err error) {
	for _, role := range roles {
		there := false
		for slot := range uint16(ListenerSlots) {
			var registered uint64
			if _, err := m.Get("listeners", ListenerKey(cookie, role, port, slot), &registered); err != nil {
				return nil, fmt.Errorf("read listeners: %w", err)
			}
			if there = registered == socket; there {
				break
			}
		}
		if !there {
			missing = append(missing, role)
		}
	}
	return missing, nil
}

// RegisterListener puts a socket into the first free slot of each role.
func (m *Tables) RegisterListener(cookie uint64, roles []BpfListenerRole, port uint16, fd int) error {
	for _, role := range roles {
		var err error
		for slot := range uint16(ListenerSlots) {
			err = m.Put("listeners", ListenerKey(cookie, role, port, slot), uint64(fd), ebpf.UpdateNoExist)
			if !errors.Is(err, ebpf.ErrKeyExist) {
				break
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// ListenersOf are the cookies of a proxy's registered listeners, with what each
// says of the families that it takes.
func (m *Tables) ListenersOf(cookie uint64, proxyID uint8, w workload.Workload) (map[uint64]BpfProxyFlag, error) {
	found := make(map[uint64]BpfProxyFlag)
	for _, port := range w.Ports() {
		if port.ProxyID != proxyID {
			continue
		}
		four, six := ListenerRoles(port)
		for _, role := range []BpfListenerRole{four, six} {
			slots, err := m.Registered(cookie, role, port.Port)
			if err != nil {
				return nil, err
			}
			for _, socket := range slots {
				found[socket] |= RoleFlag(role)
			}
		}
	}
	return found, nil
}

// ListenerRoles are those of a listener on the port, by family.
func ListenerRoles(p workload.ProxyPort) (four, six BpfListenerRole) {
	if p.Outbound {
		return BpfListenerRoleLISTENER_OUTBOUND4, BpfListenerRoleLISTENER_OUTBOUND6
	}
	return BpfListenerRoleLISTENER_INBOUND4, BpfListenerRoleLISTENER_INBOUND6
}
