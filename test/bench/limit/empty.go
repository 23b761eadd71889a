// SPDX-License-Identifier: MPL-2.0

package limit

import (
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
)

// AttachEmpty attaches programs that do nothing to all hooks of Weir: what a socket pays
// then is what the kernel takes for having any program there.
func (c *Config) AttachEmpty() error {
	ours, err := bpfmap.LoadBpf()
	if err != nil {
		return fmt.Errorf("read programs: %w", err)
	}
	for _, hook := range program.Hooks() {
		nothing, err := ebpf.NewProgram(&ebpf.ProgramSpec{
			Type: ours.Programs[hook.Program].Type, AttachType: hook.Attach, License: "GPL",
			Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 1), asm.Return()},
		})
		if err != nil {
			return fmt.Errorf("load an empty program for %s: %w", hook.Attach, err)
		}
		attached, err := link.AttachCgroup(link.CgroupOptions{Path: c.Cgroup, Attach: hook.Attach, Program: nothing})
		nothing.Close()
		if err != nil {
			return fmt.Errorf("attach an empty program to %s at %s: %w", c.Cgroup, hook.Attach, err)
		}
		c.opened = append(c.opened, attached)
	}
	return nil
}
