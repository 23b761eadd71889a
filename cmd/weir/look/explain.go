// SPDX-License-Identifier: MPL-2.0

package look

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/mitchellh/go-wordwrap"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/redirect/explain"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// Explained is the answer of explain, as JSON has it.
type Explained struct {
	Schema    int               `json:"schema"`
	AllocID   string            `json:"alloc_id"`
	Verdict   *string           `json:"verdict"` // null without a destination
	Refused   *bool             `json:"refused"`
	Held      bool              `json:"held"` // not refused yet: the start gate lets it wait for the proxy
	Steps     []explain.Step    `json:"steps"`
	SentTo    *netip.AddrPort   `json:"sent_to"` // the listener in the namespace that gets it; null: it goes where it was dialled
	Listens   *bool             `json:"listens"` // whether anybody listens there; null: not of the namespace
	Service   *string           `json:"service"`
	Intention *string           `json:"intention"` // Consul's own answer; null: not known, or it has no say
	Instances *api.Instances    `json:"instances"` // likewise
	Unknown   []api.Unknown     `json:"unknown"`   // what could not be looked at, which is neither "allowed" nor "denied"
	Remedy    string            `json:"remedy"`
	Settings  []explain.Setting `json:"settings"` // without a destination
}

// explainFlags are what explain is told beside its operands.
type explainFlags struct {
	destination string
	uid         string
	task        string
	inbound     bool
	from        string
	mapped      bool
}

func NewExplain(env base.Env) *base.Command {
	var f explainFlags
	c := base.New(env, "explain", "Say what happens to a connection of an allocation, and why", `  Decides as the kernel's programs would now, rule by rule, what becomes of a TCP
  connection: the value that each rule looks at, where it comes from, and what
  lies behind. Without a destination it prints all that decides about the
  allocation's connections.

  ALLOC is the beginning of an allocation's ID, or a job that has one allocation
  on this node. The destination is ADDR:PORT or NAME[:PORT]. NAME is an upstream
  of the allocation, else a service of the mesh by its virtual IP, else it is
  resolved on this node. With -inbound it may be PORT alone, which is that of the
  allocation's first address.

  The source of a value is "job" (what the job asked for at ADD, with what the
  node's configuration adds), "consul", "agent" (the operator's policy or the
  service's metadata), "default", or "node" (read from the namespace).

  The socket is taken to be bound to no address and no device. Where the proxy
  makes the connection, the agent asks Consul whether an intention allows it and
  how many instances of the service are healthy. What Consul does not answer, for
  want of a right of the agent's token or because no agent runs, is told as not
  looked at; it counts as neither allowed nor denied.

  The exit code is 0 where the connection is let through, 2 where it would fail,
  and 1 where that cannot be told.

  Example, for all of an allocation, of a connection, and of one from outside:

      $ weir explain 0b5d
      $ weir explain 0b5d 10.0.0.7:5432 -uid 1000
      $ weir explain demo 8080 -inbound -from 10.0.0.9`).WithPaths().WithJSON().WithSelection()
	c.WithOperands(2, "ALLOC [ADDR:PORT | NAME[:PORT]]") // completed as the first one is
	c.Flags.StringVar(&f.uid, "uid", "", "user `ID` that the task runs under (default: one that no rule names)")
	c.Flags.StringVar(&f.task, "task", "", "`name` of the task that connects; the agent knows which one is the proxy")
	c.Flags.BoolVar(&f.inbound, "inbound", false, "explain a connection from outside to the allocation")
	c.Flags.StringVar(&f.from, "from", "", "`address` that it comes from, with -inbound")
	c.Flags.BoolVar(&f.mapped, "ipv6-socket", false, "an IPv4 address is dialled through an IPv6 socket, as ::ffff:a.b.c.d")
	c.Do = func() (int, error) { return explainOne(c, f) }
	return c
}

func explainOne(c *base.Command, f explainFlags) (int, error) {
	if c.Operand() == "" {
		return 1, errors.New("name an allocation: 'weir workloads' lists them")
	}
	if len(c.Operands) > 1 {
		f.destination = c.Operands[1]
	}
	datapath := c.Datapath()
	view, _, _ := c.Agent()
	record, err := workloadOf(c, datapath, view)
	if err != nil {
		return 1, err
	}
	answer := Explained{Schema: 1, AllocID: base.AllocationOf(record), Steps: []explain.Step{}, Settings: []explain.Setting{}, Unknown: []api.Unknown{}}
	if f.destination == "" {
		return explainWhole(c, datapath, record, answer, view)
	}
	connection, service, err := connection(c, f, record, view)
	if err != nil {
		return 1, err
	}
	e, err := datapath.Explain(record.Key, connection)
	if err != nil {
		return 1, err
	}
	verdict, fails := e.Verdict.String(), e.Verdict.Refused()
	refused := fails
	fails = fails || e.Local && !e.Listens
	answer.Verdict, answer.Refused, answer.Steps, answer.Remedy = &verdict, &refused, e.Steps, nameProxyTask(explainRemedy(e, connection, record), record.Key, view)
	answer.Held = e.Held
	if e.SentTo.IsValid() {
		answer.SentTo = &e.SentTo
	}
	if e.Local {
		answer.Listens = &e.Listens
	}
	if known := serviceOf(e, connection, record.Key, view); known != "" {
		service, answer.Service = known, &known
	}
	var consul api.Behind
	if meetsConsul(e, connection, service) {
		consul = askConsul(c, api.BehindQuery{Key: record.Key, To: connection.Destination, SentTo: e.SentTo, Service: service})
		fails = answer.take(consul) || fails
		if consul.Source != "" {
			answer.Remedy = strings.ReplaceAll(answer.Remedy, anyProxyTask, "connect-proxy-"+consul.Source)
		}
	}
	code := 0
	if fails {
		code = 2
	}
	if c.JSON {
		return code, c.PrintJSON(answer)
	}
	c.UI.Output(renderExplanation(c, e, connection, record, answer, consul, fails))
	return code, nil
}

func explainWhole(c *base.Command, datapath base.Datapath, record inspect.Record, answer Explained, view api.Status) (int, error) {
	settings, silent, err := datapath.Settings(record.Key)
	if err != nil {
		return 1, err
	}
	answer.Settings = settings
	code := 0
	if silent {
		code, answer.Remedy = 2, nameProxyTask(proxyRemedy(record), record.Key, view)
	}
	if c.JSON {
		return code, c.PrintJSON(answer)
	}
	var text strings.Builder
	fmt.Fprintln(&text, c.Paint(base.Bold, base.WorkloadName(record.Request.Job.ID, record.Request.Job.Group, record.Key)))
	rows := [][]string{{"SETTING", "VALUE", "SOURCE"}}
	for _, s := range settings {
		const width = 36 // of a value: three columns stay within 80
		for i, line := range strings.Split(wordwrap.WrapString(s.Value, width), "\n") {
			if i == 0 {
				rows = append(rows, []string{s.Name, line, s.Source})
			} else {
				rows = append(rows, []string{"", line, ""})
			}
		}
	}
	fmt.Fprintln(&text, base.Table("  ", rows))
	for _, w := range view.Workloads {
		if w.Key == record.Key {
			fmt.Fprintf(&text, "\nAgent: %s, Consul: %s\n", w.State, seenWorkload{Agent: &w}.consul())
		}
	}
	if silent {
		fmt.Fprintf(&text, "\n%s\n%s\n", c.Paint(base.Red, base.Hang("A proxy does not listen: connections to it are refused.")), base.Hang("Remedy: "+answer.Remedy))
	}
	c.UI.Output(strings.TrimRight(text.String(), "\n"))
	return code, nil
}

// workload is the one that the first operand names.
func workloadOf(c *base.Command, datapath base.Datapath, view api.Status) (inspect.Record, error) {
	known, unreadable := datapath.Records()
	if unreadable != nil && !errors.Is(unreadable, store.ErrUnreadable) {
		return inspect.Record{}, unreadable
	}
	list, err := base.SelectFrom(c, known, base.NamedRecord)
	switch {
	case len(list) == 1:
		return list[0], nil
	case len(list) > 1:
		var names []string
		for _, w := range list {
			names = append(names, base.WorkloadName(w.Request.Job.ID, w.Request.Job.Group, w.Key))
		}
		return inspect.Record{}, fmt.Errorf("%q is several: name one of %s", c.Operand(), strings.Join(names, ", "))
	}
	for _, w := range view.Workloads {
		if w.ID != "" && strings.HasPrefix(w.ID, c.Operand()) || w.Job == c.Operand() {
			return inspect.Record{}, fmt.Errorf("allocation %s is not under Weir (%s): see 'weir workloads'", base.Short(w.ID), w.State)
		}
	}
	return inspect.Record{}, errors.Join(err, unreadable)
}

// connection is what the flags and the destination name, and the service where that is the name
// of one.
func connection(c *base.Command, f explainFlags, w inspect.Record, view api.Status) (connection explain.Connection, service string, err error) {
	connection = explain.Connection{UID: explain.NoUID, IPv6Socket: f.mapped}
	if f.from != "" && !f.inbound {
		return connection, "", errors.New("-from: it needs -inbound")
	}
	if f.uid != "" {
		uid, err := strconv.ParseUint(f.uid, 10, 32)
		if err != nil {
			return connection, "", fmt.Errorf("-uid %q: want a number", f.uid)
		}
		connection.UID = uint32(uid)
	}
	if f.task != "" {
		if err := asTask(&connection, f, w, view); err != nil {
			return connection, "", err
		}
	}
	if f.inbound {
		connection, err = inboundConnection(connection, f, w)
		return connection, "", err
	}
	connection.Destination, service, err = resolve(c, f.destination, w, view)
	return connection, service, err
}

// asTask makes the connection that of a task: the proxy's where the agent knows it as the proxy.
func asTask(connection *explain.Connection, f explainFlags, w inspect.Record, view api.Status) error {
	for _, seen := range view.Workloads {
		if seen.Key != w.Key || !slices.Contains(strings.FieldsFunc(seen.Task, func(r rune) bool { return r == ' ' || r == ',' }), f.task) {
			continue
		}
		if f.uid != "" && connection.UID != w.Request.ProxyUID {
			return fmt.Errorf("-task %s is the proxy, which has UID %d, and -uid says %s", f.task, w.Request.ProxyUID, f.uid)
		}
		connection.UID, connection.Proxy = w.Request.ProxyUID, true
	}
	return nil
}

func inboundConnection(connection explain.Connection, f explainFlags, w inspect.Record) (explain.Connection, error) {
	from := netip.MustParseAddr("192.0.2.1") // any address that is not the allocation's
	if f.from != "" {
		var err error
		if from, err = netip.ParseAddr(f.from); err != nil {
			return connection, fmt.Errorf("-from %q: want an address", f.from)
		}
	}
	connection.From = netip.AddrPortFrom(from, 0)
	if port, err := strconv.ParseUint(f.destination, 10, 16); err == nil && len(w.Request.Addresses) > 0 {
		connection.Destination = netip.AddrPortFrom(w.Request.Addresses[0], uint16(port))
		return connection, nil
	}
	var err error
	if connection.Destination, err = netip.ParseAddrPort(f.destination); err != nil {
		return connection, fmt.Errorf("destination %q: with -inbound want ADDR:PORT or PORT, of the allocation", f.destination)
	}
	return connection, nil
}

// resolve is the destination as an address: written as one, the virtual IP or the listener of an
// upstream or of another service, or what this node resolves the name to.
func resolve(c *base.Command, text string, w inspect.Record, view api.Status) (to netip.AddrPort, service string, err error) {
	fail := func(err error) (netip.AddrPort, string, error) { return netip.AddrPort{}, "", err }
	if to, err := netip.ParseAddrPort(text); err == nil {
		return to, "", nil
	}
	if addr, err := netip.ParseAddr(text); err == nil {
		return fail(fmt.Errorf("destination %s: name a port too", addr))
	}
	host, port := text, uint16(0)
	if head, tail, found := strings.Cut(text, ":"); found {
		number, err := strconv.ParseUint(tail, 10, 16)
		if err != nil {
			return fail(fmt.Errorf("destination %q: want ADDR:PORT or NAME[:PORT]", text))
		}
		host, port = head, uint16(number)
	}
	for _, upstream := range upstreamsOf(w, view) {
		if upstream.Name != strings.TrimSuffix(host, ".virtual.consul") {
			continue
		}
		if len(upstream.Addresses) == 0 {
			return upstream.Listener, upstream.Name, nil
		}
		if port == 0 {
			port = upstream.Listener.Port()
		}
		return netip.AddrPortFrom(upstream.Addresses[0], port), upstream.Name, nil
	}
	if port == 0 {
		return fail(fmt.Errorf("destination %q: no upstream of the allocation has this name; any other needs a port", text))
	}
	name := ofMesh(host)
	if addr, found := virtualIP(c, api.BehindQuery{Key: w.Key, Service: name}); found {
		return netip.AddrPortFrom(addr, port), name, nil
	}
	ctx, cancel := context.WithTimeout(c.Ctx, 2*time.Second)
	defer cancel()
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil || len(found) == 0 {
		return fail(fmt.Errorf("destination %q: no upstream of the allocation, no service with a virtual IP that Consul tells, and this node cannot resolve it: %w", text, err))
	}
	return netip.AddrPortFrom(found[0].Unmap(), port), "", nil
}

// upstreamsOf are those of the record, then those that the agent knows.
func upstreamsOf(w inspect.Record, view api.Status) []workload.Upstream {
	list := slices.Clone(w.MeshConfig.Upstreams)
	for _, seen := range view.Workloads {
		if seen.Key != w.Key {
			continue
		}
		for _, u := range seen.Upstreams {
			list = append(list, workload.Upstream{Name: u.Name, Addresses: u.VirtualIPs, Listener: u.Listener})
		}
	}
	return list
}

// serviceOf names the service behind the destination: by the allocation's own upstreams, else by
// those of any allocation of the node, because a virtual IP is the same for all.
func serviceOf(e explain.Explanation, connection explain.Connection, key workload.AttachmentID, view api.Status) string {
	if e.Service != "" || connection.From.IsValid() {
		return e.Service
	}
	for _, seen := range view.Workloads {
		for _, u := range seen.Upstreams {
			if slices.Contains(u.VirtualIPs, connection.Destination.Addr()) || seen.Key == key && u.Listener == connection.Destination {
				return u.Name
			}
		}
	}
	return ""
}
