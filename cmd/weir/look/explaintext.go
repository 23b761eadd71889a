// SPDX-License-Identifier: MPL-2.0

package look

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"

	"github.com/mitchellh/go-wordwrap"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/explain"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// proxyRemedy says what to do where a proxy does not listen.
func proxyRemedy(w inspect.Record) string {
	return fmt.Sprintf("'nomad alloc logs %s %s' says why Envoy does not listen; 'weir events -f' names a listener that was not accepted",
		base.Short(base.AllocationOf(w)), anyProxyTask)
}

// nameProxyTask puts the name of the proxy's task into a remedy, as far as the agent
// knows it: by the process that listened, or by what is registered in Consul.
func nameProxyTask(remedy string, key workload.AttachmentID, view api.Status) string {
	for _, w := range view.Workloads {
		if w.Key != key {
			continue
		}
		task := w.Task
		if strings.Contains(task, ",") { // several are taken for it
			task = ""
		}
		for _, p := range w.Proxies {
			task = cmp.Or(task, p.Task)
		}
		return strings.ReplaceAll(remedy, anyProxyTask, cmp.Or(task, anyProxyTask))
	}
	return remedy
}

// anyProxyTask is the name of a proxy's task where its service is not known.
const anyProxyTask = "connect-proxy-SERVICE"

// renderExplanation shows each rule and then, in sentences, what becomes of the connection.
func renderExplanation(c *base.Command, e explain.Explanation, connection explain.Connection, w inspect.Record, answer Explained, consul api.Behind, fails bool) string {
	var text strings.Builder
	of := base.WorkloadName(w.Request.Job.ID, w.Request.Job.Group, w.Key)
	switch {
	case connection.From.IsValid():
		fmt.Fprintf(&text, "%s\n\n", base.Hang(fmt.Sprintf("A connection from %s to %s of %s", connection.From.Addr(), connection.Destination, of)))
	case connection.UID == explain.NoUID:
		fmt.Fprintf(&text, "%s\n\n", base.Hang(fmt.Sprintf("A connection of a task of %s to %s", of, connection.Destination)))
	default:
		fmt.Fprintf(&text, "%s\n\n", base.Hang(fmt.Sprintf("A connection of UID %d in %s to %s", connection.UID, of, connection.Destination)))
	}
	for i, step := range e.Steps {
		mark := " "
		if i == len(e.Steps)-1 {
			mark = ">"
		} else if step.Result == explain.ResultMatch {
			mark = "+"
		}
		detail := step.Detail
		if step.Source != "" {
			detail += " [" + step.Source + "]"
		}
		const indent, width = 18, 62
		detail = strings.ReplaceAll(wordwrap.WrapString(detail, width), "\n", "\n"+strings.Repeat(" ", indent))
		fmt.Fprintf(&text, "%s %-15s %s\n", mark, step.Rule, detail)
	}
	colour := base.Green
	if fails {
		colour = base.Red
	}
	fmt.Fprintf(&text, "\n%s\n", c.Paint(colour, base.Hang(fmt.Sprintf("Verdict: %s (%s)", e.Verdict, e.Verdict.Describe()))))
	if e.Held {
		fmt.Fprintln(&text, base.Hang("Not yet: the start gate is open, so the connection waits for the proxy to listen."))
	}
	if line := behind(e, connection.Destination); line != "" {
		fmt.Fprintln(&text, base.Hang(line))
	}
	if answer.Service != nil {
		fmt.Fprintf(&text, "Service: %s\n", *answer.Service)
	}
	text.WriteString(renderBehind(consul))
	if answer.Remedy != "" {
		fmt.Fprintln(&text, base.Hang("Remedy: "+answer.Remedy))
	}
	return strings.TrimRight(text.String(), "\n")
}

// behind says whether somebody takes the connection where it ends in the namespace.
func behind(e explain.Explanation, dialled netip.AddrPort) string {
	if !e.Local {
		return ""
	}
	to := dialled
	if e.SentTo.IsValid() {
		to = e.SentTo
	}
	if e.Listens {
		return fmt.Sprintf("Behind it: a socket listens on %s.", to)
	}
	return fmt.Sprintf("Behind it: nothing listens on %s, so the connection is refused there.", to)
}

// explainRemedy says what to do where a connection would fail.
func explainRemedy(e explain.Explanation, connection explain.Connection, w inspect.Record) string {
	if !e.Verdict.Refused() {
		if e.Local && !e.Listens {
			return "start what should listen there, or dial the port where it listens"
		}
		return ""
	}
	port := connection.Destination.Port()
	switch e.Verdict {
	case bpfmap.RefusedNoProxy, bpfmap.RefusedInboundNoProxy:
		return proxyRemedy(w)
	case bpfmap.RefusedInboundUnknown:
		return "the agent names the port as soon as the service is registered in Consul: 'weir workloads' says whether it is"
	case bpfmap.RefusedGuard:
		return fmt.Sprintf("map port %d in the job, exclude it with exclude_inbound_ports, give it an expose path, or let the client use the mesh", port)
	case bpfmap.RefusedEncoded:
		return "dial the service itself: 127.128.0.0/9 and fd77:6569:7200::/96 are Weir's own"
	case bpfmap.RefusedFamily:
		return "dial by the other address family, or let the proxy listen in both"
	case bpfmap.RefusedBroadcast:
		return "dial one address; where it must be, exclude it with exclude_outbound_cidrs"
	}
	return fmt.Sprintf("see %s in docs/runbook.md", e.Verdict)
}
