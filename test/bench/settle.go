// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// settle waits until the kernel has cleaned up behind a site, which it does in
// threads of its own: until the machine is idle, or as long as is worth it when
// something else keeps it busy.
func (b *bench) settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, b.size.settle)
	defer cancel()
	ticker := time.NewTicker(30 * time.Millisecond)
	defer ticker.Stop()
	busy, idle, err := cpuTicks()
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		nowBusy, nowIdle, err := cpuTicks()
		if err != nil {
			return err
		}
		if nowIdle > idle && nowBusy == busy {
			return nil
		}
		busy, idle = nowBusy, nowIdle
	}
}

// cpuTicks reads what all CPUs have spent, in the kernel's ticks of 10 ms.
func cpuTicks() (busy, idle uint64, err error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, 0, err
	}
	line, _, _ := strings.Cut(string(text), "\n")
	for i, field := range strings.Fields(line) {
		if i == 0 {
			continue // "cpu"
		}
		ticks, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("parse /proc/stat: %w", err)
		}
		switch i {
		case 4, 5: // idle, iowait
			idle += ticks
		case 8: // steal: somebody else's
		case 9, 10: // guest: counted in user already
		default:
			busy += ticks
		}
	}
	return busy, idle, nil
}

// kernelMemory is what the kernel uses for itself in bytes: slabs, memory of
// single CPUs, and virtually mapped memory without the stacks of threads. Page
// caches and the memory of processes are not in it, so that what else runs on
// the machine does not count.
func kernelMemory() (int64, error) {
	file, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	defer file.Close()
	signs := map[string]int64{"Slab:": 1, "Percpu:": 1, "VmallocUsed:": 1, "KernelStack:": -1}
	var total int64
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || signs[fields[0]] == 0 {
			continue
		}
		size, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("parse /proc/meminfo: %w", err)
		}
		total += signs[fields[0]] * size << 10
	}
	return total, lines.Err()
}

// steadyMemory waits until kernelMemory stands still, because namespaces that
// are gone are taken apart much later, and returns it. On a machine that never
// rests it gives up waiting after five seconds.
func steadyMemory(ctx context.Context) (int64, error) {
	const step, enough = 64 << 10, 10
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	last, still := int64(0), 0
	for {
		now, err := kernelMemory()
		if err != nil {
			return 0, err
		}
		if change := now - last; -step < change && change < step {
			still++
		} else {
			last, still = now, 0
		}
		if still == enough {
			return now, nil
		}
		select {
		case <-ctx.Done():
			return now, nil
		case <-ticker.C:
		}
	}
}
