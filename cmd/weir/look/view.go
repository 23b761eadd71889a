// SPDX-License-Identifier: MPL-2.0

package look

import (
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// seenWorkload is a workload with what the agent knows of it.
type seenWorkload struct {
	inspect.WorkloadStatus
	Agent *api.WorkloadView `json:"agent,omitempty"` // absent where no agent runs

	outside bool // the agent sees it, and it is no workload in the kernel
}

// withAgent joins the workloads with the agent's view of them. What is not under
// Weir follows as the agent sees it.
func withAgent(list []inspect.WorkloadStatus, view api.Status) []seenWorkload {
	views := make(map[workload.AttachmentID]*api.WorkloadView)
	for i, w := range view.Workloads {
		views[w.Key] = &view.Workloads[i]
	}
	seen := make([]seenWorkload, 0, len(list))
	for _, w := range list {
		seen = append(seen, seenWorkload{WorkloadStatus: w, Agent: views[w.Key]})
	}
	known := make(map[workload.AttachmentID]bool)
	for _, w := range list {
		known[w.Key] = true
	}
	for i, w := range view.Workloads {
		if !known[w.Key] && w.State != api.StateManaged { // that one's ADD or DEL is under way
			seen = append(seen, seenWorkload{outside: true, Agent: &view.Workloads[i], WorkloadStatus: inspect.WorkloadStatus{
				Key: w.Key, ID: w.ID, Job: w.Job, Group: w.Group, NomadNames: w.NomadNames, NetNS: w.NetNS,
				Addresses: []netip.Addr{}, Notes: []string{}, Problems: []health.Problem{},
			}})
		}
	}
	return seen
}

// summary is the agent's view in a few lines, without the allocations.
func summary(c *base.Command, view api.Status, now time.Time) string {
	lines := sources(c, view, now)
	count := make(map[api.State]int)
	for _, w := range view.Workloads {
		count[w.State]++
	}
	if consuls := count[api.StateConsul]; consuls > 0 {
		lines = append(lines, base.Hang(fmt.Sprintf("agent: %s redirected by Consul's own rules, as before, until Nomad starts a new one in the place of each", base.CountOf(consuls, "allocation"))))
	}
	if host := count[api.StateHost]; host > 0 {
		lines = append(lines, base.Hang(fmt.Sprintf("agent: %s on the node's own network, where there is nothing to redirect or guard", base.CountOf(host, "gateway"))))
	}
	if unclaimed := count[api.StateUnclaimed]; unclaimed > 0 {
		lines = append(lines, base.Hang(fmt.Sprintf("agent: %s of a proxy in Consul that no allocation of this node is known to run, see 'weir workloads'", base.CountOf(unclaimed, "registration"))))
	}
	if unprotected := count[api.StateUnprotected]; unprotected > 0 {
		lines = append(lines, c.Paint(base.Red, fmt.Sprintf("agent: %s of the mesh not under Weir, see 'weir workloads'", base.CountOf(unprotected, "allocation"))))
	}
	lines = append(lines, heldLines(view.Workloads, now)...)
	if counts := view.Counts; counts.Repaired+counts.Pruned > 0 {
		lines = append(lines, fmt.Sprintf("agent: %s since it began, %s forgotten whose namespace died",
			base.CountOf(int(counts.Repaired), "repair"), base.CountOf(int(counts.Pruned), "workload")))
	}
	return strings.Join(lines, "\n")
}

// heldLines name allocations whose connections wait for their proxy to start, few of
// many.
func heldLines(list []api.WorkloadView, now time.Time) (lines []string) {
	const most = 3
	held := 0
	for _, w := range list {
		if w.HeldSince.IsZero() {
			continue
		}
		if held++; held <= most {
			lines = append(lines, base.Hang(fmt.Sprintf("agent: %s waits for its proxy since %s, and so does what it dials",
				base.WorkloadName(w.Job, w.Group, w.Key), now.Sub(w.HeldSince).Round(time.Second))))
		}
	}
	if held > most {
		lines = append(lines, fmt.Sprintf("agent: %s more wait for their proxies", base.CountOf(held-most, "allocation")))
	}
	return lines
}

// sources says how good the agent's knowledge is.
func sources(c *base.Command, view api.Status, now time.Time) []string {
	lines := []string{ConsulLine(c, view.Consul, now)}
	if view.Docker != "" {
		lines = append(lines, c.Paint(base.Red, base.Hang("agent: Docker's containers may be other ones by now: "+view.Docker)))
	}
	return lines
}

func ConsulLine(c *base.Command, consul api.ConsulStatus, now time.Time) string {
	since := now.Sub(consul.Since).Round(time.Second)
	switch {
	case !consul.Enabled:
		return "agent: Consul sync is disabled"
	case consul.InSync && consul.Hidden:
		return c.Paint(base.Red, base.Hang(fmt.Sprintf("agent: Consul at %s hides services of this node from the token", consul.Address)))
	case consul.InSync:
		return fmt.Sprintf("agent: in sync with Consul at %s for %s", consul.Address, since)
	case consul.Error == "":
		return fmt.Sprintf("agent: asking Consul at %s", consul.Address)
	}
	return c.Paint(base.Red, base.Hang(fmt.Sprintf("agent: not in sync with Consul at %s for %s: %s", consul.Address, since, consul.Error)))
}
