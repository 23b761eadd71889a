// SPDX-License-Identifier: MPL-2.0

package program

import (
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/store"
	"golang.org/x/sys/unix"
)

// Preloaded is the lookup program of a namespace on its way into the kernel. It
// changes nothing on the node: an Add that does not come, or finds other tables
// than it, does without.
type Preloaded struct {
	Done    chan struct{}
	Program *ebpf.Program // nil: taken, or not to be had
	cookie  uint64
	pins    map[string]uint64 // inodes of the tables' pins, of before they were opened
}

// ProcessorToSpare reports whether fewer tasks run now than there are processors.
func ProcessorToSpare() bool {
	text, err := os.ReadFile("/proc/loadavg")
	fields := strings.Fields(string(text)) // "0.20 0.18 0.12 1/80 11206": running/all
	if err != nil || len(fields) < 4 {
		return false
	}
	running, _, _ := strings.Cut(fields[3], "/")
	count, err := strconv.Atoi(running)
	return err == nil && count < runtime.NumCPU()
}

func (p *Preloaded) Load(paths store.Paths, netns string) error {
	ns, err := host.OpenNamespace(netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	// A pin that is made anew, for another table or the same, has another inode.
	if p.pins, err = pinsIn(paths.Maps()); err != nil {
		return err
	}
	tables, err := bpfmap.OpenTables(paths.Maps())
	if err != nil {
		return err
	}
	defer tables.Close()
	p.cookie = ns.Cookie
	p.Program, err = NewLookup(tables, ns.Cookie)
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

// Take gives the program away where it is the one for the namespace and its
// tables are the node's still, for a caller who holds the lock; else nil.
func (p *Preloaded) Take(m *bpfmap.Tables, cookie uint64) *ebpf.Program {
	if p == nil {
		return nil
	}
	<-p.Done
	if p.Program == nil || p.cookie != cookie {
		return nil
	}
	if pins, err := pinsIn(m.Dir); err != nil || !maps.Equal(pins, p.pins) {
		return nil
	}
	prog := p.Program
	p.Program = nil
	return prog
}

// Close gives up what no Add took.
func (p *Preloaded) Close() {
	if p == nil {
		return
	}
	<-p.Done
	p.Drop()
}

func (p *Preloaded) Drop() {
	if p.Program != nil {
		p.Program.Close()
		p.Program = nil
	}
}
