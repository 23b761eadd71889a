// SPDX-License-Identifier: MPL-2.0

package program

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program/cell"
	"github.com/weirmesh/weir/redirect/store"
	"golang.org/x/sys/unix"
)

// A spare is a lookup program that is loaded and pinned before anybody knows its
// namespace, so that the verifier is not in an ADD's way. It refuses until its cell has a
// cookie. Its file name says which object it is from. Whoever removes the file has it:
// nobody else can, and one who dies then leaves nothing.

// spareCount is how many there are: the allocations that come before they are made up for.
const spareCount = 8

// sparePrefix begins the names of spares from this binary's object.
func sparePrefix() string {
	sum := sha256.Sum256(bpfmap.LookupObject())
	return hex.EncodeToString(sum[:8]) + "-"
}

// spares lists this binary's, and what else is in their directory.
func spares(paths store.Paths) (own, others []string, err error) {
	entries, err := os.ReadDir(paths.Spares())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("list spare programs: %w", err)
	}
	prefix := sparePrefix()
	for _, entry := range entries {
		path := filepath.Join(paths.Spares(), entry.Name())
		if strings.HasPrefix(entry.Name(), prefix) {
			own = append(own, path)
		} else {
			others = append(others, path)
		}
	}
	return own, others, nil
}

// HasSpare reports whether an ADD is likely to find one.
func HasSpare(paths store.Paths) bool {
	own, _, err := spares(paths)
	return err == nil && len(own) > 0
}

// LacksSpares reports whether there are fewer than there should be, or others' beside them.
func LacksSpares(paths store.Paths) (bool, error) {
	own, others, err := spares(paths)
	return len(own) < spareCount || len(others) > 0, err
}

// LoadSpare loads a lookup program that is no namespace's yet.
func LoadSpare(m *bpfmap.Tables) (*ebpf.Program, error) {
	prog, cellFD, err := loadLookup(m)
	if err != nil {
		return nil, err
	}
	return prog, unix.Close(cellFD)
}

// PinSpare keeps a program, unless there are enough or it does not read the node's tables
// any more, and removes what is not of this version. The caller holds the lock.
func PinSpare(paths store.Paths, m *bpfmap.Tables, prog *ebpf.Program) error {
	_, others, err := spares(paths)
	if err != nil {
		return err
	}
	for _, path := range others {
		if err := os.Remove(path); err != nil {
			return fmt.Errorf("remove former spare program: %w", err)
		}
	}
	cellFD, err := spareCell(m, prog.FD())
	if err != nil {
		return fmt.Errorf("keep spare program: %w", err)
	}
	if err := unix.Close(cellFD); err != nil {
		return err
	}
	if err := os.MkdirAll(paths.Spares(), 0o700); err != nil {
		return fmt.Errorf("create pin directory: %w", err)
	}
	for i := range spareCount {
		path := filepath.Join(paths.Spares(), fmt.Sprint(sparePrefix(), i))
		if done, err := PinAgain(path, prog); done || err != nil {
			return err
		}
	}
	return nil
}

// RemoveSpares removes all of them, with what they hold of tables that go.
func RemoveSpares(paths store.Paths) error { return RemoveTree(paths.Spares()) }

// takeSpare returns a spare that is the namespace's from now on, or nil: whatever is wrong
// with one, a program that is loaded now does as well. The caller holds the lock.
func takeSpare(paths store.Paths, m *bpfmap.Tables, cookie uint64) *ebpf.Program {
	own, _, err := spares(paths)
	if err != nil {
		return nil
	}
	for _, path := range own {
		prog, err := OpenProgram(path)
		if err == nil {
			if err = giveSpare(m, prog, path, cookie); err == nil {
				return prog
			}
			prog.Close()
		}
		// Not a spare over these tables, or nobody's to take any more.
		_ = os.Remove(path)
	}
	return nil
}

// giveSpare makes a pinned program the namespace's. What is looked at is what is taken:
// the open program, wherever its pin leads by now.
func giveSpare(m *bpfmap.Tables, prog *ebpf.Program, path string, cookie uint64) error {
	cellFD, err := spareCell(m, prog.FD())
	if err != nil {
		return err
	}
	defer unix.Close(cellFD)
	if err := os.Remove(path); err != nil {
		return err
	}
	return cell.Fill(cellFD, cookie)
}

// errNotSpare: what is pinned there is not what this binary would load now.
var errNotSpare = errors.New("not a spare lookup program of these tables")

// spareCell opens the cell of a program that is, instruction by instruction and table by
// table, the one that this binary would load over these tables.
func spareCell(m *bpfmap.Tables, prog int) (cellFD int, err error) {
	o, err := readLookup()
	if err != nil {
		return -1, fmt.Errorf("read lookup program: %w", err)
	}
	found, err := describeFD(prog)
	if err != nil {
		return -1, fmt.Errorf("read program: %w", err)
	}
	if found.kind != unix.BPF_PROG_TYPE_SK_LOOKUP || found.Name != LookupName || !o.hasTag(found.tag) {
		return -1, errNotSpare
	}
	names := o.tableNames()
	if len(found.Maps) != len(names) {
		return -1, errNotSpare
	}
	own := ebpf.MapID(0)
	for i, name := range names {
		if name == cell.Name {
			own = found.Maps[i]
			continue
		}
		id, err := m.ID(name)
		if err != nil {
			return -1, err
		}
		if found.Maps[i] != id {
			return -1, errNotSpare
		}
	}
	if cellFD, err = cell.Open(uint32(own)); err != nil {
		return -1, err
	}
	cookie, err := cell.Read(cellFD)
	if err == nil && cookie != 0 {
		err = cell.ErrTaken
	}
	if err != nil {
		return -1, errors.Join(err, unix.Close(cellFD))
	}
	return cellFD, nil
}

// tableNames are the tables of the program in the order in which the kernel lists them:
// that of the first reference to each.
func (o *lookupObject) tableNames() (names []string) {
	for _, reference := range o.tables {
		if !slices.Contains(names, reference.name) {
			names = append(names, reference.name)
		}
	}
	return names
}
