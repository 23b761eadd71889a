// SPDX-License-Identifier: MPL-2.0

// Package traffic has the commands that say what connections there were, and what changed.
package traffic

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/store"
)

// FewFlows is how many are shown where nothing says how many or since when.
const FewFlows = 20

func NewFlows(env base.Env) *base.Command {
	c := base.New(env, "flows", "Show connections, past and present, by name", fmt.Sprintf(`  Prints a line for each connection that the agent has recorded: when, who opened
  it, what was dialled, and the verdict. Where the node or Consul know a name it
  stands in the place of the address. Without -f it is history: the newest %d, or
  what -last, -since and -until say. With -f it goes on until interrupted.

  All filters that are given must match; -not shows what does not match them. An
  end of -from and -to is a job, a task, a service, an address, a CIDR, or the
  beginning of an allocation's ID, of four characters or more. With an allocation
  or a job as argument only its connections are shown, in and out.

  -summary shows who talks to what: each source, destination and verdict with the
  number of connections, the most frequent first, of all the history.

  The agent keeps the history in memory, as flows { memory, history } in its
  configuration say. What was lost is a line of its own, with the verdict "lost".
  A connection that waits in a start gate has a second line, with the verdict
  "held", from when it is first seen to wait.
  With -json each line is a JSON object; -summary is one object. -o dict has a
  line for each key of a flow, and cuts nothing off.

  See what was refused in the last ten minutes:

      $ weir flows -refused -since 10m`, FewFlows)).WithPaths().WithJSON().WithSelection()
	var query api.FlowQuery
	c.Flags.BoolVar(&query.Follow, "f", false, "go on until interrupted")
	c.Flags.IntVar(&query.Last, "last", 0, "the newest `count` of those that were recorded")
	since := c.Flags.String("since", "", "not older than this `time`: 10m, or 2006-01-02T15:04:05Z")
	until := c.Flags.String("until", "", "not newer than this `time`")
	c.Flags.StringVar(&query.From, "from", "", "who opened the connection: an `end`, as above")
	c.Flags.StringVar(&query.To, "to", "", "what was dialled: an `end`, as above")
	c.Flags.StringVar(&query.Job, "job", "", "`job` of either end")
	c.Flags.StringVar(&query.Alloc, "alloc", "", "`allocation` of either end, by the beginning of its ID")
	c.Flags.StringVar(&query.Task, "task", "", "`task` that opened the connection")
	c.Flags.StringVar(&query.Service, "service", "", "`service` of either end")
	port := c.Flags.Uint("port", 0, "`port` that was dialled")
	verdicts := c.Flags.String("verdict", "", "one of these `verdicts`, with commas between them")
	c.Flags.BoolVar(&query.Refused, "refused", false, "refused connections alone")
	c.Flags.BoolVar(&query.Not, "not", false, "what does not match the filters")
	summary := c.Flags.Bool("summary", false, "who talks to what, with counts")
	numeric := c.Flags.Bool("numeric", false, "addresses and IDs in the place of names")
	output := c.Flags.String("o", "", "`format`: table, dict with a line for each key, or json (default table)")
	c.Do = func() (int, error) {
		asked, err := flowQuery(c, query, *since, *until, *port, *verdicts, *summary)
		if err != nil {
			return 1, err
		}
		if err := chooseOutput(c, *output, *summary); err != nil {
			return 1, err
		}
		if *summary {
			return 0, summariseFlows(c, asked, *numeric)
		}
		return 0, listFlows(c, asked, *numeric, *output == outputDict)
	}
	return c
}

// flowQuery is what the flags and the operand ask for.
func flowQuery(c *base.Command, query api.FlowQuery, since, until string, port uint, verdicts string, summary bool) (api.FlowQuery, error) {
	now := time.Now()
	for name, moment := range map[string]struct {
		text string
		to   *time.Time
	}{"since": {since, &query.Since}, "until": {until, &query.Until}} {
		if moment.text == "" {
			continue
		}
		at, err := api.ParseMoment(moment.text, now)
		if err != nil {
			return query, fmt.Errorf("read -%s: %w", name, err)
		}
		*moment.to = at
	}
	switch {
	case port > 1<<16-1:
		return query, fmt.Errorf("read -port: %d is no port", port)
	case query.Last < 0:
		return query, fmt.Errorf("read -last: %d is no count", query.Last)
	case summary && query.Follow:
		return query, errors.New("-summary is of what was recorded, and -f of what is to come: give one of them")
	}
	query.Port = uint16(port)
	if verdicts != "" {
		query.Verdicts = strings.Split(verdicts, ",")
	}
	if !summary && !query.Follow && query.Last == 0 && query.Since.IsZero() && query.Until.IsZero() {
		query.Last = FewFlows
	}
	if len(c.Operands) == 0 {
		return query, nil
	}
	if query.Alloc != "" || query.Job != "" {
		return query, fmt.Errorf("%q beside -alloc or -job: give one of them", c.Operands[0])
	}
	known, err := c.Datapath().Records()
	if err != nil && !errors.Is(err, store.ErrUnreadable) {
		return query, err
	}
	chosen, err := base.Selected(c, known, base.NamedRecord)
	query.Alloc, query.Job = chosen.ID, chosen.Job
	return query, err
}

// readFlows asks the agent, without which there is no history.
func readFlows(c *base.Command, query api.FlowQuery, deliver func(api.Flow) error) error {
	err := c.AskFlows(c.Ctx, c.StateDir(), query, deliver)
	if errors.Is(err, api.ErrNotRunning) || errors.Is(err, api.ErrFlowsOff) {
		return fmt.Errorf("%w; 'weir events -f' shows connections without it", err)
	}
	return err
}

func listFlows(c *base.Command, query api.FlowQuery, numeric, dict bool) error {
	if !c.JSON && !dict {
		c.UI.Output(c.Paint(base.Bold, flowColumns("TIME", "SOURCE", "DESTINATION", "VERDICT")))
	}
	return readFlows(c, query, func(flow api.Flow) error {
		if c.JSON {
			line, err := json.Marshal(flow)
			if err != nil {
				return fmt.Errorf("render JSON: %w", err)
			}
			c.UI.Output(string(line))
			return nil
		}
		if dict {
			text, err := flowDict(flow)
			c.UI.Output(text) // with an empty line after it
			return err
		}
		at := flow.Time.Local().Format("15:04:05")
		if flow.Lost > 0 {
			c.UI.Output(c.Paint(base.Red, fmt.Sprintf("%-8s  lost: %s", at, lossText(flow))))
			return nil
		}
		line := flowColumns(at, sourceText(flow, numeric), destinationText(flow, numeric), flow.Verdict)
		if flow.Refused {
			line = c.Paint(base.Red, line)
		}
		c.UI.Output(line)
		return nil
	})
}

// lossText says what a reader does not get, and what to do about it.
func lossText(flow api.Flow) string {
	switch flow.Cause {
	case api.LostInKernel:
		return fmt.Sprintf("%d of %s: more than its share of the kernel's ring", flow.Lost, base.OrDash(base.Short(flow.Source.AllocID)))
	case api.LostByMemory:
		return fmt.Sprintf("%d older ones: flows { memory } of the agent is full", flow.Lost)
	case api.LostByReader:
		return fmt.Sprintf("%d: what reads them is slower than connections happen", flow.Lost)
	}
	return fmt.Sprint(flow.Lost)
}

// FlowSummary is what -summary -json prints.
type FlowSummary struct {
	Schema int               `json:"schema"`
	Edges  []api.CountedEdge `json:"edges"`
	Lost   uint64            `json:"lost"` // connections that are not among them
}

func summariseFlows(c *base.Command, query api.FlowQuery, numeric bool) error {
	counts := make(map[api.Edge]uint64)
	seen := FlowSummary{Schema: 1, Edges: []api.CountedEdge{}}
	err := readFlows(c, query, func(flow api.Flow) error {
		if flow.Lost > 0 {
			seen.Lost += flow.Lost
			return nil
		}
		counts[flow.Edge()]++
		return nil
	})
	if err != nil {
		return err
	}
	for edge, count := range counts {
		seen.Edges = append(seen.Edges, api.CountedEdge{Edge: edge, Count: count})
	}
	text := func(e api.CountedEdge) (source, destination string) {
		flow := api.Flow{Source: e.Source, Destination: e.Destination}
		return sourceText(flow, numeric), destinationText(flow, numeric)
	}
	slices.SortFunc(seen.Edges, func(a, b api.CountedEdge) int {
		from, to := text(a)
		fromB, toB := text(b)
		return cmp.Or(cmp.Compare(b.Count, a.Count), strings.Compare(from, fromB), strings.Compare(to, toB), strings.Compare(a.Verdict, b.Verdict))
	})
	if c.JSON {
		return c.PrintJSON(seen)
	}
	c.UI.Output(c.Paint(base.Bold, flowColumns("COUNT", "SOURCE", "DESTINATION", "VERDICT")))
	for _, e := range seen.Edges {
		source, destination := text(e)
		line := flowColumns(strconv.FormatUint(e.Count, 10), source, destination, e.Verdict)
		if e.Refused {
			line = c.Paint(base.Red, line)
		}
		c.UI.Output(line)
	}
	if seen.Lost > 0 {
		c.UI.Output(c.Paint(base.Red, fmt.Sprintf("%-8d  lost: these connections are not among those above", seen.Lost)))
	}
	return nil
}

// The widths of a line of 80 columns, whose neighbours are not known yet.
const (
	sourceWidth      = 20
	destinationWidth = 22
)

func flowColumns(first, source, destination, verdict string) string {
	return fmt.Sprintf("%-8s  %-*s  %-*s  %s", first, sourceWidth, base.Clip(base.Cell(source), sourceWidth, ""),
		destinationWidth, base.Clip(base.Cell(destination), destinationWidth, ":"), verdict)
}

// sourceText names who opened a connection: its job with the task, or the group
// where that is not known; else its allocation; else its address.
func sourceText(flow api.Flow, numeric bool) string {
	s := flow.Source
	switch {
	case numeric && s.IP.IsValid():
		return s.IP.String()
	case numeric && s.PID != 0:
		return fmt.Sprintf("%s/%d", base.OrDash(base.Short(s.AllocID)), s.PID)
	case s.Job != "" && !numeric:
		return s.Job + "/" + cmp.Or(s.Task, s.TaskGroup)
	case s.AllocID != "":
		return base.Short(s.AllocID)
	case s.IP.IsValid():
		return s.IP.String()
	}
	return "-"
}

// destinationText names what was dialled: the service, or whose address it is.
func destinationText(flow api.Flow, numeric bool) string {
	d := flow.Destination
	name := d.Service
	if name == "" && d.Job != "" {
		name = d.Job + "/" + d.TaskGroup
	}
	if name == "" {
		name = base.Short(d.AllocID)
	}
	if numeric || name == "" {
		if !d.IP.IsValid() {
			return "-"
		}
		return netip.AddrPortFrom(d.IP, d.Port).String()
	}
	return name + ":" + strconv.Itoa(int(d.Port))
}
