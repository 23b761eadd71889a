// SPDX-License-Identifier: MPL-2.0

package bpfmap

import (
	"errors"
	"time"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/workload"
	"golang.org/x/sys/unix"
)

// newGeneration returns a number that no set of rows on this node had before:
// the monotonic clock under the node's lock.
func newGeneration() uint64 {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return uint64(time.Now().UnixNano())
	}
	return uint64(now.Nano())
}

// Generation returns which generation of the workload is in force; 0 for none.
func (m *Tables) Generation(cookie uint64) (uint64, error) {
	var row BpfWorkload
	if _, err := m.Get("workloads", cookie, &row); err != nil {
		return 0, err
	}
	return row.Generation, nil
}

// WriteRows puts the rows of w in force. Each step leaves a state that is
// right for connections: the flip in `workloads`, the last one, is the only
// one they notice. The previous rows stay, in force where it fails.
func (m *Tables) WriteRows(cookie uint64, w workload.Workload, ipv6 bool) error {
	generation := newGeneration()
	fresh := EncodeRows(w, cookie, generation, ipv6)
	err := m.PutRows(fresh, cookie, generation)
	if err == nil {
		err = m.Put("workloads", cookie, BpfWorkload{Generation: generation}, ebpf.UpdateAny)
	}
	if err != nil {
		return errors.Join(err, m.DeleteRows(fresh, cookie, generation))
	}
	return nil
}

// PutRows writes a generation that is not in force yet.
func (m *Tables) PutRows(fresh rows, cookie, generation uint64) error {
	for _, put := range []func() error{
		func() error { return putAll(m, "exclusions", fresh.exclusions) },
		func() error { return putAll(m, "ports", fresh.ports) },
		func() error { return putAll(m, "addresses", fresh.addresses) },
		func() error { return putAll(m, "cidrs", fresh.cidrs) },
		func() error { return putAll(m, "sources", fresh.sources) },
	} {
		if err := put(); err != nil {
			return err
		}
	}
	if err := m.Put("configs", BpfConfigKey{Cookie: cookie, Generation: generation}, fresh.config, ebpf.UpdateAny); err != nil {
		return err
	}
	return m.ensureShared(cookie, fresh.config.Seats)
}

func putAll[K, V comparable](m *Tables, name string, rows map[K]V) error {
	for key, row := range rows {
		if err := m.Put(name, key, row, ebpf.UpdateAny); err != nil {
			return err
		}
	}
	return nil
}

// hasAll reports whether the table has all of these rows.
func hasAll[K, V comparable](m *Tables, name string, rows map[K]V) (bool, error) {
	for key, wanted := range rows {
		var row V
		if found, err := m.Get(name, key, &row); err != nil || !found || row != wanted {
			return false, err
		}
	}
	return true, nil
}

func dropAll[K, V comparable](m *Tables, name string, rows map[K]V) error {
	for key := range rows {
		if err := m.Delete(name, key); err != nil {
			return err
		}
	}
	return nil
}

// ensureShared makes the rows that the programs write to. They outlive every
// generation, so what is there stays.
func (m *Tables) ensureShared(cookie uint64, proxyIDs uint8) error {
	budget, released, err := m.recount(cookie)
	if err != nil {
		return err
	}
	// The budget first, and last when they go: by it the rest is found where a process
	// died in between.
	for _, shared := range []struct {
		name string
		row  any
	}{{"budgets", budget}, {"releases", released}, {"verdicts", BpfVerdictCounts{}}} {
		if err := m.Put(shared.name, cookie, shared.row, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return err
		}
	}
	return EachProxyID(cookie, proxyIDs, func(key BpfProxyKey) error {
		if err := m.Put("proxies", key, BpfProxy{}, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
			return err
		}
		return nil
	})
}

// HasRows reports whether the rows in force are exactly those of w.
func (m *Tables) HasRows(cookie uint64, w workload.Workload, ipv6 bool) (bool, error) {
	generation, err := m.Generation(cookie)
	if err != nil || generation == 0 {
		return false, err
	}
	want := EncodeRows(w, cookie, generation, ipv6)
	var config BpfConfig
	if found, err := m.Get("configs", BpfConfigKey{Cookie: cookie, Generation: generation}, &config); err != nil || !found || config != want.config {
		return false, err
	}
	for _, has := range []func() (bool, error){
		func() (bool, error) { return hasAll(m, "exclusions", want.exclusions) },
		func() (bool, error) { return hasAll(m, "ports", want.ports) },
		func() (bool, error) { return hasAll(m, "addresses", want.addresses) },
		func() (bool, error) { return hasAll(m, "cidrs", want.cidrs) },
		func() (bool, error) { return hasAll(m, "sources", want.sources) },
	} {
		if all, err := has(); err != nil || !all {
			return false, err
		}
	}
	missing := false
	err = EachProxyID(cookie, want.config.Seats, func(key BpfProxyKey) error {
		var row BpfProxy
		found, err := m.Get("proxies", key, &row)
		missing = missing || !found
		return err
	})
	if err != nil || missing {
		return false, err
	}
	for name, row := range map[string]any{"budgets": new(BpfBudget), "verdicts": new(BpfVerdictCounts), "releases": new(uint32)} {
		if found, err := m.Get(name, cookie, row); err != nil || !found {
			return false, err
		}
	}
	return true, nil
}

// recount returns what a workload's budget is, also where its rows were lost
// and the indexes that it gave out were not: an index must not be given twice,
// nor be left behind.
func (m *Tables) recount(cookie uint64) (budget BpfBudget, released uint32, err error) {
	generation, err := m.Generation(cookie)
	if err != nil || generation == 0 {
		return budget, 0, err
	}
	hasBudget, err := m.Get("budgets", cookie, &budget)
	if err != nil {
		return budget, 0, err
	}
	hasReleased, err := m.Get("releases", cookie, &released)
	if err != nil || hasBudget && hasReleased {
		return budget, released, err
	}
	var held, last uint32
	err = Walk(m, "indexes", func(key BpfIndexKey, _ BpfAddr) error {
		if key.Cookie == cookie {
			held, last = held+1, max(last, key.Index)
		}
		return nil
	})
	if err != nil {
		return budget, 0, err
	}
	if hasBudget {
		return budget, budget.Used - held, nil
	}
	return BpfBudget{Next: last, Used: released + held}, released, nil
}

func (m *Tables) DeleteRows(stale rows, cookie, generation uint64) error {
	err := errors.Join(
		dropAll(m, "exclusions", stale.exclusions),
		dropAll(m, "ports", stale.ports),
		dropAll(m, "addresses", stale.addresses),
		dropAll(m, "cidrs", stale.cidrs),
		dropAll(m, "sources", stale.sources),
	)
	if err != nil {
		return err
	}
	return m.Delete("configs", BpfConfigKey{Cookie: cookie, Generation: generation})
}

// DeleteStale removes every generation of the workload but the one in force,
// which is w's, or none. It walks the tables, and is for what a killed process
// left behind.
func (m *Tables) DeleteStale(cookie uint64, w *workload.Workload) error {
	current, err := m.Generation(cookie)
	if err != nil {
		return err
	}
	var ports []workload.ProxyPort
	vacant := ^uint8(0)
	if w != nil {
		ports, vacant = w.Ports(), ^w.TakenProxyIDs()
	}
	scope := EncodeCIDR(workload.EncodedPrefix4, cookie, current).Scope
	staleCIDR := func(k BpfCidrKey) bool {
		return [2]uint32(k.Scope[:2]) == [2]uint32(scope[:2]) && k.Scope != scope
	}
	return errors.Join(
		DeleteIf[BpfExclusionKey, uint32](m, "exclusions", func(k BpfExclusionKey) bool { return k.Cookie == cookie && k.Generation != current }),
		DeleteIf[BpfExclusionKey, BpfPorts](m, "ports", func(k BpfExclusionKey) bool { return k.Cookie == cookie && k.Generation != current }),
		DeleteIf[BpfAddressKey, BpfAddress](m, "addresses", func(k BpfAddressKey) bool { return k.Cookie == cookie && k.Generation != current }),
		DeleteIf[BpfCidrKey, uint32](m, "cidrs", staleCIDR),
		DeleteIf[BpfCidrKey, uint32](m, "sources", staleCIDR),
		DeleteIf[BpfConfigKey, BpfConfig](m, "configs", func(k BpfConfigKey) bool { return k.Cookie == cookie && k.Generation != current }),
		m.DeleteListenersOn(cookie, ports),
		m.DeleteProxies(cookie, vacant),
	)
}

// ReaderWait is how a change waits for programs that still read the old rows.
type ReaderWait string

// The two ways; the kernel is asked which one there is.
const (
	BarrierKernel ReaderWait = "membarrier" // exact (Linux 4.3)
	BarrierTime   ReaderWait = "time"       // a wait of many times a program run: a kernel with nohz_full has no other
)

// membarrier(2): MEMBARRIER_CMD_QUERY and MEMBARRIER_CMD_GLOBAL.
const (
	membarrierQuery  = 0
	membarrierGlobal = 1
)

func DetectReaderWait() ReaderWait {
	commands, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierQuery, 0, 0)
	if errno != 0 || commands&membarrierGlobal == 0 {
		return BarrierTime
	}
	return BarrierKernel
}

// WaitForReaders returns when every program run that began before it has
// ended: programs run in RCU read sections, and membarrier waits for those.
func WaitForReaders() {
	if DetectReaderWait() == BarrierKernel {
		if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, membarrierGlobal, 0, 0); errno == 0 {
			return
		}
	}
	time.Sleep(100 * time.Millisecond)
}
