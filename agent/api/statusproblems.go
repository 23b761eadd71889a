// SPDX-License-Identifier: MPL-2.0

package api

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect/health"
)

// ProblemsAt are what is wrong on the node as the agent sees it. What many
// allocations have in common is said once.
func (s Status) ProblemsAt(now time.Time) []health.Problem {
	var list []health.Problem
	if since := now.Sub(s.Alive); since > Stuck {
		list = append(list, health.NewProblem(health.ProblemAgentStalled,
			"see the agent's log; 'systemctl restart weir-agent' changes nothing for any allocation",
			fmt.Sprintf("the agent's reconcile loop has stalled for %s", since.Round(time.Second))))
	}
	if s.DataPath != "" {
		list = append(list, s.RepairProblem())
	}
	var order []health.Problem
	who := make(map[health.Problem][]WorkloadView)
	for _, w := range s.Workloads {
		if !w.Settled(now) {
			continue
		}
		for _, problem := range w.Problems {
			problem = problem.Of("", "")
			if len(who[problem]) == 0 {
				order = append(order, problem)
			}
			who[problem] = append(who[problem], w)
		}
	}
	for _, problem := range order {
		list = append(list, problem.Of(subjectsOf(who[problem])))
	}
	return slices.Clip(list)
}

// RepairProblem is what is wrong with the data path where the agent cannot repair it.
func (s Status) RepairProblem() health.Problem {
	return health.NewProblem(health.ProblemRepairFailed, "see the agent's log, and run 'weir load'", "the agent cannot repair the data path: "+s.DataPath)
}

// Settled reports whether what is wrong with the allocation counts: it is the agent's
// matter, and not on its way, in or out.
func (w WorkloadView) Settled(now time.Time) bool {
	return (w.State == StateManaged || w.State == StateUnprotected) && now.Sub(w.Since) >= SettleTime
}

// Name is the allocation with its job, as an operator knows it.
func (w WorkloadView) Name() string {
	if w.Job == "" {
		return w.ID
	}
	return fmt.Sprintf("%s (%s/%s)", w.ID, w.Job, w.Group)
}

// subjectsOf names allocations that have a problem in common, few of many, and
// the ID of one that is alone.
func subjectsOf(list []WorkloadView) (allocation, id string) {
	const most = 3
	if len(list) == 1 {
		return "allocation " + list[0].Name(), list[0].ID
	}
	var names []string
	for _, w := range list {
		names = append(names, w.Name())
	}
	switch {
	case len(names) <= most:
		return fmt.Sprintf("%d allocations, %s", len(names), strings.Join(names, ", ")), ""
	}
	return fmt.Sprintf("%d allocations, among them %s", len(names), strings.Join(names[:most], ", ")), ""
}

// StepProblem is what to do about a step that the agent tries again.
func StepProblem(step, what string) health.Problem {
	code, remedy := health.ProblemStepFailed, "the agent tries again; where it stays, 'nomad alloc stop' the allocation"
	switch step {
	case "record":
		code = health.ProblemRecordMissing
		remedy = "the agent makes the record anew where libcni's result allows it, and tries again; where it stays, 'nomad alloc stop' the allocation"
	case "namespace":
		remedy = "'nomad alloc stop' the allocation where it still runs"
	case "add":
		code = health.ProblemUnprotected
		remedy = "the agent tries again; see its log and 'weir status' for the data path"
	case "configure":
		remedy = "the agent tries again; until then the last known state stays"
	}
	return health.NewProblem(code, remedy, what)
}
