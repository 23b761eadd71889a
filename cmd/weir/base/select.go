// SPDX-License-Identifier: MPL-2.0

package base

import (
	"fmt"
	"slices"
	"strings"

	"github.com/agext/levenshtein"
	"github.com/posener/complete"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// Named is what an operator may call a workload by.
type Named struct{ ID, Job, Group string }

// NamedRecord is what a workload on record may be called by.
func NamedRecord(r inspect.Record) Named {
	return Named{ID: AllocationOf(r), Job: r.Request.Job.ID, Group: r.Request.Job.Group}
}

// Selection is the workloads that a command is asked about: one allocation, a job's, or all of them
// where neither is set.
type Selection struct{ ID, Job string }

func (s Selection) Has(w Named) bool {
	return (s.ID == "" || s.ID == w.ID) && (s.Job == "" || s.Job == w.Job)
}

// WithSelection adds the operand that narrows a list down to one allocation or one job.
func (c *Command) WithSelection() *Command {
	c.WithOperands(1, "[ALLOC or JOB]")
	c.Predict = complete.PredictFunc(func(complete.Args) (words []string) {
		list, err := c.Datapath().Records()
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

// SelectFrom returns what of a list the command's operand names: all of it where there is none.
func SelectFrom[T any](c *Command, list []T, who func(T) Named) ([]T, error) {
	chosen, err := Selected(c, list, who)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(list), func(w T) bool { return !chosen.Has(who(w)) }), nil
}

// Selected resolves the command's operand among the workloads of a list.
func Selected[T any](c *Command, list []T, who func(T) Named) (Selection, error) {
	if len(c.Operands) == 0 {
		return Selection{}, nil
	}
	names := make([]Named, 0, len(list))
	for _, w := range list {
		names = append(names, who(w))
	}
	return SelectWorkloads(c.Operands[0], names)
}

// AllocID is the allocation's ID as the request has it. A runtime other than Nomad gives none: what it
// calls its container stands for it.
func AllocID(id string, key workload.AttachmentID) string {
	if id == "" {
		return key.ContainerID
	}
	return id
}

// SelectWorkloads finds what the text names: a whole allocation ID, else a job, else the beginning of
// the ID of one allocation. A job wins over a beginning, as a longer beginning is always at hand.
func SelectWorkloads(text string, list []Named) (Selection, error) {
	var jobs []string
	var matches []Named
	for _, w := range list {
		switch {
		case text != "" && w.ID == text:
			return Selection{ID: text}, nil
		case w.Job != "":
			jobs = append(jobs, w.Job)
		}
		same := func(other Named) bool { return other.ID == w.ID } // it has several networks
		if text != "" && strings.HasPrefix(w.ID, text) && !slices.ContainsFunc(matches, same) {
			matches = append(matches, w)
		}
	}
	switch {
	case text != "" && slices.Contains(jobs, text):
		return Selection{Job: text}, nil
	case len(matches) == 1:
		return Selection{ID: matches[0].ID}, nil
	case len(matches) > 1:
		return Selection{}, ambiguous(text, matches)
	}
	hint := "'weir workloads' lists all"
	if guess := Closest(text, jobs); guess != "" {
		hint = fmt.Sprintf("did you mean job %q?", guess)
	}
	return Selection{}, fmt.Errorf("%q is no job and no beginning of an allocation's ID on this node: %s", text, hint)
}

// ambiguous lists the allocations that a beginning may mean.
func ambiguous(text string, matches []Named) error {
	const most = 20
	slices.SortFunc(matches, func(a, b Named) int { return strings.Compare(a.ID, b.ID) })
	rows := make([][]string, 0, most)
	for _, w := range matches[:min(len(matches), most)] {
		rows = append(rows, []string{w.ID, strings.Trim(w.Job+"/"+w.Group, "/")})
	}
	listed := Table("  ", rows)
	if more := len(matches) - most; more > 0 {
		listed += fmt.Sprintf("\n  and %d more", more)
	}
	return fmt.Errorf("%q is the beginning of %d allocations' IDs, so give more of it:\n%s", text, len(matches), listed)
}

// Closest returns the name that somebody who typed text most likely meant: one that a slip of two
// characters or a beginning is away. It is empty where there is none.
func Closest(text string, names []string) string {
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
