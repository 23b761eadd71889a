// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// TestScripts runs testdata/*.txtar, each on a node of its own. testdata/README.md says
// what its commands are.
func TestScripts(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	testscript.RunT(scriptT{t}, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			t := env.T().(scriptT).T
			env.Values["scene"] = &scene{
				node: newNode(t), t: t, allocs: make(map[string]*alloc), cgroups: make(map[*alloc]map[string]*test.Cgroup),
				servers: make(map[string]string), processes: make(map[string]*test.ServerProcess), saved: make(map[string]any),
			}
			return nil
		},
		Cmds: scriptCommands(),
	})
}

// scriptT runs scripts one after another: they count what the whole kernel has.
type scriptT struct{ *testing.T }

func (t scriptT) Run(name string, run func(testscript.T)) {
	t.T.Run(name, func(t *testing.T) { run(scriptT{t}) })
}
func (scriptT) Parallel()     {}
func (scriptT) Verbose() bool { return testing.Verbose() }

// scene is what the commands of one script share.
type scene struct {
	*testscript.TestScript
	node      *node
	t         *testing.T
	a         *alloc // that the commands are about
	allocs    map[string]*alloc
	cgroups   map[*alloc]map[string]*test.Cgroup
	servers   map[string]string // by what a script calls them, the names that they answer with
	processes map[string]*test.ServerProcess
	saved     map[string]any
	writes    *test.MapWrites
}

// scriptCommands makes the commands of testscript: each ends the script at its own line,
// also where what it called has failed the test.
func scriptCommands() map[string]func(*testscript.TestScript, bool, []string) {
	type command struct {
		run    func(s *scene, args []string, o options)
		usage  string
		fails  bool // it may stand behind "!"
		places int  // arguments beside the options
	}
	all := map[string]command{
		"alloc":      {(*scene).alloc, "NAME", false, 1},
		"use":        {(*scene).use, "NAME", false, 1},
		"cgroup":     {(*scene).cgroup, "NAME", false, 1},
		"proxy":      {(*scene).proxy, "CGROUP [outbound=PORT] [inbound=PORT] [verdict=...]", false, 1},
		"serve":      {(*scene).serve, "NAME WHO ADDR", false, 3},
		"close":      {(*scene).close, "SERVER or PROXY", false, 1},
		"listen":     {(*scene).listen, "WHO ADDR [error=...] [verdict=...]", true, 2},
		"dial":       {(*scene).dial, "WHO ADDR [answer=SERVER] [original=ADDR|none] [error=...] [verdict=...]", true, 2},
		"add":        {(*scene).add, "[request=FILE] [netns=PATH] [error=...]", true, 0},
		"mesh":       {(*scene).mesh, "FILE [error=...]", true, 1},
		"trust":      {(*scene).trust, "CGROUP [service=NAME]", false, 1},
		"check":      {(*scene).check, "[repairs=none|some] [error=...]", true, 0},
		"remove":     {(*scene).remove, "[key=NAME]", false, 0},
		"load":       {(*scene).load, "[renew=yes]", false, 0},
		"unload":     {(*scene).unload, "", false, 0},
		"record":     {(*scene).record, "", false, 0},
		"add-dead":   {(*scene).addDead, "CONTAINER [request=FILE]", false, 1},
		"call":       {(*scene).call, "METHOD", false, 1},
		"lose":       {(*scene).lose, "rows TABLE", false, 2},
		"dump":       {(*scene).dump, "", false, 0},
		"save":       {(*scene).save, "generation|rows|record|lookup|original-peers", false, 1},
		"same":       {(*scene).same, "generation|rows|record|lookup|original-peers", true, 1},
		"identity":   {(*scene).identity, "uid|cgroup:CGROUP,...", false, 1},
		"expect":     {(*scene).expect, "works|untouched|nothing-left|healthy|no-generation|no-lookup|not-loaded|alone", false, 1},
		"map-writes": {(*scene).mapWrites, "count|none|some", false, 1},
		"key":        {(*scene).key, "CONTAINER", false, 1},
		"address":    {(*scene).address, "ADDR/BITS", false, 1},
	}
	made := make(map[string]func(*testscript.TestScript, bool, []string))
	for name, c := range all {
		made[name] = func(ts *testscript.TestScript, neg bool, args []string) {
			s := ts.Value("scene").(*scene)
			s.TestScript = ts
			places, o := splitOptions(args)
			if len(places) != c.places || neg && !c.fails {
				ts.Fatalf("usage: %s %s", name, c.usage)
			}
			if s.a == nil && name != "alloc" {
				ts.Fatalf("there is no allocation yet: begin with the command alloc")
			}
			o.fails = neg
			c.run(s, places, o)
			for option := range o.values {
				if !o.read[option] {
					ts.Fatalf("option %s=: usage: %s %s", option, name, c.usage)
				}
			}
			if s.t.Failed() {
				ts.Fatalf("%s %s: see above", name, strings.Join(args, " "))
			}
		}
	}
	return made
}

// options are the arguments NAME=VALUE of a command.
type options struct {
	values map[string]string
	read   map[string]bool
	fails  bool // the command stands behind "!"
}

func splitOptions(args []string) (places []string, o options) {
	o = options{values: make(map[string]string), read: make(map[string]bool)}
	for _, arg := range args {
		if name, value, found := strings.Cut(arg, "="); found {
			o.values[name] = value
		} else {
			places = append(places, arg)
		}
	}
	return places, o
}

func (o options) get(name string) (value string, given bool) {
	o.read[name] = true
	value, given = o.values[name]
	return value, given
}

// who is a process of the present allocation: USER@CGROUP, or a CGROUP, whose user is a
// task's in the cgroup "task" and the proxy's in each other.
func (s *scene) who(name string) (uid uint32, cgroup *test.Cgroup) {
	user, in, found := strings.Cut(name, "@")
	if !found {
		user, in = "proxy", name
		if name == "task" {
			user = name
		}
	}
	switch user {
	case "task":
		uid = taskUID
	case "proxy":
		uid = proxyUID
	default:
		s.Fatalf("user %q: want task or proxy", user)
	}
	return uid, s.cgroupOf(in)
}

func (s *scene) cgroupOf(name string) *test.Cgroup {
	cgroup := s.cgroups[s.a][name]
	if cgroup == nil {
		s.Fatalf("no cgroup %q: make it with the command cgroup", name)
	}
	return cgroup
}

// addr is an address with its port, in which alloc, alloc6, remote and remote6 stand for
// those of the present allocation and of the remote host in its network.
func (s *scene) addr(text string) netip.AddrPort {
	host, port, _ := strings.Cut(text, ":")
	if known, found := map[string]netip.Addr{
		"alloc": s.a.v4, "alloc6": s.a.v6, "remote": remote4(s.a.number), "remote6": remote6(s.a.number),
	}[host]; found {
		text = netip.AddrPortFrom(known, 0).String()
		text = text[:len(text)-1] + port
	}
	addr, err := netip.ParseAddrPort(text)
	s.Check(err)
	return addr
}

func network(addr netip.AddrPort) string {
	if addr.Addr().Is4() {
		return "tcp4"
	}
	return "tcp6"
}

// counted runs an action, and where verdict= is given fails unless just these counters
// moved: names with commas, NAME*2 for two.
func (s *scene) counted(o options, action func()) {
	text, given := o.get("verdict")
	if !given {
		action()
		return
	}
	want := make(map[bpfmap.Verdict]uint64)
	if text == "none" {
		text = ""
	}
	for _, name := range strings.FieldsFunc(text, func(r rune) bool { return r == ',' }) {
		count := uint64(1)
		if before, times, found := strings.Cut(name, "*"); found {
			_, err := fmt.Sscan(times, &count)
			s.Check(err)
			name = before
		}
		all := bpfmap.AllVerdicts()
		i := slices.IndexFunc(all, func(v bpfmap.Verdict) bool { return v.String() == name })
		if i < 0 {
			s.Fatalf("there is no verdict %q", name)
		}
		want[all[i]] += count
	}
	verdictsAre(s.t, s.a.rose(action), want)
}

// failure compares what a command came to with what the script says. It reports whether
// the command was to succeed.
func (s *scene) failure(o options, what string, err error) (goesOn bool) {
	want, given := o.get("error")
	if given && !o.fails {
		s.Fatalf("error= stands behind \"!\" only")
	}
	switch {
	case o.fails && err == nil:
		s.Fatalf("%s succeeded", what)
	case !o.fails && err != nil:
		s.Fatalf("%s: %+v", what, err)
	case given && !isError(want, err):
		s.Fatalf("%s: %v; want %s", what, err, want)
	case o.fails:
		s.Logf("%s: %v", what, err)
	}
	return !o.fails
}

// read decodes a file of the script over into, as what it leaves out is the fixture's.
func (s *scene) read(file string, into any) {
	decoder := json.NewDecoder(strings.NewReader(s.ReadFile(file)))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		s.Fatalf("read %s: %v", file, err)
	}
}

// state is what save and same compare.
func (s *scene) state(what string) any {
	switch what {
	case "generation":
		return generationOf(s.t, s.node.Datapath, s.a.NetNS)
	case "rows":
		return rowCounts(s.t, s.node.Datapath)
	case "lookup":
		return linkIDs(s.t, s.node.Paths().Lookup(s.a.Cookie()))
	case "original-peers":
		return s.a.origins(s.t)
	case "record":
		text, err := os.ReadFile(s.node.Paths().Record(s.a.key))
		s.Check(err)
		return string(text)
	}
	s.Fatalf("there is no %q to save", what)
	return nil
}

func (s *scene) save(args []string, _ options) { s.saved[args[0]] = s.state(args[0]) }

func (s *scene) same(args []string, o options) {
	saved, found := s.saved[args[0]]
	if !found {
		s.Fatalf("%s was not saved before", args[0])
	}
	diff := cmp.Diff(saved, s.state(args[0]))
	if diff != "" && !o.fails {
		s.Fatalf("%s (-saved +now):\n%s", args[0], diff)
	}
	if diff == "" && o.fails {
		s.Fatalf("%s is as it was: %v", args[0], saved)
	}
}

// mapWrites counts what this process writes to maps.
func (s *scene) mapWrites(args []string, _ options) {
	if args[0] == "count" {
		s.writes = test.CountMapWrites(s.t)
		return
	}
	if s.writes == nil {
		s.Fatalf("begin with map-writes count")
	}
	seen := s.writes.Seen()
	if none := len(seen) == 0; none != (args[0] == "none") {
		s.Fatalf("writes to maps: %v, want %s", seen, args[0])
	}
}

// keys are the workloads that are listed.
func (s *scene) keys() (list []workload.AttachmentID) {
	workloads, err := s.node.Workloads()
	s.Check(err)
	for _, w := range workloads {
		list = append(list, w.Key)
	}
	return list
}

// calls are methods that a node is asked again and again.
func (s *scene) calls() map[string]func() error {
	n := s.node
	return map[string]func() error{
		"repair":    func() error { return second(n.Repair()) },
		"prune":     func() error { return second(n.PruneDead()) },
		"reclaim":   func() error { return second(n.NewIndexReclaimer().Run()) },
		"status":    func() error { return second(n.Status()) },
		"workloads": func() error { return second(n.Workloads()) },
		"verdicts":  func() error { return second(n.Verdicts()) },
		"records":   func() error { return second(n.Records()) },
	}
}

func (s *scene) call(args []string, _ options) {
	method := s.calls()[args[0]]
	if method == nil {
		s.Fatalf("no method %q: there are %v", args[0], slices.Sorted(maps.Keys(s.calls())))
	}
	s.Check(method())
}
