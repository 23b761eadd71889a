// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
)

const reportSize = 4000

// report logs what one wants to see of a test that failed.
func (n *Node) report() {
	var told strings.Builder
	if n.machine.boot != nil {
		for _, args := range [][]string{{"weir", "status"}, {"weir", "workloads"}, {"weir", "verdicts"}} {
			// The test's own context has ended by now.
			out, err := n.output(n.machine.command(context.Background(), args[0], args[1:]...))
			fmt.Fprintf(&told, "== %s (%v)\n%s\n", strings.Join(args, " "), err, out)
		}
		var list []*Alloc
		if err := n.api.nomad.get("/v1/allocations?task_states=true", &list); err != nil {
			fmt.Fprintf(&told, "== allocations: %v\n", err)
		}
		for _, a := range list {
			fmt.Fprintf(&told, "== allocation %s of %s: %s, wanted: %s\n%s", a.ID, a.JobID, a.ClientStatus, a.DesiredStatus, a.Events())
		}
	}
	logs, _ := filepath.Glob(filepath.Join(n.machine.dir, "upper/var/lib/nomad/alloc/*/alloc/logs/*.std*.0"))
	for _, log := range logs {
		name := strings.TrimPrefix(log, filepath.Join(n.machine.dir, "upper/var/lib/nomad/alloc"))
		fmt.Fprintf(&told, "== %s\n%s\n", name, tail(log, reportSize/3))
	}
	for _, d := range n.daemons() {
		fmt.Fprintf(&told, "== log of %s\n%s\n", d.Name, d.Tail(reportSize))
	}
	n.tb.Logf("the node, when the test had failed:\n%s", told.String())
}
