// SPDX-License-Identifier: MPL-2.0

package limit

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/program"
)

// AttachEmpty attaches programs that do nothing to all hooks of Weir: what a socket pays
// then is what the kernel takes for having any program there.
func (c *Config) AttachEmpty() (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Close())
		}
	}()
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
		err = c.attach(nothing, hook.Attach)
		nothing.Close()
		if err != nil {
			return err
		}
	}
	return nil
}
