// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

// ticksPerSecond is the unit of /proc/PID/stat on every architecture that Linux
// has been built for in this century.
const ticksPerSecond = 100

// processCPU is what a process has spent in user space and in the kernel.
func processCPU(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	// The second field is the program's name, which may have blanks in it.
	_, rest, found := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest)
	if !found || len(fields) < 13 {
		return 0, fmt.Errorf("parse /proc/%d/stat: %q", pid, text)
	}
	var ticks uint64
	for _, field := range fields[11:13] { // utime, stime
		n, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("parse /proc/%d/stat: %w", pid, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / ticksPerSecond, nil
}

// processMemory is a process's resident memory now and at its most, in bytes.
func processMemory(pid int) (now, most int64, err error) {
	if now, err = procField(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Rss:"); err != nil {
		return 0, 0, err
	}
	most, err = procField(fmt.Sprintf("/proc/%d/status", pid), "VmHWM:")
	return now, most, err
}

// procField reads a size that the kernel gives in kB.
func procField(path, name string) (int64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] != name {
			continue
		}
		size, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("parse %s: %w", path, err)
		}
		return size << 10, nil
	}
	return 0, fmt.Errorf("parse %s: it has no %s", path, name)
}
