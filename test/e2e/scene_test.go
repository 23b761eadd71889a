// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/test"
)

// updateGolden has the tests write what they compare with.
const updateGolden = "WEIR_UPDATE_GOLDEN"

// scene is a node as an operator finds it at 3 a.m.: some allocations are well, and some
// are not.
type scene struct {
	*meshNode
	api, shop, secret, door, mute, old *meshAlloc

	weir    cli
	server  *test.ServerProcess // api's
	task    held                // in shop
	virtual map[string]string   // where a task dials a service
}

// newScene makes it: a plain allocation, one in transparent mode, one whose service an
// intention denies, a gateway, one whose proxy never listens, and one that Consul's own
// engine redirected as consul-cni does.
func newScene(t *testing.T) *scene {
	n := newMeshNode(t, false)
	n.config.Gate = &configfile.GateConfig{Timeout: "0s"} // who does not listen is not waited for
	s := &scene{meshNode: n, weir: n.buildCLI(), virtual: make(map[string]string)}
	n.runAgent()
	s.api = s.place(1, "api", "")
	s.api.startEnvoy(s.api.register("api", object{"Port": 20001}))
	s.server = test.EchoProcess(t, s.api.spec(1000), "tcp4", "0.0.0.0:8080")
	s.secret = s.place(2, "secret", "")
	s.secret.startEnvoy(s.secret.register("secret", object{"Port": 20002}))
	test.EchoProcess(t, s.secret.spec(1000), "tcp4", "127.0.0.1:8080")
	n.intend("secret", "shop", "deny")
	n.consul.Put("/v1/config", object{"Kind": "ingress-gateway", "Name": "door", "Listeners": []object{
		{"Port": 9090, "Protocol": "tcp", "Services": []object{{"Name": "api"}}}}})
	s.door = s.place(3, "door", "")
	s.door.startEnvoy(s.door.registerGateway("ingress", "door", map[string]uint16{"api": 9090}), "-gateway", "ingress")
	proxy := ""
	s.shop, proxy = s.transparent(4, "shop", 20004)
	s.shop.startEnvoy(proxy)
	s.task = s.shop.newHeld()
	s.mute, _ = s.transparent(5, "mute", 20005)
	s.old = s.redirectedByConsul(6, "old", 20006)
	for _, name := range []string{"api", "secret"} {
		s.virtual[name] = netip.AddrPortFrom(n.virtualIP(name), 80).String()
	}
	wantServed(t, s.task, s.virtual["api"], s.server.Name)
	wantRefused(t, s.task, s.virtual["secret"])
	test.Eventually(t, func() error { return dials(n.outside, s.door.at(9090)) }, "the gateway to listen")
	test.Eventually(t, s.settled, "the agent to have seen all")
	return s
}

// place makes an allocation of its own job, with an ID that begins with its number.
func (s *scene) place(number int, job, mesh string) *meshAlloc {
	s.t.Helper()
	return s.allocateAs(fmt.Sprintf("%d0000000-e285-703a-01ba-3d1b2e2228f7", number), job, mesh)
}

func (s *scene) transparent(number int, job string, port int) (a *meshAlloc, proxy string) {
	s.t.Helper()
	a = s.place(number, job, fmt.Sprintf(`{"ProxyUserID":"101","ProxyInboundPort":%d,"ProxyOutboundPort":15001}`, port))
	test.Eventually(s.t, func() error { // so that the list of changes has the same steps each time
		_, err := a.view()
		return err
	}, "the agent to find "+job)
	return a, a.register(job, object{"Port": port, "Proxy": object{"Mode": "transparent"}})
}

// redirectedByConsul is an allocation from before Weir: what consul-cni calls redirected it.
func (s *scene) redirectedByConsul(number int, job string, port int) *meshAlloc {
	s.t.Helper()
	test.Need(s.t, test.Tool("iptables"))
	s.plugins = filepath.Join(s.dir, "consul")
	if err := os.Mkdir(s.plugins, 0o700); err != nil {
		s.t.Fatal(err)
	}
	goBuild(s.t, "../bench", filepath.Join(s.plugins, "consul-cni"), "./engine")
	if err := os.Symlink(filepath.Join(s.dir, "bin", "made"), filepath.Join(s.plugins, "made")); err != nil {
		s.t.Fatal(err)
	}
	a, _ := s.transparent(number, job, port)
	s.plugins = ""
	return a
}

// settled says what the agent has not found yet.
func (s *scene) settled() error {
	status, err := s.status()
	if err != nil {
		return err
	}
	for _, w := range status.Workloads {
		switch {
		case w.ID == s.old.id:
			if w.State != api.StateConsul {
				return fmt.Errorf("%s is %s", w.Job, w.State)
			}
		case w.State != api.StateManaged || !w.InSync:
			return fmt.Errorf("%s is %s, in sync %v: %q", w.Job, w.State, w.InSync, w.Problems)
		}
	}
	changes, err := api.ReadChanges(s.t.Context(), s.config.StateDir, time.Time{})
	if err == nil && (len(status.Workloads) != 6 || !slices.ContainsFunc(changes.Changes, func(c api.Change) bool { return c.Kind == api.ChangeProblem })) {
		err = errors.New("nothing is wrong with mute")
	}
	return err
}

// doctorsNode has doctor look at what a node of Nomad has beside the mesh.
func (s *scene) doctorsNode() []string {
	s.t.Helper()
	config, conflists := filepath.Join(s.dir, "weir.hcl"), filepath.Join(s.dir, "conflists")
	test.WriteFile(s.t, config, fmt.Sprintf("consul {\n  address = %q\n}\n", s.consul.Address))
	bridge := filepath.Join(test.CNIPath(s.t), "bridge")
	if err := errors.Join(os.Mkdir(conflists, 0o755), os.Symlink(bridge, filepath.Join(s.dir, "bin", "bridge"))); err != nil {
		s.t.Fatal(err)
	}
	return []string{"-config", config, "-cni-path", filepath.Join(s.dir, "bin"), "-cni-config-dir", conflists}
}

// underLoad has shop dial api while a command runs.
func (s *scene) underLoad(run func()) {
	s.t.Helper()
	ctx, stop := context.WithCancel(s.t.Context())
	var background sync.WaitGroup
	background.Go(func() {
		for ctx.Err() == nil {
			if _, err := s.task.exchange(s.virtual["api"]); err != nil {
				s.t.Errorf("shop dials api: %v", err)
				return
			}
		}
	})
	run()
	stop()
	background.Wait()
}

// varying is what is another thing each time, and what stands for it.
var varying = []struct{ what, with string }{
	{`\d\d:\d\d:\d\d`, "HH:MM:SS"}, {`\d{4}-\d\d-\d\d`, "YYYY-MM-DD"},
	{`240\.0\.0\.\d+`, "240.0.0.N"}, {`127\.0\.0\.1:\d{5}\b`, "127.0.0.1:PORT"},
}

// normal is an output without what varies; columns stay where they are.
func (s *scene) normal(text string, also ...string) string {
	text = strings.ReplaceAll(text, s.dir, "DIR")
	for _, v := range varying {
		text = regexp.MustCompile(v.what).ReplaceAllString(text, v.with)
	}
	text = regexp.MustCompile(`\b(?:\d+m)?\d+(?:\.\d+)?(?:ms|s|m)\b(?:  +)?`).ReplaceAllStringFunc(text, func(match string) string {
		if strings.HasSuffix(match, "  ") {
			return fmt.Sprintf("%-*s", len(match), "TIME")
		}
		return "TIME"
	})
	for i := 0; i < len(also); i += 2 {
		text = regexp.MustCompile(also[i]).ReplaceAllString(text, also[i+1])
	}
	return text
}

// byAllocation puts what changed in the order of allocations, and of time within each:
// what happens to two of them at the same time is told in either order.
func byAllocation(text string) string {
	head, rest, _ := strings.Cut(text, "WHAT\n")
	list, foot, _ := strings.Cut(rest, "\n\n")
	var entries []string
	for _, line := range strings.Split(list, "\n") {
		if last := len(entries) - 1; last >= 0 && strings.HasPrefix(line, " ") {
			entries[last] += "\n" + line
		} else {
			entries = append(entries, line)
		}
	}
	slices.SortStableFunc(entries, func(a, b string) int { return strings.Compare(strings.Fields(a)[1], strings.Fields(b)[1]) })
	return head + "WHAT\n" + strings.Join(entries, "\n") + "\n\n" + foot
}

// wantGolden compares an answer with the one that is kept.
func wantGolden(t *testing.T, name, question, got string) {
	t.Helper()
	path := filepath.Join("testdata", "scene", name+".txt")
	got = question + "\n\n" + got
	if os.Getenv(updateGolden) != "" {
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(got), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-kept +got; %s=1 keeps the new one):\n%s", path, updateGolden, diff)
	}
}

// Each question of an operator at 3 a.m. is answered by one command, whose output can be
// read in testdata/scene.
func TestSceneOfSevenQuestions(t *testing.T) {
	s := newScene(t)
	began := time.Now()
	for range 2 {
		if got, err := s.task.exchange(s.virtual["api"]); err != nil || got != s.server.Name {
			t.Fatalf("shop dials api: %q, %v", got, err)
		}
	}
	if got, err := s.task.exchange(s.virtual["secret"]); err == nil {
		t.Fatalf("shop dials secret: %q", got)
	}
	if got, err := s.mute.newHeld().exchange(s.virtual["api"]); err == nil {
		t.Fatalf("mute dials api: %q", got)
	}
	if _, err := test.Ask(s.outside, "tcp4", s.api.at(8080).String()); err != nil {
		t.Fatalf("dial api past its proxy: %v", err)
	}
	if _, err := test.Ask(s.shop.ns, "tcp4", s.api.at(8080).String()); err != nil {
		t.Fatalf("dial api past its proxy: %v", err)
	}
	// The agent asks Consul which services have the addresses that were dialled.
	test.Eventually(t, func() error {
		summary, stderr, _ := s.weir.run("flows", "-summary", "-since", began.Format(time.RFC3339Nano))
		if !strings.Contains(summary, "secret:80") || !strings.Contains(summary, "api:80") || strings.Contains(summary, "240.0.0.") {
			return fmt.Errorf("flows -summary says %s%s", summary, stderr)
		}
		return nil
	}, "the services to have their names")
	for _, q := range []struct {
		name, question string
		args, hidden   []string // the command, and what it is told of this test
		code           int
		also           []string // what else varies, and what stands for it
	}{
		{"why-denied", "Why does this fail?", []string{"explain", "shop", "secret:80"}, nil, 2, nil},
		{"why-no-proxy", "Why does this fail?", []string{"explain", "mute", "api:80"}, nil, 2, nil},
		{"status", "Is anything wrong?", []string{"status"}, nil, 1, nil},
		{"protected", "Is this allocation protected?", []string{"workloads"}, nil, 0, nil},
		{"who-talks", "Who talks to what?", []string{"flows", "-summary"}, []string{"-since", began.Format(time.RFC3339Nano)}, 0, nil},
		{"enforce", "What would enforce refuse?", []string{"guard"}, nil, 0, nil},
		{"changes", "What changed in the last hour?", []string{"changes"}, nil, 0, []string{`(?s)was loaded, in.*?…`, "was loaded, in N\n" + strings.Repeat(" ", 36) + "steps: …"}},
		{"ready", "Is this node ready?", []string{"doctor"}, s.doctorsNode(), 0, []string{
			`configuration in\s+DIR`, "configuration in DIR", `/tmp/weir-bpffs-\d+`, "BPFFS", `cgroup v2 is \S+`, "cgroup v2 is CGROUP",
			`with \d+ warnings?`, "with N warnings", `(?s)\n(Kernel|Hooks|Nomad)\n.*?\n\n`, "\n$1\n  (what this machine has)\n\n"}},
		{"cost", "What does it cost?", []string{"top", "-once", "-interval", "1s"}, nil, 0, []string{
			`\b\d+\.\d+\b`, "N", `\d+ MiB`, "N MiB", `  +`, "  ", `(?s)(\nPROGRAM .*?\n).*`, "$1(a row for each program that ran)\n"}},
	} {
		t.Run(q.name, func(t *testing.T) {
			var stdout, stderr string
			var code int
			run := func() { stdout, stderr, code = s.weir.run(append(q.args, q.hidden...)...) }
			if q.name == "cost" {
				s.underLoad(run)
			} else {
				run()
			}
			if code != q.code || stderr != "" {
				t.Errorf("exit %d, want %d; stderr %s", code, q.code, stderr)
			}
			got := s.normal(stdout, q.also...)
			if q.name == "changes" {
				got = byAllocation(got)
			}
			wantGolden(t, q.name, q.question+"\n$ weir "+strings.Join(q.args, " "), got)
		})
	}
}
