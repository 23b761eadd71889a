// SPDX-License-Identifier: MPL-2.0

package loader

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
)

// repin pins those tables again whose pin somebody removed. The programs in
// force hold every table that they use, with its rows, so nothing is lost. A
// node without the table that tells its layout is one that is not loaded.
func (d *Loader) repin() (repairs []program.Repair, err error) {
	lost := missing(d.Paths().Maps(), bpfmap.MapNames())
	if len(lost) == 0 || slices.Contains(lost, "control") {
		return nil, nil
	}
	for _, name := range program.ProgramNames() {
		found, err := d.repinFrom(d.Paths().Link(name), lost)
		if err != nil {
			return repairs, err
		}
		for _, name := range found {
			repairs = append(repairs, program.Repair{Kind: program.PinPutBack, Object: "map " + name})
			lost = slices.DeleteFunc(lost, func(other string) bool { return other == name })
		}
	}
	if len(lost) > 0 {
		return repairs, fmt.Errorf("pin maps again: no program in force has %v: run 'weir unload', then 'weir load', and restart the allocations", lost)
	}
	return repairs, nil
}

// repinFrom pins the lost tables that the program of a link uses.
func (d *Loader) repinFrom(pin string, lost []string) (found []string, err error) {
	prog, err := program.DescribePinned(pin)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // it is detached
	}
	if err != nil {
		return nil, fmt.Errorf("pin maps again: %w", err)
	}
	for _, id := range prog.Maps {
		name, err := d.repinMap(id, lost)
		if err != nil {
			return found, err
		}
		if name != "" {
			found = append(found, name)
		}
	}
	return found, nil
}

func (d *Loader) repinMap(id ebpf.MapID, lost []string) (name string, err error) {
	table, err := ebpf.NewMapFromID(id)
	if err != nil {
		return "", fmt.Errorf("pin maps again: %w", err)
	}
	defer table.Close()
	info, err := table.Info()
	if err != nil {
		return "", fmt.Errorf("pin maps again: %w", err)
	}
	if !slices.Contains(lost, info.Name) {
		return "", nil
	}
	if err := table.Pin(filepath.Join(d.Paths().Maps(), info.Name)); err != nil {
		return "", fmt.Errorf("pin map %s again: %w", info.Name, err)
	}
	return info.Name, nil
}
