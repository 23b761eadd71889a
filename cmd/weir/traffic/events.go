// SPDX-License-Identifier: MPL-2.0

package traffic

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/redirect/store"
)

func NewEvents(env base.Env) *base.Command {
	c := base.New(env, "events", "Show connections as they happen", `  Prints a line for each connection that is redirected, refused or passed by:
  when, which workload, the verdict, who dialled, what was dialled and where it
  was sent. Without -f it stops after a moment; with -f only at an interrupt.
  With -json each line is a JSON object.

  Where the agent runs and records flows, it is the one reader of the kernel's
  events, and tells them to this command. Without it the command reads them.

  Events cost the node something only while somebody reads them. Each workload
  has its share of the room for them, which no other takes from it. One that the
  reader is too slow for is lost; the connection never is, and "weir verdicts"
  counts all. A line with the verdict "lost" says how many of which workload,
  within a second and at the end, and the exit code is 1 then.

  With an allocation or a job only their connections and losses are shown.

  Follow the connections of job api:

      $ weir events -f api`).WithPaths().WithJSON().WithSelection()
	follow := c.Flags.Bool("f", false, "go on until interrupted")
	duration := c.Flags.Duration("duration", 2*time.Second, "how `long` to listen without -f")
	c.Do = func() (int, error) {
		ctx := c.Ctx
		if !*follow {
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, *duration)
			defer cancel()
		}
		datapath := c.Datapath()
		names, err := newEventNames(c, datapath)
		if err != nil {
			return 1, err
		}
		if !c.JSON {
			c.UI.Output(c.Paint(base.Bold, eventColumns("TIME", "WORKLOAD", "VERDICT", "UID", "PID", "ORIGIN -> DESTINATION")))
		}
		var lost uint64
		err = readEvents(c, ctx, datapath, func(event monitor.Event) error {
			from := names.of(event.Cookie)
			if !from.selected {
				return nil
			}
			lost += event.Lost
			if c.JSON {
				line, err := json.Marshal(event)
				if err != nil {
					return fmt.Errorf("render JSON: %w", err)
				}
				c.UI.Output(string(line))
				return nil
			}
			c.UI.Output(renderEvent(c, event, from.name))
			return nil
		})
		if lost > 0 {
			err = errors.Join(err, fmt.Errorf("%d events were lost: what reads them is slower than connections happen", lost))
		}
		return 0, err
	}
	return c
}

// readEvents reads the kernel's ring, or has the agent tell what it reads from
// it: the ring has one reader.
func readEvents(c *base.Command, ctx context.Context, datapath base.Datapath, deliver func(monitor.Event) error) error {
	err := c.AskEvents(ctx, c.StateDir(), deliver)
	if errors.Is(err, api.ErrNotRunning) || errors.Is(err, api.ErrFlowsOff) || errors.Is(err, api.ErrFlowsProblem) {
		return datapath.Events(ctx, deliver)
	}
	return err
}

// eventNames finds the names of the workloads that events come from, and whether
// they are asked about. A workload may come while events are read, so an unknown
// one is looked up anew.
type eventNames struct {
	datapath base.Datapath
	chosen   base.Selection
	known    map[uint64]eventSource
}

type eventSource struct {
	name     string
	selected bool
}

func newEventNames(c *base.Command, datapath base.Datapath) (*eventNames, error) {
	n := &eventNames{datapath: datapath, known: map[uint64]eventSource{}}
	list, err := datapath.Verdicts()
	if err != nil {
		return nil, err
	}
	if n.chosen, err = base.Selected(c, list, countedBy); err != nil {
		return nil, err
	}
	n.learn(list)
	return n, nil
}

func (n *eventNames) learn(list []inspect.WorkloadVerdicts) {
	for _, w := range list {
		n.known[w.Cookie] = eventSource{base.WorkloadName(w.Job, w.Group, w.Key), n.chosen.Has(countedBy(w))}
	}
}

func (n *eventNames) of(cookie uint64) eventSource {
	if source, ok := n.known[cookie]; ok {
		return source
	}
	// It stays unknown where it was removed meanwhile, or cannot be read.
	n.known[cookie] = eventSource{fmt.Sprintf("netns %d", cookie), n.chosen == base.Selection{}}
	if list, err := n.datapath.Verdicts(); err == nil || errors.Is(err, store.ErrUnreadable) {
		n.learn(list)
	}
	return n.known[cookie]
}

func renderEvent(c *base.Command, event monitor.Event, workload string) string {
	if event.Verdict == bpfmap.EventsLost {
		return c.Paint(base.Red, eventColumns(event.Time.Format("15:04:05.000000"), workload, event.Name, "-", "-",
			fmt.Sprintf("%d events of this workload are not shown", event.Lost)))
	}
	uid, pid := "-", "-"
	if event.PID != 0 { // inbound, and of a socket that is older than the redirect, nobody is known
		uid, pid = strconv.FormatUint(uint64(event.UID), 10), strconv.FormatUint(uint64(event.PID), 10)
	}
	line := eventColumns(event.Time.Format("15:04:05.000000"), workload, event.Name, uid, pid,
		arrow(event.Source, event.Origin, event.Destination))
	if event.Verdict.Refused() {
		return c.Paint(base.Red, line)
	}
	return line
}

// arrow shows a connection's way: who dialled, where that is known; what was
// dialled; where it was sent, where that differs.
func arrow(source, origin, destination netip.AddrPort) string {
	text := origin.String()
	if source.IsValid() {
		text = source.String() + " -> " + text
	}
	if destination.IsValid() && destination != origin {
		text += " -> " + destination.String()
	}
	return text
}

// eventColumns lays out a line whose neighbours are not known yet.
func eventColumns(at, workload, verdict, uid, pid, way string) string {
	return fmt.Sprintf("%-15s  %-28s  %-24s  %6s  %7s  %s", at, base.Cell(workload), verdict, uid, pid, way)
}
