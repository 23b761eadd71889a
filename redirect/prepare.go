// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// Preloaded is the lookup program of a namespace on its way into the kernel. It
// changes nothing on the node: an Add that does not come, or finds other tables
// than it, does without.
type Preloaded struct {
	done    chan struct{}
	program *ebpf.Program // nil: taken, or not to be had
	cookie  uint64
	pins    map[string]uint64 // inodes of the tables' pins, of before they were opened
}

// processorToSpare reports whether fewer tasks run now than there are processors.
func processorToSpare() bool {
	text, err := os.ReadFile("/proc/loadavg")
	fields := strings.Fields(string(text)) // "0.20 0.18 0.12 1/80 11206": running/all
	if err != nil || len(fields) < 4 {
		return false
	}
	running, _, _ := strings.Cut(fields[3], "/")
	count, err := strconv.Atoi(running)
	return err == nil && count < runtime.NumCPU()
}

func (p *Preloaded) load(paths Paths, netns string) error {
	ns, err := openNamespace(netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	// A pin that is made anew, for another table or the same, has another inode.
	if p.pins, err = pinsIn(paths.maps()); err != nil {
		return err
	}
	tables, err := openTables(paths.maps())
	if err != nil {
		return err
	}
	defer tables.Close()
	p.cookie = ns.cookie
	p.program, err = newLookup(tables, ns.cookie)
	return err
}

func pinsIn(dir string) (map[string]uint64, error) {
	paths, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return nil, err
	}
	pins := make(map[string]uint64)
	for _, path := range paths {
		var stat unix.Stat_t
		if err := unix.Lstat(path, &stat); err != nil {
			return nil, err
		}
		pins[filepath.Base(path)] = stat.Ino
	}
	return pins, nil
}

// take gives the program away where it is the one for the namespace and its
// tables are the node's still, for a caller who holds the lock; else nil.
func (p *Preloaded) take(m *tables, cookie uint64) *ebpf.Program {
	if p == nil {
		return nil
	}
	<-p.done
	if p.program == nil || p.cookie != cookie {
		return nil
	}
	if pins, err := pinsIn(m.dir); err != nil || !maps.Equal(pins, p.pins) {
		return nil
	}
	prog := p.program
	p.program = nil
	return prog
}

// Close gives up what no Add took.
func (p *Preloaded) Close() {
	if p == nil {
		return
	}
	<-p.done
	p.drop()
}

func (p *Preloaded) drop() {
	if p.program != nil {
		p.program.Close()
		p.program = nil
	}
}
