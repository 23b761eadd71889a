// SPDX-License-Identifier: MPL-2.0

// Package runstats counts the time that programs run, where the kernel is asked to.
package runstats

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"golang.org/x/sys/unix"
)

// RunTime is what the kernel has counted of the programs of one name. It counts only
// while somebody has asked it to, see CountRunTime.
type RunTime struct {
	Name     string
	Programs int // one for each namespace, of those that are attached to namespaces
	Runs     uint64
	Time     time.Duration
}

// CountRunTime has the kernel count how often each program of the machine runs, and
// for how long, until the answer is closed: a read of the clock before and after each
// run. It wants CAP_SYS_ADMIN.
func CountRunTime() (io.Closer, error) {
	counting, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		return nil, fmt.Errorf("count the run time of programs: %w", err)
	}
	return counting, nil
}

// RunTimes returns what was counted of the node's programs so far, sorted by name. One
// that ends meanwhile is left out.
func RunTimes(paths store.Paths) (list []RunTime, err error) {
	counted := make(map[string]RunTime)
	for _, dir := range []string{paths.Links(), paths.Lookups(), paths.Filters()} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("list programs: %w", err)
		}
		for _, entry := range entries {
			name := entry.Name()
			if dir == paths.Lookups() {
				name = program.LookupName // the entry is the namespace's cookie
			}
			stats, err := statsOf(filepath.Join(dir, entry.Name()), dir != paths.Filters())
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("read run time of %s: %w", name, err)
			}
			sum := counted[name]
			counted[name] = RunTime{Name: name, Programs: sum.Programs + 1, Runs: sum.Runs + stats.RunCount, Time: sum.Time + stats.Runtime}
		}
	}
	for _, sum := range counted {
		list = append(list, sum)
	}
	slices.SortFunc(list, func(a, b RunTime) int { return cmp.Compare(a.Name, b.Name) })
	return list, nil
}

// statsOf are the counters of the program behind a pin, which is its link's or its own.
func statsOf(pin string, linked bool) (*ebpf.ProgramStats, error) {
	if !linked {
		prog, err := program.OpenProgram(pin)
		if err != nil {
			return nil, err
		}
		defer prog.Close()
		return prog.Stats()
	}
	attached, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return nil, err
	}
	defer attached.Close()
	info, err := attached.Info()
	if err != nil {
		return nil, err
	}
	prog, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	return prog.Stats()
}
