// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"io/fs"
	"os"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/program"
)

// prepared waits for the program and returns its number in the kernel.
func (a *alloc) prepared(t *testing.T) (*program.Preloaded, uint32) {
	t.Helper()
	p := a.node.preload(a.Path)
	t.Cleanup(p.Close)
	<-p.Done
	if p.Program == nil {
		t.Fatal("no program was prepared")
	}
	info, err := p.Program.Info()
	if err != nil {
		t.Fatal(err)
	}
	id, _ := info.ID()
	return p, uint32(id)
}

// addPrepared adds the allocation and reports whether it has that program.
func (a *alloc) addPrepared(t *testing.T, p *program.Preloaded, id uint32) bool {
	t.Helper()
	if err := a.node.Add(Attachment{Key: a.key, NetNS: a.Path, Request: a.request(), Prepared: p}); err != nil {
		t.Fatal(err)
	}
	return linkIDs(t, a.node.Paths().Lookup(a.Cookie()))[1] == id
}

func TestPreparedProgramIsTaken(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	p, id := a.prepared(t)
	if !a.addPrepared(t, p, id) {
		t.Error("ADD loaded another program than the prepared one")
	}
	p.Close()
	a.startProxy()
	a.works()
}

// A program that was prepared before the node's tables changed reads none that
// anybody writes.
func TestPreparedProgramOfOtherTablesIsNot(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	p, id := a.prepared(t)
	if _, err := n.Unload(); err != nil {
		t.Fatal(err)
	}
	if a.addPrepared(t, p, id) {
		t.Error("ADD took a program that has the tables of an unloaded node")
	}
	a.startProxy()
	a.works()
}

func TestPreparedProgramOfAnotherNamespaceIsNot(t *testing.T) {
	n := newNode(t)
	a, other := n.newAlloc(), n.newAlloc()
	p, id := other.prepared(t)
	if a.addPrepared(t, p, id) {
		t.Error("ADD took the program of another namespace")
	}
	a.startProxy()
	a.works()
}

func TestPreparedProgramThatNobodyTakesEnds(t *testing.T) {
	n := newNode(t)
	a := n.newAlloc()
	p, id := a.prepared(t)
	p.Close()
	if left, err := ebpf.NewProgramFromID(ebpf.ProgramID(id)); !errors.Is(err, os.ErrNotExist) {
		left.Close()
		t.Errorf("program %d: %v: want it to be gone", id, err)
	}
	if _, err := os.Stat(n.Paths().Lookup(a.Cookie())); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("pin: %v: want none", err)
	}
}

// The first ADD of a node finds nothing to prepare with, and one of no
// namespace fails by itself.
func TestPrepareWithoutAnything(t *testing.T) {
	d := unloadedDatapath(t)
	for _, path := range []string{"/proc/self/ns/net", "/nowhere"} {
		p := d.preload(path)
		<-p.Done
		if p.Program != nil {
			t.Errorf("%s: a program was prepared", path)
		}
		p.Close()
	}
	var none *program.Preloaded
	none.Close()
}
