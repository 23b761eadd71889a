// SPDX-License-Identifier: MPL-2.0

package look

import (
	"fmt"
	"strings"

	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/cni/ended"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/store"
)

// leftBehind says for status what gc would find: in lines, and as problems where
// something that runs suffers from it.
func listLeftBehind(c *base.Command) (lines string, problems []health.Problem) {
	list, err := c.Leftovers(ended.Node{Paths: c.Paths.Or(store.PathsFromEnv(c.Getenv))}).Find()
	count := map[ended.State]int{}
	for _, a := range list {
		count[a.State]++
		problems = append(problems, shadowProblems(a)...)
	}
	var all []string
	if n := count[ended.Gone]; n > 0 {
		all = append(all, fmt.Sprintf("left behind: the network of %s that is over, take it away with 'weir gc'", base.CountOf(n, "allocation")))
	}
	if n := count[ended.Empty]; n > 0 {
		all = append(all, fmt.Sprintf("empty: nothing runs in the namespace of %s, which is over or about to start a task, see 'weir gc -dry-run'", base.CountOf(n, "allocation")))
	}
	if err != nil {
		all = append(all, fmt.Sprintf("left behind: not known in full: %v", err))
	}
	if len(all) == 0 {
		return "", problems
	}
	for i := range all {
		all[i] = base.Hang(all[i])
	}
	return "\n\n" + strings.Join(all, "\n"), problems
}

// shadowProblems says which connections a network that is left behind takes from
// others.
func shadowProblems(a ended.Attachment) (list []health.Problem) {
	remedy := "run 'weir gc'"
	if a.State == ended.Empty {
		id := base.Short(a.Key.ContainerID)
		remedy = fmt.Sprintf("where 'nomad alloc status %s' says that it ended, run 'weir gc -empty %s'", id, id)
	}
	for _, shadow := range a.Shadows {
		owner := "on which a process of the node itself listens"
		if shadow.By != nil {
			owner = "of " + base.WorkloadName(shadow.Job.ID, shadow.Job.Group, *shadow.By) + ", which runs"
		}
		list = append(list, health.NewProblem(health.ProblemHostPortTaken, remedy,
			fmt.Sprintf("it has no process any more and still holds host port %d/%s %s: connections to it from outside are lost",
				shadow.Port, shadow.Protocol, owner)).Of("allocation "+base.AttachmentName(a), a.Key.ContainerID))
	}
	return list
}
