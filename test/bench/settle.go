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
// threads of its own: until the machine is idle, or for half a second when
// something else keeps it busy.
func settle(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
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

// freeMemory counts the pages that nobody uses, those that wait in the lists
// of single CPUs included, and returns their size in bytes.
func freeMemory() (int64, error) {
	file, err := os.Open("/proc/zoneinfo")
	if err != nil {
		return 0, err
	}
	defer file.Close()
	var pages int64
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) == 2 && (fields[0] == "nr_free_pages" || fields[0] == "count:") {
			n, err := strconv.ParseInt(fields[1], 10, 64)
			if err != nil {
				return 0, fmt.Errorf("parse /proc/zoneinfo: %w", err)
			}
			pages += n
		}
	}
	return pages * int64(os.Getpagesize()), lines.Err()
}
