// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
)

// eachProxyID calls do with the key of every proxy ID whose bit is set.
func eachProxyID(cookie uint64, proxyIDs uint8, do func(key bpfProxyKey) error) error {
	for proxyID := range uint32(MaxProxies) {
		if proxyIDs>>proxyID&1 == 0 {
			continue
		}
		if err := do(bpfProxyKey{Cookie: cookie, Seat: proxyID}); err != nil {
			return err
		}
	}
	return nil
}

func proxyKey(cookie uint64, proxyID uint8) bpfProxyKey {
	return bpfProxyKey{Cookie: cookie, Seat: uint32(proxyID)}
}

// deleteProxies forgets the proxies that sat there.
func (m *tables) deleteProxies(cookie uint64, proxyIDs uint8) error {
	return eachProxyID(cookie, proxyIDs, func(key bpfProxyKey) error { return m.delete("proxies", key) })
}

// proxyState is what the kernel learned of a workload's proxy.
func (m *tables) proxyState(cookie uint64, proxyID uint8) (bpfProxy, error) {
	var proxy bpfProxy
	if _, err := m.get("proxies", proxyKey(cookie, proxyID), &proxy); err != nil {
		return proxy, err
	}
	return proxy, nil
}

// deleteListeners takes the sockets out that are still open. They leave by
// themselves when they close, so the proxies' rows say whether there are any.
func (m *tables) deleteListeners(cookie uint64, applied *Workload) error {
	if applied == nil {
		return m.deleteListenersOn(cookie, nil)
	}
	for _, port := range applied.ports() {
		proxy, err := m.proxyState(cookie, port.proxyID)
		if err != nil {
			return err
		}
		if proxy.Cgroup == 0 {
			continue
		}
		four, six := listenerRoles(port)
		for _, role := range []bpfListenerRole{four, six} {
			for slot := range uint16(listenerSlots) {
				if err := m.delete("listeners", listenerKey(cookie, role, port.port, slot)); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// deleteListenersOn takes the listeners out that live on at other ports than these. It
// walks the table, which has a few rows a workload.
func (m *tables) deleteListenersOn(cookie uint64, ports []proxyPort) error {
	return deleteIf[bpfListenerKey, uint64](m, "listeners", func(k bpfListenerKey) bool {
		return k.Cookie == cookie && !slices.ContainsFunc(ports, func(p proxyPort) bool {
			four, six := listenerRoles(p)
			return p.port == k.Port && (k.Role == four || k.Role == six)
		})
	})
}

func listenerKey(cookie uint64, role bpfListenerRole, port, slot uint16) bpfListenerKey {
	return bpfListenerKey{Cookie: cookie, Role: role, Port: port, Slot: slot}
}

// registered returns the cookies of the sockets that hold the slots of a role
// on the port.
func (m *tables) registered(cookie uint64, role bpfListenerRole, port uint16) (map[uint16]uint64, error) {
	slots := make(map[uint16]uint64)
	for slot := range uint16(listenerSlots) {
		var socket uint64
		found, err := m.get("listeners", listenerKey(cookie, role, port, slot), &socket)
		if err != nil {
			return nil, fmt.Errorf("read listeners: %w", err)
		}
		if found {
			slots[slot] = socket
		}
	}
	return slots, nil
}

// served returns where listeners are registered: their keys, without the slot.
func (m *tables) served(cookie uint64, w Workload) (map[bpfListenerKey]bool, error) {
	found := make(map[bpfListenerKey]bool)
	for _, port := range w.ports() {
		four, six := listenerRoles(port)
		for _, role := range []bpfListenerRole{four, six} {
			slots, err := m.registered(cookie, role, port.port)
			if err != nil {
				return nil, err
			}
			if len(slots) > 0 {
				found[listenerKey(cookie, role, port.port, 0)] = true
			}
		}
	}
	return found, nil
}

func roleFlag(role bpfListenerRole) bpfProxyFlag {
	switch role {
	case bpfListenerRoleLISTENER_OUTBOUND4:
		return bpfProxyFlagPROXY_LISTENS4
	case bpfListenerRoleLISTENER_OUTBOUND6:
		return bpfProxyFlagPROXY_LISTENS6
	}
	return 0
}

// deleteRegistered lets the kernel learn a proxy anew once the one that user space
// took in has no listener left. The kernel does not count those, so it waits.
func (t *tables) deleteRegistered(cookie uint64, proxyID uint8, proxy bpfProxy, w Workload) (bpfProxy, error) {
	if proxy.Flags&bpfProxyFlagPROXY_PINNED == 0 {
		return proxy, nil
	}
	if any, err := t.anyListener(cookie, proxyID, w); err != nil || any {
		return proxy, err
	}
	return bpfProxy{}, t.put("proxies", proxyKey(cookie, proxyID), bpfProxy{}, ebpf.UpdateAny)
}

// deleteProxy takes every listener of the proxies in these proxy IDs out, and the
// proxies with them.
func (t *tables) deleteProxy(cookie uint64, proxyIDs []uint8, w Workload) error {
	var kept []proxyPort
	for _, port := range w.ports() {
		if !slices.Contains(proxyIDs, port.proxyID) {
			kept = append(kept, port)
		}
	}
	if err := t.deleteListenersOn(cookie, kept); err != nil {
		return err
	}
	for _, proxyID := range proxyIDs {
		if err := t.put("proxies", proxyKey(cookie, proxyID), bpfProxy{}, ebpf.UpdateAny); err != nil {
			return err
		}
	}
	return nil
}

// anyListener reports whether a listener is registered on whatever port that is
// not another proxy's.
func (t *tables) anyListener(cookie uint64, proxyID uint8, w Workload) (bool, error) {
	table, err := t.table("listeners")
	if err != nil {
		return false, err
	}
	var key bpfListenerKey
	var socket uint64
	rows := table.Iterate()
	for rows.Next(&key, &socket) {
		if key.Cookie != cookie {
			continue
		}
		if port, ok := w.portOf(key.Port); !ok || port.proxyID == proxyID {
			return true, nil
		}
	}
	if err := rows.Err(); err != nil {
		return false, fmt.Errorf("walk listeners: %w", err)
	}
	return false, nil
}

func (t *tables) missingFrom(cookie uint64, roles []bpfListenerRole, port uint16, socket uint64) (missing []bpfListenerRole, err error) {
	for _, role := range roles {
		slots, err := t.registered(cookie, role, port)
		if err != nil {
			return nil, err
		}
		there := false
		for _, registered := range slots {
			there = there || registered == socket
		}
		if !there {
			missing = append(missing, role)
		}
	}
	return missing, nil
}

// registerListener puts a socket into the first free slot of each role.
func (t *tables) registerListener(cookie uint64, roles []bpfListenerRole, port uint16, fd int) error {
	for _, role := range roles {
		var err error
		for slot := range uint16(listenerSlots) {
			err = t.put("listeners", listenerKey(cookie, role, port, slot), uint64(fd), ebpf.UpdateNoExist)
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

// listenersOf are the cookies of a proxy's registered listeners, with what each
// says of the families that it takes.
func (t *tables) listenersOf(cookie uint64, proxyID uint8, w Workload) (map[uint64]bpfProxyFlag, error) {
	found := make(map[uint64]bpfProxyFlag)
	for _, port := range w.ports() {
		if port.proxyID != proxyID {
			continue
		}
		four, six := listenerRoles(port)
		for _, role := range []bpfListenerRole{four, six} {
			slots, err := t.registered(cookie, role, port.port)
			if err != nil {
				return nil, err
			}
			for _, socket := range slots {
				found[socket] |= roleFlag(role)
			}
		}
	}
	return found, nil
}

// roles are those of a listener on the port, by family.
func listenerRoles(p proxyPort) (four, six bpfListenerRole) {
	if p.outbound {
		return bpfListenerRoleLISTENER_OUTBOUND4, bpfListenerRoleLISTENER_OUTBOUND6
	}
	return bpfListenerRoleLISTENER_INBOUND4, bpfListenerRoleLISTENER_INBOUND6
}
