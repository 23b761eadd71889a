// SPDX-License-Identifier: MPL-2.0

package server

import (
	"errors"
	"net/http"
	"runtime"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
)

// metrics is the handler of Prometheus' requests, with a registry of its own.
func (s *Server) metrics() http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(newCollector(s), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: 2})
}

// collector reads everything when it is asked, so that nothing is counted
// twice and a workload that is gone leaves no series behind.
type collector struct {
	server *Server
	all    []*prometheus.Desc // in the order of docs/metrics.md

	build, verdicts, workloads, inSync    *prometheus.Desc
	eventsLost, tableRows, tableLimit     *prometheus.Desc
	consulInSync, consulHidden, proxies   *prometheus.Desc
	consulReads, consulFailures, consulIn *prometheus.Desc
	actions, healthy                      *prometheus.Desc
	consulWatch, problems, unseen         *prometheus.Desc
	consulSince, consulApply              *prometheus.Desc
}

// workloadLabels name an attachment as Nomad's own metrics do, so that both can be
// joined; nomad_job because "job" is Prometheus' own. An allocation with several
// networks has an interface for each.
func workloadLabels() []string {
	return []string{"alloc_id", "namespace", "nomad_job", "task_group", "interface"}
}

func labelsOf(key workload.AttachmentID, job string, names workload.NomadNames) []string {
	return []string{names.AllocID, names.Namespace, job, names.TaskGroup, key.IfName}
}

func newCollector(s *Server) *collector {
	var all []*prometheus.Desc
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		all = append(all, prometheus.NewDesc("weir_"+name, help, labels, nil))
		return all[len(all)-1]
	}
	c := &collector{
		server:         s,
		build:          desc("build_info", "Always 1; what the agent is.", "version", "goversion"),
		verdicts:       desc("verdicts_total", "Connections by what was decided about them.", append(workloadLabels(), "verdict", "refused")...),
		eventsLost:     desc("events_lost_total", "Events that a reader of 'weir events' did not get.", workloadLabels()...),
		tableRows:      desc("table_rows", "Rows in use of each of the node's tables.", "table"),
		tableLimit:     desc("table_max_rows", "Rows that each of the node's tables holds at most.", "table"),
		workloads:      desc("workloads", "Allocations by what the agent makes of them.", "state", "mode", "guard", "egress"),
		inSync:         desc("workload_in_sync", "Whether the kernel has what Consul has registered.", workloadLabels()...),
		consulInSync:   desc("consul_in_sync", "Whether the last read of Consul succeeded."),
		consulHidden:   desc("consul_services_hidden", "Whether the token may not read all services of the node."),
		consulWatch:    desc("consul_watch", "Whether a blocking query to Consul is open; not there where that is not asked for."),
		consulSince:    desc("consul_since_timestamp_seconds", "When the last read of Consul succeeded; where Consul is not in sync, when that was noticed."),
		problems:       desc("problems", "What 'weir status' lists of the agent's and of tables, by the codes of the runbook; 0 where there is none.", "code", "severity"),
		unseen:         desc("state_unseen", "Records, or the node's state, that the agent could not look at or write; what is in force stays.", "reason"),
		proxies:        desc("consul_proxies", "Proxies registered on this node."),
		consulReads:    desc("consul_reads_total", "Bulk reads of Consul."),
		consulFailures: desc("consul_failures_total", "Bulk reads of Consul that failed."),
		consulIn:       desc("consul_read_bytes_total", "Bytes of the bulk reads."),
		actions:        desc("actions_total", "What the agent did.", "action"),
		healthy:        desc("healthy", "Whether the data path is whole and the reconcile loop runs."),
	}
	c.consulApply = NewConsulApply().Desc()
	c.all = append(all, c.consulApply)
	return c
}

// NewConsulApply counts how long Consul's changes take to reach the kernel. An agent that
// has a blocking query open notices one when that returns, else when it reads.
func NewConsulApply() prometheus.Histogram {
	return prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "weir_consul_apply_seconds", Help: "From when a change in Consul was noticed until the kernel has it, of each allocation that it concerns.",
		Buckets: []float64{0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60},
	})
}

// Metrics describes all that are exported, in the order of docs/metrics.md.
func Metrics() []*prometheus.Desc { return newCollector(&Server{}).all }

// Describe is that of prometheus.Collector.
func (c *collector) Describe(out chan<- *prometheus.Desc) {
	for _, desc := range c.all {
		out <- desc
	}
}

// Collect is that of prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	status := c.server.Source.Status()
	gauge := func(desc *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value, labels...)
	}
	counter := func(desc *prometheus.Desc, value uint64, labels ...string) {
		out <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(value), labels...)
	}
	healthy, _ := status.Healthy(time.Now())
	gauge(c.healthy, oneIf(healthy))
	gauge(c.consulInSync, oneIf(status.Consul.InSync))
	gauge(c.consulHidden, oneIf(status.Consul.Hidden))
	if consul := c.server.Config.Consul; consul.Enabled && consul.Watch {
		gauge(c.consulWatch, oneIf(status.Consul.Watch == ""))
	}
	gauge(c.build, 1, c.server.Version, runtime.Version())
	if c.server.Config.Consul.Enabled {
		gauge(c.consulSince, float64(status.Consul.Since.UnixMilli())/1000)
	}
	for reason, count := range c.server.Source.Unseen() {
		gauge(c.unseen, float64(count), reason)
	}
	gauge(c.proxies, float64(status.Consul.Proxies))
	out <- c.server.ConsulApply
	counter(c.consulReads, status.Consul.Counts.Reads)
	counter(c.consulFailures, status.Consul.Counts.Failures)
	counter(c.consulIn, status.Consul.Counts.Bytes)
	for action, count := range map[string]uint64{
		"added": status.Counts.Added, "changed": status.Counts.Changes, "removed": status.Counts.Removed,
		"repaired": status.Counts.Repaired, "pruned": status.Counts.Pruned, "freed": status.Counts.Freed, "failed": status.Counts.Failures,
		"held": status.Counts.Held, "held_timeout": status.Counts.HeldTimeout,
	} {
		counter(c.actions, count, action)
	}
	type kind struct{ state, mode, guard, egress string }
	kinds := make(map[kind]int)
	for _, w := range status.Workloads {
		kinds[kind{string(w.State), string(w.Mode), string(w.Guard), string(w.Egress)}]++
		if w.State == api.StateManaged {
			gauge(c.inSync, oneIf(w.InSync), labelsOf(w.Key, w.Job, w.NomadNames)...)
		}
	}
	for k, count := range kinds {
		gauge(c.workloads, float64(count), k.state, k.mode, k.guard, k.egress)
	}
	c.collectVerdicts(counter)
	tables, err := c.server.Datapath.Maps()
	if err != nil {
		c.server.Source.Failed("read tables", err)
	}
	c.collectTables(tables, gauge)
	for code, count := range countProblems(status.Problems, tables) {
		gauge(c.problems, float64(count), code.String(), string(code.Severity()))
	}
}

// countProblems counts the problems of each code, those of which there is none too:
// an alert sees one come and go. The fill of tables is not the agent's to list, but
// 'weir status' has it beside the agent's.
func countProblems(list []health.Problem, tables []bpfmap.MapInfo) map[health.ProblemCode]int {
	counts := make(map[health.ProblemCode]int)
	for _, code := range health.AllProblemCodes() {
		counts[code] = 0
		for _, problem := range list {
			if problem.Code == code.String() {
				counts[code]++
			}
		}
	}
	for _, table := range tables {
		if table.NearlyFull() {
			counts[health.ProblemTableFull]++
		}
	}
	return counts
}

func (c *collector) collectTables(tables []bpfmap.MapInfo, gauge func(*prometheus.Desc, float64, ...string)) {
	for _, table := range tables {
		if table.Counted {
			gauge(c.tableRows, float64(table.Rows), table.Name)
			gauge(c.tableLimit, float64(table.MaxEntries), table.Name)
		}
	}
}

func (c *collector) collectVerdicts(counter func(*prometheus.Desc, uint64, ...string)) {
	list, err := c.server.Datapath.Verdicts()
	if err != nil && !errors.Is(err, store.ErrUnreadable) { // the reconcile pass tells of those
		c.server.Source.Failed("read verdicts", err)
	}
	refused := make(map[string]string)
	for _, verdict := range bpfmap.AllVerdicts() {
		refused[verdict.String()] = map[bool]string{true: "true", false: "false"}[verdict.Refused()]
	}
	for _, w := range list {
		labels := labelsOf(w.Key, w.Job, w.NomadNames)
		counter(c.eventsLost, w.EventsLost, labels...)
		for verdict, count := range w.Counts {
			counter(c.verdicts, count, append(labels, verdict, refused[verdict])...)
		}
	}
}

func oneIf(set bool) float64 {
	if set {
		return 1
	}
	return 0
}
