// SPDX-License-Identifier: MPL-2.0

package maintain

import (
	"context"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/wait"
	"golang.org/x/sys/unix"
)

// releaseInterval is how often the agent gives back memory that it does not use.
const releaseInterval = time.Minute

// releaseMemory does so until ctx ends. A calm agent makes so little garbage that its
// collector would have no reason to run for minutes, and keeps for itself what its last
// burst took, which is as much again as what it needs.
func releaseMemory(ctx context.Context) {
	var err error
	for {
		if _, alive := wait.Pause(ctx, releaseInterval, nil); !alive {
			return
		}
		debug.FreeOSMemory()
		if err == nil { // else this kernel does not let it be done
			err = releaseCodeOnce()
		}
	}
}

// releaseCodeOnce unmaps the pages of the program's own file: two thirds of what is resident
// of a calm agent, and most of it only its start needed. They are in the kernel's cache, and
// those that are used come back by themselves. A mapping that somebody wrote to is left alone.
func releaseCodeOnce() error {
	own, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	mappings, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return err
	}
	// 00400000-00d3a000 r-xp 00000000 fe:00 396041                             /usr/bin/weir
	// Size:               9448 kB
	var start, end uintptr
	for line := range strings.Lines(string(mappings)) {
		fields := strings.Fields(line)
		switch {
		case len(fields) >= 6 && strings.Contains(fields[0], "-"):
			start = 0
			if _, path, _ := strings.Cut(line, fields[4]+" "); strings.TrimSpace(path) == own && !strings.Contains(fields[1], "w") {
				if _, err := fmt.Sscanf(fields[0], "%x-%x", &start, &end); err != nil {
					return fmt.Errorf("read mapping %q: %w", fields[0], err)
				}
			}
		case start != 0 && fields[0] == "Anonymous:" && fields[1] == "0":
			if _, _, errno := unix.Syscall(unix.SYS_MADVISE, start, end-start, unix.MADV_DONTNEED); errno != 0 {
				return fmt.Errorf("release code: %w", errno)
			}
		}
	}
	return nil
}
