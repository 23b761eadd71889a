// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Job is a job that was given to Nomad.
type Job struct {
	ID string

	node   *Node
	want   map[string]int // group -> count
	parsed map[string]any // as Nomad has read it
}

// For is the job for another test, as [Node.For] gives it the node. It still ends
// with the test that ran it.
func (j *Job) For(n *Node) *Job { return &Job{ID: j.ID, node: n, want: j.want} }

// patience is how long a job's allocations may take to run and pass checks, or to
// end.
func (j *Job) patience() time.Duration {
	patience := 90 * time.Second
	for _, count := range j.want {
		patience += time.Duration(count) * time.Second
	}
	return patience
}

// Run gives a job file to Nomad, waits until its allocations run and their
// services pass all checks, and stops it when the test ends. Variables are pairs of
// a name and a value: a list or an object as HCL has it, anything else as it is.
func (n *Node) Run(file string, variables ...string) *Job {
	n.tb.Helper()
	job := n.Submit(file, variables...)
	job.Await()
	return job
}

// Submit is Run that does not wait.
func (n *Node) Submit(file string, variables ...string) *Job {
	n.tb.Helper()
	job := n.parse(file, variables)
	n.tb.Cleanup(func() { job.purge() })
	n.register(job)
	return job
}

// Update gives a changed file of the job, or the same with other variables, to
// Nomad. [Job.Await] can wait for it.
func (j *Job) Update(file string, variables ...string) {
	j.node.tb.Helper()
	changed := j.node.parse(file, variables)
	j.want = changed.want
	j.node.register(changed)
}

// parse lets Nomad read a job file.
func (n *Node) parse(file string, variables []string) *Job {
	n.tb.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		n.tb.Fatal(err)
	}
	var values strings.Builder
	for pair := range slices.Chunk(variables, 2) {
		value := pair[1]
		if !strings.HasPrefix(value, "[") && !strings.HasPrefix(value, "{") {
			value = strconv.Quote(value)
		}
		fmt.Fprintf(&values, "%s = %s\n", pair[0], value)
	}
	var parsed map[string]any
	err = n.api.nomad.call(http.MethodPost, "/v1/jobs/parse", map[string]any{"JobHCL": string(text), "Variables": values.String(), "Canonicalize": true}, &parsed)
	if err != nil {
		n.tb.Fatalf("read job %s: %v", filepath.Base(file), err)
	}
	job := &Job{ID: parsed["ID"].(string), node: n, want: make(map[string]int), parsed: parsed}
	groups, _ := parsed["TaskGroups"].([]any)
	for _, each := range groups {
		group := each.(map[string]any)
		count, _ := group["Count"].(float64)
		job.want[group["Name"].(string)] = int(count)
	}
	return job
}

func (n *Node) register(job *Job) {
	n.tb.Helper()
	if err := n.api.nomad.call(http.MethodPut, "/v1/jobs", map[string]any{"Job": job.parsed}, nil); err != nil {
		n.tb.Fatalf("submit job %s: %v", job.ID, err)
	}
}

// Await waits until as many allocations as the job wants run and pass all checks.
// An allocation that fails ends the test at once.
func (j *Job) Await() {
	j.node.tb.Helper()
	began := time.Now()
	eventually(j.node.tb, j.patience(), func() error {
		j.node.tb.Helper()
		list, err := j.allocs()
		if err != nil {
			return err
		}
		running := make(map[string]int)
		for _, a := range list {
			switch {
			case a.DesiredStatus != "run":
			case a.ClientStatus == "failed":
				j.node.tb.Fatalf("allocation %s of %s failed:\n%s", a.ID, j.ID, a.Events())
			case a.up():
				running[a.Group]++
			}
		}
		for group, count := range j.want {
			if running[group] < count {
				return fmt.Errorf("group %s: %d of %d run: %s", group, running[group], count, j.placement())
			}
		}
		return j.checksPass(list)
	}, "job "+j.ID)
	j.node.tb.Logf("node: job %s is up after %s", j.ID, time.Since(began).Round(time.Millisecond))
}

// up tells that every task runs: an allocation runs for Nomad once one of them does.
func (a *Alloc) up() bool {
	for _, task := range a.TaskStates {
		if task.State != "running" && (task.State != "dead" || task.Failed) {
			return false
		}
	}
	return a.ClientStatus == "running"
}

// placement tells why allocations are not there.
func (j *Job) placement() string {
	var evaluations []struct{ FailedTGAllocs map[string]map[string]any }
	if err := j.node.api.nomad.get("/v1/job/"+j.ID+"/evaluations", &evaluations); err != nil {
		return err.Error()
	}
	var told strings.Builder
	for _, e := range evaluations {
		for group, why := range e.FailedTGAllocs {
			fmt.Fprintf(&told, "%s cannot be placed: filtered %v, exhausted %v; ", group, why["ConstraintFiltered"], why["DimensionExhausted"])
		}
	}
	return told.String()
}

// checksPass looks at the services that Nomad registered for the allocations. A
// group without services has none to look at.
func (j *Job) checksPass(list []*Alloc) error {
	var checks map[string]consulCheck
	if err := j.node.api.consul.get("/v1/agent/checks", &checks); err != nil {
		return err
	}
	var bad []error
	for _, check := range checks {
		if isOf(check.ServiceID, list) && check.Status != "passing" {
			bad = append(bad, fmt.Errorf("check %q of %s is %s: %s", check.Name, check.ServiceID, check.Status, check.Output))
		}
	}
	if len(bad) > 0 {
		return errors.Join(bad...)
	}
	return j.catalogPasses(list)
}

// catalogPasses looks at what the mesh knows of the same checks. A check that
// passes while Consul's agent still tells the servers of its service is taken for
// told, and the servers learn of it at the agent's next full report, a minute
// later. The check is made to change once more.
func (j *Job) catalogPasses(list []*Alloc) error {
	var catalog []consulCheck
	if err := j.node.api.consul.get("/v1/health/state/any", &catalog); err != nil {
		return err
	}
	var bad []error
	for _, check := range catalog {
		if !isOf(check.ServiceID, list) || check.Status == "passing" {
			continue
		}
		bad = append(bad, fmt.Errorf("check %q of %s is %s in the catalog", check.Name, check.ServiceID, check.Status))
		if check.Node != j.node.machine.name {
			continue
		}
		service := strings.TrimSuffix(check.ServiceID, "-sidecar-proxy")
		for _, enable := range []string{"true", "false"} {
			if err := j.node.api.consul.call(http.MethodPut, "/v1/agent/service/maintenance/"+service+"?enable="+enable, nil, nil); err != nil {
				return err
			}
		}
	}
	return errors.Join(bad...)
}

type consulCheck struct{ Node, Name, ServiceID, Status, Output string }

func isOf(service string, list []*Alloc) bool {
	return slices.ContainsFunc(list, func(a *Alloc) bool { return a.DesiredStatus == "run" && strings.Contains(service, a.ID) })
}

// Allocs are the job's allocations that Nomad wants to run, the newest first.
func (j *Job) Allocs() []*Alloc {
	j.node.tb.Helper()
	list, err := j.allocs()
	if err != nil {
		j.node.tb.Fatal(err)
	}
	return slices.DeleteFunc(list, func(a *Alloc) bool { return a.DesiredStatus != "run" })
}

// Alloc is the only allocation of a group that Nomad wants to run.
func (j *Job) Alloc(group string) *Alloc {
	j.node.tb.Helper()
	list := slices.DeleteFunc(j.Allocs(), func(a *Alloc) bool { return a.Group != group })
	if len(list) != 1 {
		j.node.tb.Fatalf("job %s has %d allocations of group %s, want 1", j.ID, len(list), group)
	}
	return list[0]
}

func (j *Job) allocs() ([]*Alloc, error) {
	var list []*Alloc
	if err := j.node.api.nomad.get("/v1/job/"+j.ID+"/allocations", &list); err != nil {
		return nil, err
	}
	slices.SortFunc(list, func(a, b *Alloc) int { return int(b.CreateIndex) - int(a.CreateIndex) })
	for _, a := range list {
		a.node = j.node.member(a.NodeName)
	}
	return list, nil
}

// Stop stops the job and waits until its allocations are gone from the node.
func (j *Job) Stop() {
	j.node.tb.Helper()
	j.deregister()
	eventually(j.node.tb, j.patience(), j.gone, "end of job "+j.ID)
}

// End is Stop where Nomad may be unable to take the allocations' networks down: it
// waits for their tasks alone.
func (j *Job) End() {
	j.node.tb.Helper()
	j.deregister()
	eventually(j.node.tb, j.patience(), func() error {
		list, err := j.allocs()
		for _, a := range list {
			err = errors.Join(err, a.over())
		}
		return err
	}, "end of the tasks of job "+j.ID)
}

// Ended is an error as long as an allocation that Nomad does not want any more runs.
func (j *Job) Ended() error {
	list, err := j.allocs()
	for _, a := range list {
		if a.DesiredStatus != "run" {
			err = errors.Join(err, a.over())
		}
	}
	return err
}

func (j *Job) deregister() {
	j.node.tb.Helper()
	j.node.rememberIdentities()
	if err := j.node.api.nomad.call(http.MethodDelete, "/v1/job/"+j.ID, nil, nil); err != nil {
		j.node.tb.Fatalf("stop job %s: %v", j.ID, err)
	}
}

func (a *Alloc) over() error {
	if a.ClientStatus == "running" || a.ClientStatus == "pending" {
		return fmt.Errorf("allocation %s is still %s", a.ID, a.ClientStatus)
	}
	return nil
}

func (j *Job) gone() error {
	list, err := j.allocs()
	if err != nil {
		return err
	}
	for _, a := range list {
		if err := a.over(); err != nil {
			return err
		}
		// Nomad calls it complete before its network is taken down.
		files, err := filepath.Glob(a.node.Path("/var/lib/cni/results/*" + a.ID + "*"))
		if err != nil {
			return err
		}
		if len(files) > 0 {
			return fmt.Errorf("allocation %s still has its network: %s", a.ID, files)
		}
	}
	return nil
}

// purge stops the job and makes Nomad forget it. Nobody waits for the end of its
// allocations: Nomad gives their sidecars seconds to drain, in which the next test
// can start. Nomad may be down by then.
func (j *Job) purge() {
	j.node.rememberIdentities()
	if !j.node.Nomad.Running() || !j.node.Server.Running() {
		return
	}
	if err := j.node.api.nomad.call(http.MethodDelete, "/v1/job/"+j.ID+"?purge=true", nil, nil); err != nil {
		j.node.tb.Errorf("purge job %s: %v", j.ID, err)
	}
}
