// SPDX-License-Identifier: MPL-2.0

package traffic

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/bpfmap"
)

// renderEgress is the list of what left past the proxies.
func renderEgress(c *base.Command, list api.GuardList, now time.Time) string {
	since := "since the agent began to record, " + base.Ago(now, list.Since) + " ago"
	if len(list.Egress) == 0 {
		return base.Hang("nothing that an egress guard sees went out past a proxy "+since) + incomplete(list)
	}
	rows := [][]string{{"ALLOC", "JOB", "TASK", "COMMAND", "BY", "TO", "PORT", "COUNT", "LAST"}}
	for _, e := range list.Egress {
		port := "-"
		if e.Port != 0 {
			port = fmt.Sprint(e.Port)
		}
		command := strings.Join(strings.Fields(e.Command), " ") // a process names itself
		rows = append(rows, []string{
			base.Short(e.AllocID), base.OrDash(e.Job), base.OrDash(e.Task), base.OrDash(command), e.Transport, base.OrDash(e.Destination), port, fmt.Sprint(e.Count), base.Ago(now, e.Last),
		})
	}
	if !c.Verbose {
		rows = base.Cut(rows, 80, 1, 2, 3, 5)
	}
	lines := strings.Split(base.Table("", rows), "\n")
	var remedies []string
	for i, e := range list.Egress {
		if e.Verdict == bpfmap.RefusedEgress.String() || e.Verdict == bpfmap.RefusedEgressSocket.String() {
			lines[i+1] = c.Paint(base.Red, lines[i+1])
		}
		line := "  " + cmp.Or(strings.Trim(e.Job+"/"+e.TaskGroup, "/"), base.Short(e.AllocID)) + ": " + e.Remedy
		if !slices.Contains(remedies, line) {
			remedies = append(remedies, line)
		}
	}
	caution := ""
	if slices.ContainsFunc(remedies, func(line string) bool { return strings.Contains(line, ": exclude_uids = ") }) {
		caution = "\nexclude_uids takes all that the user sends out of the mesh, TCP too"
	}
	return strings.Join(lines, "\n") + "\n\nTo let it out, in the group's transparent_proxy block:\n" + strings.Join(remedies, "\n") + caution +
		"\n\nall of it " + since + "; LAST is how long ago" + incomplete(list)
}
