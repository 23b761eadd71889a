// SPDX-License-Identifier: MPL-2.0

package traffic

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/cmd/weir/top"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/store"
)

const topInterval = 2 * time.Second

func NewTop(env base.Env) *base.Command {
	c := base.New(env, "top", "Show what allocations do now, and what Weir costs for it", `  Shows connections and refusals a second, of the node and of each allocation, the
  destinations that are dialled most, what the agent takes of processor and memory,
  and how long our programs ran in the kernel. Counters are the kernel's, and what
  is dialled is told by the agent, where one runs and records flows.

  OUT/S is what tasks dial, IN/S what comes from outside; REFUSED/S is neither. What
  a proxy dials is not counted beside the connection of a task that it stands for.

  While it runs the kernel reads its clock before and after each program, all of
  the machine's, which makes each run a little longer. "weir top" says so where the
  kernel refuses.

  The view is drawn anew each -interval until it is interrupted. With -once it is
  one view, of one interval. With -json each is an object on a line of its own.

  Keep what the node did in ten seconds:

      $ weir top -once -interval 10s -json > top.json`).WithPaths().WithJSON()
	once := c.Flags.Bool("once", false, "one view, of one interval")
	interval := c.Flags.Duration("interval", topInterval, "how `long` to count for a view")
	most := c.Flags.Int("n", 10, "`count` of allocations and of destinations to show")
	c.Do = func() (int, error) {
		const least = 100 * time.Millisecond
		if *interval < least {
			return 1, fmt.Errorf("read -interval: %s is less than %s", *interval, least)
		}
		if *most < 1 {
			return 1, fmt.Errorf("read -n: %d: want 1 or more", *most)
		}
		return 0, runTop(c, *interval, *once, *most)
	}
	return c
}

func runTop(c *base.Command, interval time.Duration, once bool, most int) error {
	datapath := c.Datapath()
	counting, refusal := datapath.CountRunTime()
	if refusal == nil {
		defer counting.Close()
	}
	before, err := topSample(c, datapath, time.Now(), refusal)
	if err != nil {
		return err
	}
	clock := time.NewTicker(interval)
	defer clock.Stop()
	for {
		select {
		case <-c.Ctx.Done():
			return nil
		case <-clock.C:
		}
		after, err := topSample(c, datapath, before.At, refusal)
		if err != nil {
			return err
		}
		if err := showTop(c, top.Between(before, after), once, most); err != nil || once {
			return err
		}
		before = after
	}
}

// topSample is what was counted by now, and who talked to what since a moment.
func topSample(c *base.Command, datapath base.Datapath, since time.Time, refusal error) (s top.Sample, err error) {
	s.Verdicts, err = datapath.Verdicts()
	s.At = time.Now()
	if errors.Is(err, store.ErrUnreadable) {
		s.Notes = append(s.Notes, "left out: "+err.Error())
	} else if err != nil {
		return s, err
	}
	if refusal != nil {
		s.Notes = append(s.Notes, fmt.Sprintf("the kernel does not count how long programs run: %v", refusal))
	} else if s.Programs, err = datapath.RunTimes(); err != nil {
		return s, err
	}
	const timeout = 2 * time.Second
	ctx, cancel := context.WithTimeout(c.Ctx, timeout)
	defer cancel()
	switch traffic, err := c.AskTraffic(ctx, c.StateDir(), since); {
	case errors.Is(err, api.ErrNotRunning):
		s.Notes = append(s.Notes, "no agent runs: destinations are not known")
	case err != nil:
		s.Notes = append(s.Notes, fmt.Sprintf("destinations are not known: %v", err))
	default:
		s.Traffic = traffic
		if traffic.Problem != "" {
			s.Notes = append(s.Notes, "destinations are not known: "+traffic.Problem)
		}
	}
	return s, nil
}

func showTop(c *base.Command, report top.Report, once bool, most int) error {
	if c.JSON {
		line, err := json.Marshal(report)
		if err != nil {
			return fmt.Errorf("render JSON: %w", err)
		}
		c.UI.Output(string(line))
		return nil
	}
	text := renderTop(c, report, most)
	if !once && c.Terminal && c.Getenv("TERM") != "dumb" {
		c.Clear()
	} else if !once {
		text += "\n"
	}
	c.UI.Output(text)
	return nil
}

const topWidth = 80

func renderTop(c *base.Command, r top.Report, most int) string {
	total := fmt.Sprintf("%s/s out, %s/s in, ", perSecond(r.Total.Outbound), perSecond(r.Total.Inbound))
	refused := perSecond(r.Total.Refused) + "/s refused"
	if r.Total.Refused > 0 {
		refused = c.Paint(base.Red, refused)
	}
	var text strings.Builder
	fmt.Fprintf(&text, "%s\n", c.Paint(base.Bold, fmt.Sprintf("%s, over %.1f s", r.Time.Local().Format("15:04:05"), r.Seconds)))
	fmt.Fprintf(&text, "connections  %s%s\n", total, refused)
	if r.Agent != nil {
		fmt.Fprintf(&text, "agent        %s, %d MiB\n", ofACore(r.Agent.Cores), r.Agent.Memory>>20)
	}
	if r.Programs != nil {
		var cores float64
		for _, p := range r.Programs {
			cores += p.Cores
		}
		fmt.Fprintf(&text, "programs     %s\n", ofACore(cores))
	}
	for _, block := range []string{topAllocations(c, r, most), topDestinations(c, r, most), topPrograms(r)} {
		if block != "" {
			fmt.Fprintf(&text, "\n%s\n", block)
		}
	}
	for i, note := range r.Notes {
		if i == 0 {
			fmt.Fprintln(&text)
		}
		fmt.Fprintln(&text, c.Paint(base.Yellow, base.Hang(note)))
	}
	return strings.TrimRight(text.String(), "\n")
}

func topAllocations(c *base.Command, r top.Report, most int) string {
	rows := [][]string{{"ID", "JOB", "OUT/S", "IN/S", "REFUSED/S", "MOSTLY"}}
	quiet := 0
	for i, a := range r.Allocations {
		if a.All() == 0 {
			quiet++
		} else if i < most {
			rows = append(rows, []string{base.Short(a.AllocID), base.OrDash(strings.Trim(a.Job+"/"+a.TaskGroup, "/")), perSecond(a.Outbound), perSecond(a.Inbound), perSecond(a.Refused), Mostly(a)})
		}
	}
	left := len(r.Allocations) - quiet - (len(rows) - 1)
	text := ""
	if len(rows) > 1 {
		text = heading(c, base.Table("", base.Cut(rows, topWidth, 1))) + "\n"
	}
	if left > 0 {
		text += fmt.Sprintf("and %s more\n", base.CountOf(left, "allocation"))
	}
	if quiet > 0 {
		text += fmt.Sprintf("%s without a connection\n", base.CountOf(quiet, "allocation"))
	}
	if len(r.Allocations) == 0 {
		text = "no allocation is under Weir"
	}
	return strings.TrimRight(text, "\n")
}

// Mostly is the verdict that happened most. A refusal goes before what is let through, and
// a task's connection before that of the proxy which stands for it.
func Mostly(a top.Allocation) (name string) {
	for verdict, rate := range a.Verdicts {
		if proxy := bpfmap.Proxy.String(); verdict == proxy && name != "" {
			continue
		} else if name == proxy {
			name = ""
		}
		refused, before := strings.HasPrefix(verdict, "refused_"), strings.HasPrefix(name, "refused_")
		if name == "" || refused && !before || refused == before && (rate > a.Verdicts[name] || rate == a.Verdicts[name] && verdict < name) {
			name = verdict
		}
	}
	return name
}

func topDestinations(c *base.Command, r top.Report, most int) string {
	rows := [][]string{{"DESTINATION", "CONNECTIONS/S", "REFUSED/S", "FROM"}}
	for i, d := range r.Destinations {
		if i == most {
			break
		}
		from := sourceText(api.Flow{Source: d.Source}, false)
		if d.Sources > 1 {
			from += fmt.Sprintf(" and %d more", d.Sources-1)
		}
		rows = append(rows, []string{destinationText(api.Flow{Destination: d.Destination}, false), perSecond(d.Connections), perSecond(d.Refused), from})
	}
	if len(rows) == 1 {
		return ""
	}
	return heading(c, base.Table("", base.Cut(rows, topWidth, 0, 3)))
}

// topPrograms names what ran, the costliest first.
func topPrograms(r top.Report) string {
	rows := [][]string{{"PROGRAM", "RUNS/S", "EACH", "OF A CORE"}}
	for _, p := range r.Programs {
		if p.Runs == 0 {
			continue
		}
		title := strings.TrimPrefix(p.Name, "weir_")
		if p.Programs > 1 {
			title += fmt.Sprintf(" of %d allocations", p.Programs)
		}
		rows = append(rows, []string{title, perSecond(p.Runs), fmt.Sprintf("%.0f ns", p.Each), strings.TrimSuffix(ofACore(p.Cores), " of a core")})
	}
	if len(rows) == 1 {
		return ""
	}
	return base.Table("", rows)
}

// heading makes the first line of a table bold.
func heading(c *base.Command, text string) string {
	first, rest, _ := strings.Cut(text, "\n")
	return c.Paint(base.Bold, first) + "\n" + rest
}

func perSecond(rate float64) string { return fmt.Sprintf("%.1f", rate) }

func ofACore(cores float64) string { return fmt.Sprintf("%.2f %% of a core", cores*100) }

// ClearTerminal empties it, and begins at its top.
func ClearTerminal(out io.Writer) func() {
	return func() { _, _ = io.WriteString(out, "\x1b[H\x1b[2J") } // or it fails as what follows does
}
