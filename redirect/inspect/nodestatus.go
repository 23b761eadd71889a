// SPDX-License-Identifier: MPL-2.0

package inspect

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/health"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"golang.org/x/sys/unix"
)

// Status looks at the node. It changes nothing, takes no lock, and asks the kernel
// for what the pins do not tell. What cannot be looked at is a problem. NameOthers adds
// who holds the programs of others.
func (d *Reader) Status() (Status, error) {
	sound := make(soundWorkloads)
	return settled(d.paths, func() (Status, error) { return d.status(sound) }, func(s Status) []health.Problem { return s.Problems })
}

// settled looks again for as long as two looks differ in what is wrong: without
// the lock, a look may see half of a change. It gives up after a second.
func settled[T any](paths store.Paths, look func() (T, error), problems func(T) []health.Problem) (T, error) {
	var before []health.Problem
	for deadline := time.Now().Add(time.Second); ; time.Sleep(20 * time.Millisecond) {
		seen, err := look()
		wrong := problems(seen)
		_, busy := store.LockedBy(paths.Lock())
		same := before != nil && slices.Equal(wrong, before) && !busy
		if len(wrong) == 0 && (err == nil || errors.Is(err, store.ErrUnreadable)) || same || time.Now().After(deadline) {
			return seen, err
		}
		before = append([]health.Problem{}, wrong...)
	}
}

// nodeLook is one look at the node.
type nodeLook struct {
	Status
	node *Reader
	root *os.File
	own  []*program.Set
}

func (l *nodeLook) problem(code health.ProblemCode, remedy, what string, args ...any) {
	l.Problems = append(l.Problems, health.NewProblem(code, remedy, fmt.Sprintf(what, args...)))
}

// unseen notes what could not be looked at: that is no sign that it is not there.
func (l *nodeLook) unseen(what string, err error) {
	if err != nil {
		l.problem(health.ProblemStateUnreadable, "what is in force stays; see the error", "%s cannot be looked at: %v", what, err)
	}
}

func (d *Reader) status(sound soundWorkloads) (Status, error) {
	l := &nodeLook{node: d, Status: Status{
		Paths: d.paths, Barrier: bpfmap.DetectReaderWait(), Links: []string{}, Maps: []bpfmap.MapInfo{}, Others: []Other{}, Problems: []health.Problem{},
	}}
	var err error
	if l.root, err = d.paths.OpenCgroupRoot(); err != nil {
		l.problem(health.ProblemNoCgroup2, "mount cgroup v2 and run weir in the host's cgroup namespace", "%v", err)
		return l.Status, nil
	}
	defer l.root.Close()
	l.CgroupRoot = l.root.Name()
	sets, err := program.SetsAt(l.root)
	l.unseen("what is attached to "+l.root.Name(), err)
	l.own = d.OwnSets(sets)
	l.Others, err = d.others(l.root, l.own)
	l.unseen("programs of others", err)
	l.changeable()
	tables, err := bpfmap.OpenTablesToRead(d.paths.Maps())
	switch {
	case errors.Is(err, bpfmap.ErrNotLoaded) && len(l.own) > 0:
		l.Workloads = l.own[0].Serves(d.cookies())
		l.problem(health.ProblemPinsLost, "run 'weir load', which pins them again", "the programs run and redirect %d workloads, but no pin in %s leads to them: nothing can be changed",
			l.Workloads, d.paths.PinDir)
		return l.Status, nil
	case errors.Is(err, bpfmap.ErrNotLoaded):
		l.problem(health.ProblemNotLoaded, "start the agent, which loads it: 'systemctl enable --now weir-agent'; or run 'weir load'", "the data path is not loaded: no workload is redirected")
		return l.Status, nil
	case errors.Is(err, bpfmap.ErrIncompatible):
		l.problem(health.ProblemOtherLayout, "run 'weir load' with the version that the node should run, or start its agent: it takes running workloads along", "%v", err)
		return l.Status, nil
	case err != nil:
		l.unseen("the data path", err)
		return l.Status, nil
	}
	defer tables.Close()
	l.Loaded = true
	var row bpfmap.BpfControl
	if _, err := tables.Get("control", uint32(0), &row); err != nil {
		l.unseen("the node's row", err)
	} else if l.Current = row.Digest == bpfmap.Digest(); !l.Current {
		l.problem(health.ProblemOtherVersion, "run 'weir load' with the version that the node should run", "the node runs programs of another version")
	}
	l.links(tables)
	l.Maps, err = tables.Infos()
	l.unseen("the tables", err)
	l.workloads(tables, sound)
	return l.Status, nil
}

// cookies are those of the workloads on record.
func (d *Reader) cookies() (list []uint64) {
	records, _ := d.paths.ReadRecords() // those that cannot be read have none
	for _, r := range records {
		list = append(list, r.Cookie)
	}
	return list
}

// changeable notes what keeps everybody from changing the node.
func (l *nodeLook) changeable() {
	for _, dir := range []string{l.node.paths.StateDir, l.node.paths.PinDir} {
		if err := unix.Access(dir, unix.W_OK); errors.Is(err, unix.EROFS) {
			l.problem(health.ProblemStateReadOnly, "remount it writable", "%s is read-only: what is in force stays, but nothing can be changed", dir)
		}
	}
	if holder, held := store.LockedBy(l.node.paths.Lock()); held && holder.Stopped() {
		l.problem(health.ProblemLockHeld, "let it go on, or end it", "%s has the lock %s and is stopped: what is in force stays, but nothing can be changed", holder, l.node.paths.Lock())
	}
}

// links looks at the programs at the root.
func (l *nodeLook) links(tables *bpfmap.Tables) {
	broken, err := program.LinkProblems(program.ProgramNames(), l.root, l.node.paths.Links())
	if err != nil { // the kernel tells without the pins
		l.unseen("a pin", err)
		broken = make(map[string]string)
		for _, name := range program.ProgramNames() {
			if len(l.own) == 0 || len(l.own[0].Programs[name]) == 0 {
				broken[name] = name + " is not attached to the root of cgroup v2"
			}
		}
	}
	for _, what := range slices.Sorted(maps.Values(broken)) {
		l.problem(health.ProblemProgramDetached, "run 'weir load'", "%s", what)
	}
	if len(broken) == 0 {
		l.Links = program.ProgramNames()
	}
	lost, err := program.LostCalls(l.node.paths)
	l.unseen("the lookup program", err)
	if len(lost) > 0 {
		l.problem(health.ProblemProgramDetached, "run 'weir load'", "no pin in %s leads to the lookup program any more: every connection to and from %d workloads is refused", l.node.paths.Calls(), len(lost))
	}
	control, err := tables.ID("control")
	for _, s := range l.own {
		if err == nil && s.Tables["control"] != control {
			l.problem(health.ProblemUnpinnedPrograms, "run 'weir load', which detaches them", "%d programs of this instance are attached that no pin leads to: they refuse what the others redirect", len(s.Programs))
		}
	}
}

// workloads looks at the workloads on record, and at what has no record.
func (l *nodeLook) workloads(tables *bpfmap.Tables, sound soundWorkloads) {
	workloads, err := l.node.workloads(tables, sound, nil)
	if errors.Is(err, store.ErrUnreadable) {
		l.problem(health.ProblemRecordUnreadable, "the agent makes it anew where libcni knows the allocation, and so does a restart of Nomad's client, by its CHECK; its redirect stays as it is", "%v", err)
	} else {
		l.unseen("the records", err)
	}
	l.Workloads = len(workloads)
	owned := make(map[uint64]bool)
	for _, w := range workloads {
		owned[w.Cookie] = true
		l.Problems = append(l.Problems, w.Problems...)
	}
	l.Problems = append(l.Problems, fillProblems(l.Maps, workloads)...)
	orphans, err := l.node.Orphans(owned)
	l.unseen("the lookup programs without a record", err)
	for _, o := range orphans {
		if o.Alive { // else it is the next prune's
			l.problem(health.ProblemRecordMissing, "restart its allocation", "namespace with cookie %d is redirected, but its record is gone", o.Cookie)
		}
	}
}

// Maps returns the node's tables, sorted by name.
func (d *Reader) Maps() ([]bpfmap.MapInfo, error) {
	tables, err := bpfmap.OpenTablesToRead(d.paths.Maps())
	if err != nil {
		return nil, err
	}
	defer tables.Close()
	return tables.Infos()
}

// fillProblems names tables that are nearly full, who takes most, and what helps.
func fillProblems(infos []bpfmap.MapInfo, workloads []WorkloadStatus) (problems []health.Problem) {
	for _, info := range infos {
		if !info.NearlyFull() {
			continue
		}
		problem := health.NewProblem(health.ProblemTableFull, "fewer allocations on this node, or fewer exclusions and upstreams in their jobs",
			fmt.Sprintf("table %s is %d %% full: %d of %d rows", info.Name, info.Percent(), info.Rows, info.MaxEntries))
		if info.Name == "origins" && len(workloads) > 0 {
			most := slices.MaxFunc(workloads, func(a, b WorkloadStatus) int { return int(a.Origins) - int(b.Origins) })
			problem.What += fmt.Sprintf("; workload %s holds most, %d destinations", most.Key, most.Origins)
			problem.Remedy = "stop the allocations that dial so many destinations ('weir workloads' shows how many), exclude those in their jobs, or see that the agent runs: it gives back what is not in use"
		}
		if info.Name == "listeners" {
			problem.Remedy = "let the proxies open fewer listeners: fewer workers ('--concurrency')"
		}
		problems = append(problems, problem)
	}
	return problems
}

// orphan is a lookup program without a record.
type orphan struct {
	Cookie uint64
	Alive  bool // its namespace still exists: somebody removed the record
}

func (d *Reader) Orphans(owned map[uint64]bool) (found []orphan, err error) {
	cookies, err := program.LookupCookies(d.paths)
	if err != nil {
		return nil, err
	}
	for _, cookie := range cookies {
		if owned[cookie] {
			continue
		}
		pinned, err := link.LoadPinnedLink(d.paths.Lookup(cookie), nil)
		if err != nil {
			return found, fmt.Errorf("open lookup link: %w", err)
		}
		found = append(found, orphan{Cookie: cookie, Alive: program.LookupInode(pinned) != 0})
		pinned.Close()
	}
	return found, nil
}
