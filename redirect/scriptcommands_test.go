// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
)

// isError reports whether err is the one of the name.
func isError(name string, err error) bool {
	known, found := map[string]error{
		"ECONNREFUSED": syscall.ECONNREFUSED, "ENETUNREACH": syscall.ENETUNREACH, "EADDRINUSE": syscall.EADDRINUSE,
		"ErrNetNSGone": host.ErrNetNSGone, "ErrUnknown": store.ErrUnknown,
	}[name]
	return found && errors.Is(err, known)
}

func (s *scene) alloc(args []string, _ options) {
	if s.allocs[args[0]] != nil {
		s.Fatalf("allocation %s is there already", args[0])
	}
	s.a = s.node.newAlloc()
	s.allocs[args[0]] = s.a
	s.cgroups[s.a] = map[string]*test.Cgroup{"proxy": s.a.proxyCg, "task": s.a.taskCg}
	s.Setenv("netns", s.a.Path)
}

func (s *scene) use(args []string, _ options) {
	if s.a = s.allocs[args[0]]; s.a == nil {
		s.Fatalf("there is no allocation %s", args[0])
	}
	s.Setenv("netns", s.a.Path)
}

// cgroup makes a cgroup; one of the name before is no longer meant.
func (s *scene) cgroup(args []string, _ options) {
	s.cgroups[s.a][args[0]] = test.NewCgroup(s.t)
}

// proxy starts both listeners of a proxy in its cgroup, CGROUP.out and CGROUP.in.
func (s *scene) proxy(args []string, o options) {
	port := func(name string, otherwise int) (port int) {
		text, given := o.get(name)
		if !given {
			return otherwise
		}
		_, err := fmt.Sscan(text, &port)
		s.Check(err)
		return port
	}
	outbound, inbound := port("outbound", outboundPort), port("inbound", inboundPort)
	s.counted(o, func() {
		s.start(args[0]+".out", args[0], fmt.Sprintf("127.0.0.1:%d", outbound))
		s.start(args[0]+".in", args[0], fmt.Sprintf("0.0.0.0:%d", inbound))
	})
	if args[0] == "proxy" {
		s.a.outbound, s.a.inbound = s.processes["proxy.out"], s.processes["proxy.in"]
	}
}

func (s *scene) start(name, who, addr string) {
	uid, cgroup := s.who(who)
	to := s.addr(addr)
	process := s.a.serve(uid, cgroup, network(to), to.String())
	s.processes[name], s.servers[name] = process, process.Name
}

func (s *scene) serve(args []string, _ options) {
	name, who, addr := args[0], args[1], args[2]
	if who == "remote" {
		to := s.addr(addr)
		s.servers[name] = test.Echo(s.t, s.node.remote, network(to), to.String()).Name
		return
	}
	s.start(name, who, addr)
}

// close ends a server, or both of a proxy.
func (s *scene) close(args []string, _ options) {
	found := false
	for _, name := range []string{args[0], args[0] + ".out", args[0] + ".in"} {
		if process := s.processes[name]; process != nil {
			process.Stop()
			delete(s.processes, name)
			found = true
		}
	}
	if !found {
		s.Fatalf("no server %s is running", args[0])
	}
}

// listen opens a listener beside others, with SO_REUSEPORT.
func (s *scene) listen(args []string, o options) {
	uid, cgroup := s.who(args[0])
	s.counted(o, func() {
		_, err := s.a.sockets(uid, cgroup).listen("beside", args[1], 0, reusePort())
		s.failure(o, "listen on "+args[1], err)
	})
}

// dial connects and fails the script unless the connection comes to what is said.
// Without original= nothing is said of SO_ORIGINAL_DST.
func (s *scene) dial(args []string, o options) {
	who, to := args[0], s.addr(args[1])
	s.counted(o, func() {
		var answer test.Answer
		var err error
		if who == "remote" {
			answer, err = test.Ask(s.node.remote, network(to), to.String())
		} else {
			uid, cgroup := s.who(who)
			answer, err = s.a.askAs(uid, cgroup, network(to), to.String())
		}
		if !s.failure(o, fmt.Sprintf("dial %s as %s: %q answered", to, who, answer.Server), err) {
			return
		}
		if name, given := o.get("answer"); given && answer.Server != s.server(name) {
			s.Fatalf("dial %s as %s: %q answered, want %s, which is %q", to, who, answer.Server, name, s.server(name))
		}
		if text, given := o.get("original"); given {
			s.original(who, to, answer, text)
		}
		if from, given := o.get("from"); given {
			if want := netip.MustParseAddr(from); answer.From.Addr() != want || answer.Peer.Addr() != want {
				s.Fatalf("dial %s as %s: from %s, which the server sees as %s; want %s", to, who, answer.From, answer.Peer, want)
			}
		}
	})
}

// original compares what the sockets of a connection tell. A dialler sees the peer that it
// dialled. The server of one from outside also sees who dialled, at the address dialled.
func (s *scene) original(who string, to netip.AddrPort, answer test.Answer, text string) {
	var want netip.AddrPort
	if text != "none" {
		want = s.addr(text)
	}
	if answer.Origin != want {
		s.Fatalf("dial %s as %s: SO_ORIGINAL_DST is %s, want %s", to, who, answer.Origin, text)
	}
	if answer.To != to {
		s.Fatalf("dial %s as %s: getpeername says %s", to, who, answer.To)
	}
	if who == "remote" && (answer.Local != to || answer.Peer != answer.From) {
		s.Fatalf("dial %s from %s: the server sees it from %s to %s", to, answer.From, answer.Peer, answer.Local)
	}
}

func (s *scene) server(name string) string {
	server := s.servers[name]
	if server == "" {
		s.Fatalf("there is no server %q", name)
	}
	return server
}

func (s *scene) add(_ []string, o options) {
	request := s.a.request()
	if file, given := o.get("request"); given {
		s.read(file, &request)
	}
	netns, given := o.get("netns")
	switch {
	case !given:
		netns = s.a.Path
	case !filepath.IsAbs(netns):
		netns = s.MkAbs(netns)
	}
	s.failure(o, "add", s.node.Add(Attachment{Key: s.a.key, NetNS: netns, Request: request}))
}

func (s *scene) mesh(args []string, o options) {
	var meshConfig workload.MeshConfig
	s.read(args[0], &meshConfig)
	s.failure(o, "set "+args[0], s.node.SetMeshConfig(s.a.key, meshConfig))
}

func (s *scene) trust(args []string, o options) {
	service, _ := o.get("service")
	s.a.trust(service, s.cgroupOf(args[0]))
}

// check is CNI's CHECK.
func (s *scene) check(_ []string, o options) {
	repaired, err := s.node.Check(s.a.key, s.a.Path)
	s.failure(o, "check", err)
	if want, given := o.get("repairs"); given && (want == "none") != (len(repaired) == 0) {
		s.Fatalf("check repaired %q, want %s", repaired, want)
	}
	for _, what := range repaired {
		fmt.Fprintln(s.Stdout(), what)
	}
}

// remove is CNI's DEL.
func (s *scene) remove(_ []string, o options) {
	key := s.a.key
	if container, given := o.get("key"); given {
		key.ContainerID = container
	}
	s.Check(s.node.Remove(key))
}

func (s *scene) load(_ []string, o options) {
	_, renew := o.get("renew")
	s.Check(second(s.node.LoadLocked(renew)))
}

// key gives the present allocation another container ID.
func (s *scene) key(args []string, _ options) { s.a.key.ContainerID = args[0] }

func (s *scene) address(args []string, _ options) {
	var err error
	s.a.Do(func() {
		var eth0 netlink.Link
		if eth0, err = netlink.LinkByName("eth0"); err == nil {
			err = netlink.AddrAdd(eth0, &netlink.Addr{IPNet: host.IPNet(netip.MustParsePrefix(args[0]))})
		}
	})
	s.Check(err)
}

// lose takes rows of the present allocation away behind Weir's back.
func (s *scene) lose(args []string, _ options) {
	if args[0] != "rows" {
		s.Fatalf("lose rows TABLE")
	}
	s.a.dropRow(s.t, args[1])
}

func (s *scene) unload([]string, options) { s.Check(second(s.node.Unload())) }

// addDead puts a namespace under Weir that is gone when the command ends.
func (s *scene) addDead(args []string, o options) {
	request := s.a.request()
	if file, given := o.get("request"); given {
		s.read(file, &request)
	}
	s.t.Run("add", func(t *testing.T) {
		key := workload.AttachmentID{ContainerID: args[0], IfName: s.a.key.IfName}
		if err := s.node.Add(Attachment{Key: key, NetNS: test.NewNetNS(t).Path, Request: request}); err != nil {
			t.Fatal(err)
		}
	})
}

// record prints what the node remembers of the present allocation's ADD, for cmp.
func (s *scene) record([]string, options) {
	r, err := s.node.Paths().ReadRecord(s.a.key)
	s.Check(err)
	text, err := json.MarshalIndent(map[string]any{"netns": r.NetNS, "complete": r.State, "request": r.Request}, "", "  ")
	s.Check(err)
	fmt.Fprintf(s.Stdout(), "%s\n", text)
}

// dump prints the rows of the present allocation, for cmp, but for link-local addresses,
// which are others at each start.
func (s *scene) dump([]string, options) {
	rows, err := s.node.Dump(s.a.key)
	s.Check(err)
	for _, row := range rows {
		if addr, err := netip.ParseAddr(row.Key); err == nil && addr.IsLinkLocalUnicast() {
			continue
		}
		fmt.Fprintf(s.Stdout(), "%s: %s: %s\n", row.Table, row.Key, row.Value)
	}
}

// identity compares by what the proxies are told from tasks, and their cgroups, in the
// order of the mesh configuration: uid:unknown is one that has not shown itself. Where one
// shares its cgroup with tasks, a note says so.
func (s *scene) identity(args []string, o options) {
	status := s.a.status()
	got := append([]inspect.ProxyStatus{status.Proxy}, status.Sidecars...)
	wanted := strings.Split(args[0], ",")
	if len(got) != len(wanted) || len(status.Problems) > 0 {
		s.Fatalf("proxies %+v, problems %v; want %d and none", got, status.Problems, len(wanted))
	}
	for i, want := range wanted {
		by, name, _ := strings.Cut(want, ":")
		var cgroup uint64
		if name != "unknown" {
			cgroup = s.cgroupOf(name).ID
		}
		if got[i].Cgroup != cgroup || string(got[i].Identity) != by {
			s.Fatalf("proxy %d: %+v, want identity %q and cgroup %d", i, got[i], by, cgroup)
		}
	}
	_, shared := o.get("shared")
	if notes := strings.Join(status.Notes, "\n"); strings.Contains(notes, "share a cgroup") != shared {
		s.Fatalf("notes %q: says that a cgroup is shared: %t, want %t", notes, !shared, shared)
	}
}

func (s *scene) expect(args []string, _ options) {
	switch args[0] {
	case "works":
		s.a.works()
	case "untouched":
		s.a.free()
	case "nothing-left":
		nothingLeft(s.t, s.node.Datapath)
	case "healthy":
		healthy(s.t, s.node.Datapath)
	case "no-generation":
		if now := generationOf(s.t, s.node.Datapath, s.a.NetNS); now != 0 {
			s.Fatalf("the namespace has generation %d", now)
		}
	case "no-lookup":
		if _, err := os.Stat(s.node.Paths().Lookup(s.a.Cookie())); !errors.Is(err, fs.ErrNotExist) {
			s.Fatalf("lookup link: %v, want it gone", err)
		}
	case "not-loaded":
		if _, err := os.Stat(s.node.Paths().PinDir); err == nil {
			s.Fatalf("the data path is loaded")
		}
	case "alone":
		if keys := s.keys(); len(keys) != 1 || keys[0] != s.a.key {
			s.Fatalf("workloads %v, want %s alone", keys, s.a.key)
		}
	default:
		s.Fatalf("nothing is known of %q", args[0])
	}
}
