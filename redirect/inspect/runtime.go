// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"io"

	"github.com/weirmesh/weir/redirect/program/runstats"
)

// CountRunTime has the kernel count the run time of all programs of the machine, until
// the answer is closed.
func (d *Reader) CountRunTime() (io.Closer, error) { return runstats.CountRunTime() }

// RunTimes are what the kernel has counted of the node's programs. It takes no lock.
func (d *Reader) RunTimes() ([]runstats.RunTime, error) { return runstats.RunTimes(d.paths) }
