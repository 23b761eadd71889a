// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"fmt"
	"slices"
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
		four, six := port.roles()
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
			four, six := p.roles()
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
		four, six := port.roles()
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

// proxyStatus is what is known of each proxy, the first one first, and whether
// one of them shares its cgroup with tasks.
func (m *tables) proxyStatus(cookie uint64, w Workload) (list []ProxyStatus, shared bool, err error) {
	for i, p := range w.all() {
		proxy, err := m.proxyState(cookie, w.proxyID(i))
		if err != nil {
			return nil, false, err
		}
		status := ProxyStatus{
			Service: p.Service, UID: w.ProxyUID, Cgroup: proxy.Cgroup, Identity: IdentityUID, Inbound: p.InboundPort, Outbound: p.OutboundPort,
		}
		switch {
		case proxy.Flags&bpfProxyFlagPROXY_SHARED != 0:
			shared = true
		case proxy.Cgroup != 0:
			status.Identity = IdentityCgroup
		}
		sockets := make(map[uint64]bool)
		for _, port := range w.ports() {
			if port.proxyID != w.proxyID(i) {
				continue
			}
			four, six := port.roles()
			for _, role := range []bpfListenerRole{four, six} {
				slots, err := m.registered(cookie, role, port.port)
				if err != nil {
					return nil, false, err
				}
				for _, socket := range slots {
					sockets[socket] = true
				}
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
