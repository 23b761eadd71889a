// SPDX-License-Identifier: MPL-2.0

// Package health is the tables of what can be wrong on a node: problems with their
// code, severity and remedy, and the checks of a node before and after it is set up.
package health

import (
	"fmt"
	"strings"

	"github.com/weirmesh/weir/redirect/bpfmap"
)

// Problem is something that is wrong, and what to do about it. NewProblem makes
// one; its code is a heading of docs/runbook.md.
type Problem struct {
	Code     string   `json:"code"`
	Severity Severity `json:"severity"`
	Subject  string   `json:"subject"`  // what has it; empty: the node
	AllocID  string   `json:"alloc_id"` // of the one allocation that has it
	What     string   `json:"what"`
	Remedy   string   `json:"remedy"`
}

// Severity says how much a problem matters.
type Severity string

// The severities.
const (
	SeverityError   Severity = "error"   // connections fail or are not protected, or nothing can be changed
	SeverityWarning Severity = "warning" // all is served, but less well than it could be, or not for long
)

// NewProblem makes a problem of a code.
func NewProblem(code ProblemCode, remedy, what string) Problem {
	return Problem{Code: code.String(), Severity: code.Severity(), What: what, Remedy: remedy}
}

// Of is the problem as one of that subject, an allocation where id says which.
func (p Problem) Of(subject, id string) Problem {
	p.Subject, p.AllocID = subject, id
	return p
}

// Text is the problem in a line, without its remedy. What it has of others, names and
// errors, may have line ends of its own.
func (p Problem) Text() string {
	text := p.What
	if p.Subject != "" {
		text = p.Subject + ": " + text
	}
	if p.Code != "" {
		text += " [" + p.Code + "]"
	}
	return strings.ReplaceAll(text, "\n", "; ")
}

// String is the problem in a line of a log.
func (p Problem) String() string { return p.Text() + "; remedy: " + p.Remedy }

// ProblemCode is a row of the table of problems. Its name is a promise to
// scripts, alerts and readers of the runbook.
type ProblemCode uint

// The codes of problems: of the node, of its agent, of an allocation.
const (
	ProblemNoCgroup2 ProblemCode = iota
	ProblemNotLoaded
	ProblemOtherLayout
	ProblemOtherVersion
	ProblemLoadIncomplete
	ProblemProgramDetached
	ProblemPinsLost
	ProblemUnpinnedPrograms
	ProblemStateUnreadable
	ProblemStateReadOnly
	ProblemLockHeld
	ProblemRecordUnreadable
	ProblemRecordMissing
	ProblemTableFull
	ProblemHostPortTaken

	ProblemAgentNotRunning
	ProblemAgentStalled
	ProblemRepairFailed
	ProblemDiscovery
	ProblemConsulUnreachable
	ProblemConsulForbidden
	ProblemConsulHidden
	ProblemConsulWatch
	ProblemConsulFamily
	ProblemConsulNames
	ProblemDocker
	ProblemNetworkWatch

	ProblemRegistration
	ProblemForeignRegistration
	ProblemUnprovenRegistration
	ProblemUnclaimedProxy
	ProblemNotRegistered
	ProblemModeMismatch
	ProblemProxyPorts
	ProblemHostPortInMesh
	ProblemUnprotected
	ProblemNamespaceGone
	ProblemLeftBehind
	ProblemResultMissing
	ProblemIncomplete
	ProblemAddressesChanged
	ProblemRowsMissing
	ProblemRoutesMissing
	ProblemFilterMissing
	ProblemFamiliesOpen
	ProblemPacketSocketOpen
	ProblemLookupMissing
	ProblemOtherInstance
	ProblemListenerMissing
	ProblemProxyNotListening
	ProblemTaskAsProxy
	ProblemStepFailed

	ProblemGuardRefuses

	ProblemRefusedNoProxy
	ProblemRefusedInboundNoProxy
	ProblemRefusedTable
	ProblemRefusedBudget
	ProblemRefusedShare
	ProblemRefusedListenerIdentity
	ProblemRefusedListenerAddress
	ProblemRefusedListenerTable
	ProblemMax
)

// problemRow is what the table has of a code.
type problemRow struct {
	name     string
	severity Severity
	title    string
}

// row is the table of problems.
func (c ProblemCode) row() problemRow {
	const failure, warning = SeverityError, SeverityWarning
	table := [ProblemMax]problemRow{
		ProblemNoCgroup2:        {"no-cgroup-v2", failure, "the root of cgroup v2 cannot be found"},
		ProblemNotLoaded:        {"not-loaded", failure, "the programs are not loaded"},
		ProblemOtherLayout:      {"other-layout", failure, "maps of another layout are loaded"},
		ProblemOtherVersion:     {"other-version", warning, "the node runs programs of another version"},
		ProblemLoadIncomplete:   {"load-incomplete", failure, "an allocation did not come along when the programs were loaded or upgraded"},
		ProblemProgramDetached:  {"program-detached", failure, "a program is not attached"},
		ProblemPinsLost:         {"pins-lost", failure, "the programs run, but no pin leads to them"},
		ProblemUnpinnedPrograms: {"unpinned-programs", failure, "a second set of programs is attached that no pin leads to"},
		ProblemStateUnreadable:  {"state-unreadable", failure, "something of the node's state cannot be read"},
		ProblemStateReadOnly:    {"state-read-only", failure, "a directory of the state is read-only"},
		ProblemLockHeld:         {"lock-held", failure, "a stopped process has the lock"},
		ProblemRecordUnreadable: {"record-unreadable", failure, "the record of an allocation cannot be read"},
		ProblemRecordMissing:    {"record-missing", failure, "the record of an allocation is gone"},
		ProblemTableFull:        {"table-full", warning, "a table of the node is nearly full"},
		ProblemHostPortTaken:    {"host-port-taken", failure, "an allocation that ended holds a host port of one that runs"},

		ProblemAgentNotRunning:   {"agent-not-running", failure, "the agent does not run or does not answer"},
		ProblemAgentStalled:      {"agent-stalled", failure, "the agent's loop makes no pass"},
		ProblemRepairFailed:      {"repair-failed", failure, "the agent cannot repair the data path"},
		ProblemDiscovery:         {"discovery-failed", failure, "the agent cannot find the node's allocations"},
		ProblemConsulUnreachable: {"consul-unreachable", failure, "Consul does not answer"},
		ProblemConsulForbidden:   {"consul-forbidden", failure, "Consul forbids a question to the agent's token"},
		ProblemConsulHidden:      {"consul-services-hidden", failure, "Consul hides services of the node from the agent's token"},
		ProblemConsulWatch:       {"consul-watch", warning, "changes in Consul are found by polling"},
		ProblemConsulFamily:      {"consul-family-unknown", warning, "the address family of listeners is not known"},
		ProblemConsulNames:       {"consul-names-unknown", warning, "services that come and go are noticed late"},
		ProblemDocker:            {"docker-unreachable", warning, "Docker does not answer"},
		ProblemNetworkWatch:      {"network-watch", warning, "changes of addresses and routes are found late"},

		ProblemRegistration:         {"registration-unusable", failure, "a registration in Consul cannot be used"},
		ProblemForeignRegistration:  {"foreign-registration", failure, "a registration names an allocation that does not run that proxy"},
		ProblemUnprovenRegistration: {"unproven-registration", failure, "a registration names an allocation that does not show that proxy yet"},
		ProblemUnclaimedProxy:       {"unclaimed-proxy", warning, "a registered proxy is no allocation's"},
		ProblemNotRegistered:        {"not-registered", warning, "Consul has no registration of an allocation's proxy"},
		ProblemModeMismatch:         {"mode-mismatch", failure, "job and Consul differ about transparent mode"},
		ProblemProxyPorts:           {"proxy-ports", failure, "proxies of one allocation want the same port, or are too many"},
		ProblemHostPortInMesh:       {"host-port-in-mesh", failure, "a host port leads to the proxy's mTLS listener"},
		ProblemUnprotected:          {"unprotected", failure, "an allocation of the mesh is not under Weir"},
		ProblemNamespaceGone:        {"namespace-gone", failure, "the namespace of an allocation is gone"},
		ProblemLeftBehind:           {"left-behind", warning, "an allocation that ended left its network behind"},
		ProblemResultMissing:        {"result-missing", failure, "libcni has no result of an allocation"},
		ProblemIncomplete:           {"change-incomplete", failure, "an ADD, CHECK or change did not finish"},
		ProblemAddressesChanged:     {"addresses-changed", failure, "addresses or routes of an allocation changed"},
		ProblemRowsMissing:          {"rows-missing", failure, "rows of an allocation are missing"},
		ProblemRoutesMissing:        {"routes-missing", failure, "routes to the proxy are missing"},
		ProblemFilterMissing:        {"filter-missing", failure, "the filter of forwarded packets is missing"},
		ProblemFamiliesOpen:         {"families-open", warning, "the egress guard does not see sockets of other families than IP"},
		ProblemPacketSocketOpen:     {"packet-socket-open", failure, "a packet socket is older than the egress guard"},
		ProblemLookupMissing:        {"lookup-missing", failure, "the lookup program is not attached or not pinned"},
		ProblemOtherInstance:        {"other-instance", failure, "another instance of Weir is attached to the namespace"},
		ProblemListenerMissing:      {"listener-missing", failure, "a listener of the proxy is not registered"},
		ProblemProxyNotListening:    {"proxy-not-listening", failure, "the proxy of an allocation does not listen"},
		ProblemTaskAsProxy:          {"task-as-proxy", failure, "a task under the proxy's UID took the place of the proxy"},
		ProblemStepFailed:           {"step-failed", failure, "a step of the agent's for an allocation fails"},

		ProblemGuardRefuses: {"guard-refuses", warning, "the guard refuses connections to an allocation that it had let some in to"},

		ProblemRefusedNoProxy:          {bpfmap.RefusedNoProxy.String(), failure, bpfmap.RefusedNoProxy.Describe()},
		ProblemRefusedInboundNoProxy:   {bpfmap.RefusedInboundNoProxy.String(), failure, bpfmap.RefusedInboundNoProxy.Describe()},
		ProblemRefusedTable:            {bpfmap.RefusedTable.String(), failure, bpfmap.RefusedTable.Describe()},
		ProblemRefusedBudget:           {bpfmap.RefusedBudget.String(), failure, bpfmap.RefusedBudget.Describe()},
		ProblemRefusedShare:            {bpfmap.RefusedShare.String(), failure, bpfmap.RefusedShare.Describe()},
		ProblemRefusedListenerIdentity: {bpfmap.RefusedListenerIdentity.String(), failure, bpfmap.RefusedListenerIdentity.Describe()},
		ProblemRefusedListenerAddress:  {bpfmap.RefusedListenerAddress.String(), failure, bpfmap.RefusedListenerAddress.Describe()},
		ProblemRefusedListenerTable:    {bpfmap.RefusedListenerTable.String(), failure, bpfmap.RefusedListenerTable.Describe()},
	}
	if c >= ProblemMax {
		panic(fmt.Sprintf("problem code %d is not in the table", uint(c)))
	}
	return table[c]
}

// String is the code as commands, JSON and metrics show it.
func (c ProblemCode) String() string { return c.row().name }

// Severity is that of each problem with the code.
func (c ProblemCode) Severity() Severity { return c.row().severity }

// Title says in a few words what is wrong.
func (c ProblemCode) Title() string { return c.row().title }

// AllProblemCodes lists the table in its order.
func AllProblemCodes() []ProblemCode {
	all := make([]ProblemCode, ProblemMax)
	for i := range all {
		all[i] = ProblemCode(i)
	}
	return all
}
