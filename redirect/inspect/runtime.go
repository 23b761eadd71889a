// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"io"

	"github.com/weirmesh/weir/redirect/program"
)

// CountRunTime has the kernel count the run time of all programs of the machine, until
// the answer is closed.
func (d *Reader) CountRunTime() (io.Closer, error) { return program.CountRunTime() }

// RunTimes are what the kernel has counted of the node's programs. It takes no lock.
func (d *Reader) RunTimes() ([]program.RunTime, error) { return program.RunTimes(d.paths) }
