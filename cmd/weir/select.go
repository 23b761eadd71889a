// SPDX-License-Identifier: MPL-2.0

package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/agext/levenshtein"
	"github.com/posener/complete"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// named is what an operator may call a workload by.
type named struct{ id, job, group string }

// namedRecord is what a workload on record may be called by.
func namedRecord(r inspect.Record) named {
	return named{id: allocationOf(r), job: r.Request.Job.ID, group: r.Request.Job.Group}
}

// selection is the workloads that a command is asked about: one allocation, a job's, or all of them
// where neither is set.
type selection struct{ id, job string }

func (s selection) has(w named) bool {
	return (s.id == "" || s.id == w.id) && (s.job == "" || s.job == w.job)
}

// withSelection adds the operand that narrows a list down to one allocation or one job.
func (c *command) withSelection() *command {
	c.withOperands(1, "[ALLOC or JOB]")
	c.predict = complete.PredictFunc(func(complete.Args) (words []string) {
		list, err := c.datapath().Records()
		if err != nil {
			return nil // nobody reads an error while they type
		}
		for _, w := range list {
			words = append(words, w.Key.ContainerID)
			if job := w.Request.Job.ID; job != "" && !slices.Contains(words, job) {
				words = append(words, job)
			}
		}
		return words
	})
	return c
}

// selectFrom returns what of a list the command's operand names: all of it where there is none.
func selectFrom[T any](c *command, list []T, who func(T) named) ([]T, error) {
	chosen, err := selected(c, list, who)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(list), func(w T) bool { return !chosen.has(who(w)) }), nil
}

// selected resolves the command's operand among the workloads of a list.
func selected[T any](c *command, list []T, who func(T) named) (selection, error) {
	if len(c.operands) == 0 {
		return selection{}, nil
	}
	names := make([]named, 0, len(list))
	for _, w := range list {
		names = append(names, who(w))
	}
	return selectWorkloads(c.operands[0], names)
}

// allocID is the allocation's ID as the request has it. A runtime other than Nomad gives none: what it
// calls its container stands for it.
func allocID(id string, key workload.AttachmentID) string {
	if id == "" {
		return key.ContainerID
	}
	return id
}

// selectWorkloads finds what the text names: a whole allocation ID, else a job, else the beginning of
// the ID of one allocation. A job wins over a beginning, as a longer beginning is always at hand.
func selectWorkloads(text string, list []named) (selection, error) {
	var jobs []string
	var matches []named
	for _, w := range list {
		switch {
		case text != "" && w.id == text:
			return selection{id: text}, nil
		case w.job != "":
			jobs = append(jobs, w.job)
		}
		same := func(other named) bool { return other.id == w.id } // it has several networks
		if text != "" && strings.HasPrefix(w.id, text) && !slices.ContainsFunc(matches, same) {
			matches = append(matches, w)
		}
	}
	switch {
	case text != "" && slices.Contains(jobs, text):
		return selection{job: text}, nil
	case len(matches) == 1:
		return selection{id: matches[0].id}, nil
	case len(matches) > 1:
		return selection{}, ambiguous(text, matches)
	}
	hint := "'weir workloads' lists all"
	if guess := closest(text, jobs); guess != "" {
		hint = fmt.Sprintf("did you mean job %q?", guess)
	}
	return selection{}, fmt.Errorf("%q is no job and no beginning of an allocation's ID on this node: %s", text, hint)
}

// ambiguous lists the allocations that a beginning may mean.
func ambiguous(text string, matches []named) error {
	const most = 20
	slices.SortFunc(matches, func(a, b named) int { return strings.Compare(a.id, b.id) })
	rows := make([][]string, 0, most)
	for _, w := range matches[:min(len(matches), most)] {
		rows = append(rows, []string{w.id, strings.Trim(w.job+"/"+w.group, "/")})
	}
	listed := table("  ", rows)
	if more := len(matches) - most; more > 0 {
		listed += fmt.Sprintf("\n  and %d more", more)
	}
	return fmt.Errorf("%q is the beginning of %d allocations' IDs, so give more of it:\n%s", text, len(matches), listed)
}

// closest returns the name that somebody who typed text most likely meant: one that a slip of two
// characters or a beginning is away. It is empty where there is none.
func closest(text string, names []string) string {
	const slip = 2
	best, distance := "", slip+1
	for _, name := range slices.Sorted(slices.Values(names)) {
		if d := levenshtein.Distance(text, name, nil); d < distance && d < len(name) {
			best, distance = name, d
		}
	}
	if best != "" || len(text) < slip {
		return best
	}
	for _, name := range slices.Sorted(slices.Values(names)) {
		if strings.HasPrefix(name, text) {
			return name
		}
	}
	return ""
}
