// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/pin"
	"github.com/weirmesh/weir/redirect"
	"golang.org/x/sys/unix"
)

// memory measures what many redirected namespaces cost the kernel beyond what
// the namespaces cost without, and what the node pays once.
func (b *bench) memory() measurement {
	return measurement{
		name: "memory", about: fmt.Sprintf("kernel memory of %d workloads", b.size.workloads), rounds: b.size.heavy,
		variants: []string{weir, consul, nftables},
		rows: []row{
			{ID: "memory.workload", Name: "kernel memory per workload, all of it", Unit: "KiB", target: atMost(12, "KiB")},
			{ID: "memory.objects", Name: "of it in BPF maps and programs", Unit: "KiB", target: atMost(12, "KiB")},
			{ID: "memory.node", Name: "the node's shared part, all of it", Unit: "KiB", target: atMost(12<<10, "KiB")},
			{ID: "memory.tables", Name: "of it in BPF maps and programs", Unit: "KiB"},
		},
		run: b.memoryOnce,
	}
}

func (b *bench) memoryOnce(ctx context.Context, name string) (got figures, err error) {
	var sites []*site
	defer func() {
		for _, s := range sites {
			err = errors.Join(err, s.close())
		}
		err = errors.Join(err, b.settle(ctx))
	}()
	count, install := b.size.workloads, map[string]func(*site) error{consul: installConsul, nftables: b.installNFTables}[name]
	if install != nil {
		count = b.size.engines
	}
	for range count {
		s, err := newBareSite(b.netns, b.nextName(), netip.MustParseAddr(insideAddr))
		if err != nil {
			return nil, err
		}
		sites = append(sites, s)
	}
	each := float64(count)
	if install != nil {
		used, err := memoryOf(ctx, func() error {
			for _, s := range sites {
				if err := install(s); err != nil {
					return err
				}
			}
			return nil
		})
		return figures{"memory.workload": kibibytes(used) / each}, err
	}

	node, err := memoryOf(ctx, b.load)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.unload()) }()
	tables, err := objectMemory(b.paths.PinDir)
	if err != nil {
		return nil, err
	}
	defer func() {
		for _, s := range sites {
			err = errors.Join(err, redirect.New(b.paths).Remove(key(s)))
		}
	}()
	used, err := memoryOf(ctx, func() error {
		for _, s := range sites {
			if err := redirect.New(b.paths).Add(attachment(s)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	all, err := objectMemory(b.paths.PinDir)
	return figures{
		"memory.workload": kibibytes(used) / each,
		"memory.objects":  kibibytes(all-tables) / each,
		"memory.node":     kibibytes(node),
		"memory.tables":   kibibytes(tables),
	}, err
}

// memoryOf is how many bytes more the kernel uses after f, without its caches.
func memoryOf(ctx context.Context, f func() error) (int64, error) {
	measure := func() (int64, error) {
		unix.Sync()
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			return 0, fmt.Errorf("drop caches: %w", err)
		}
		return steadyMemory(ctx)
	}
	before, err := measure()
	if err != nil {
		return 0, err
	}
	if err := f(); err != nil {
		return 0, err
	}
	after, err := measure()
	return after - before, err
}

// objectMemory is what the kernel charges for all maps and programs that are
// pinned below dir, or that a pinned link or program there keeps alive.
func objectMemory(dir string) (total int64, err error) {
	maps, programs := map[ebpf.MapID]bool{}, map[ebpf.ProgramID]bool{}
	for pinned, err := range pin.WalkDir(dir, nil) {
		if err != nil {
			return 0, fmt.Errorf("walk pins: %w", err)
		}
		switch object := pinned.Object.(type) {
		case *ebpf.Map:
			info, err := object.Info()
			if err != nil {
				return 0, fmt.Errorf("get info of %s: %w", pinned.Path, err)
			}
			if id, ok := info.ID(); ok {
				maps[id] = true
			}
		case *ebpf.Program:
			info, err := object.Info()
			if err != nil {
				return 0, fmt.Errorf("get info of %s: %w", pinned.Path, err)
			}
			if id, ok := info.ID(); ok {
				programs[id] = true
			}
		case link.Link:
			info, err := object.Info()
			if err != nil {
				return 0, fmt.Errorf("get info of %s: %w", pinned.Path, err)
			}
			programs[info.Program] = true
		}
	}
	for id := range programs {
		size, uses, err := programMemory(id)
		if err != nil {
			return 0, err
		}
		total += size
		for _, id := range uses {
			maps[id] = true
		}
	}
	for id := range maps {
		size, err := mapMemory(id)
		if err != nil {
			return 0, err
		}
		total += size
	}
	return total, nil
}

func programMemory(id ebpf.ProgramID) (size int64, uses []ebpf.MapID, err error) {
	program, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return 0, nil, fmt.Errorf("open program %d: %w", id, err)
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		return 0, nil, fmt.Errorf("get info of program %d: %w", id, err)
	}
	charged, ok := info.Memlock()
	if !ok {
		return 0, nil, fmt.Errorf("get memory of program %d: the kernel does not say", id)
	}
	uses, _ = info.MapIDs()
	return int64(charged), uses, nil
}

func mapMemory(id ebpf.MapID) (int64, error) {
	m, err := ebpf.NewMapFromID(id)
	if err != nil {
		return 0, fmt.Errorf("open map %d: %w", id, err)
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return 0, fmt.Errorf("get info of map %d: %w", id, err)
	}
	charged, _ := info.Memlock() // an empty trie or hash may truly have none
	return int64(charged), nil
}

func kibibytes(bytes int64) float64 { return float64(bytes) / 1024 }
