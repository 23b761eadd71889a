// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

// faults are there at once.
type faults struct {
	name   string
	faults []fault
}

// nodeFaults meet every allocation of the node, or Nomad's own bridge; the
// data path is loaded.
func nodeFaults() []faults {
	const readOnly = "mount -t tmpfs -o ro none /run/weir"
	const policy = "echo 'cni { job_args = 7 }' >/etc/weir.d/zz.hcl"
	return []faults{
		{"State", []fault{
			{name: "state", mode: "cni/weir", inject: readOnly, want: []string{"build network weir", "/run/weir", "read-only"}},
			{name: "state-bridge", mode: "bridge", repair: "umount /run/weir", want: []string{"redirect namespace", "/run/weir", "read-only"}},
		}},
		{"Policy", []fault{
			{name: "policy", mode: "cni/weir", inject: policy, want: []string{"read the operator's policy", "/etc/weir.d/zz.hcl", "job_args"}},
			{name: "policy-bridge", mode: "bridge", repair: "rm /etc/weir.d/zz.hcl", want: []string{"read the operator's policy", "/etc/weir.d/zz.hcl"}},
		}},
		// As firewalld does it: nobody else may write to its table.
		{"Owners", []fault{
			{
				name: "owned", mode: "cni/weir",
				inject: `mkfifo /run/owned; setsid nft -i </run/owned >/dev/null 2>&1 & exec 9>/run/owned
					setsid sleep 600 9>&9 >/dev/null 2>&1 & echo $! >/run/owned.pid
					printf '%s\n' 'add table inet firewalld { flags owner; }' 'add chain inet firewalld forward { type filter hook forward priority 10; policy drop; }' >&9
					until nft list chain inet firewalld forward >/dev/null 2>&1; do sleep 0.1; done # it reads when it comes to it`,
				repair: "kill $(cat /run/owned.pid); rm /run/owned /run/owned.pid",
				want:   []string{"bridge weir", "inet firewalld forward", "drops", "firewall-cmd"},
			},
			{
				name: "layout-bridge", mode: "bridge",
				inject: "bpftool map update pinned /sys/fs/bpf/weir/maps/control key 0 0 0 0 value hex " + strings.Repeat("00 ", 8) + "63 00 00 00 " + strings.Repeat("00 ", 20),
				repair: "weir load", want: []string{"redirect namespace", "another version", "`weir load`"},
			},
		}},
		{"Programs", []fault{
			{name: "sysctl", mode: "cni/weir", inject: "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys", repair: "umount /proc/sys", want: []string{"set sysctl", "/eth0/", "read-only"}},
			{name: "nomad-bridge", mode: "bridge", inject: "ip link del nomad; ip link add nomad type veth peer name other", repair: "ip link del nomad", want: []string{`"nomad" already exists but is not a bridge`}, foreign: true},
		}},
	}
}

// TestFailedAdd lets ADD fail at each of its steps, by what can really happen to a
// node. Nomad's event says what failed and what to do; nothing half-done is left; when
// the cause is gone the allocation that Nomad places instead runs.
func TestFailedAdd(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.Tool("bpftool"), test.Tool("nft"), test.Tool("flock"))
	own := ownFaults(test.NewCgroup(t).Path)
	var conflists []string
	for i, f := range own {
		conflists = append(conflists, f.writeConflist(t, t.TempDir(), i))
	}
	n := nomad.Start(t, nomad.Options{NoDocker: true, NoAgent: true, Conflists: conflists})
	n.InstallPlugin(buildEngine(t), "consul-engine")

	t.Run("NoBPFFS", func(t *testing.T) { // no fault: the first ADD mounts it
		n := n.For(t)
		n.Command("umount", "/sys/fs/bpf")
		job := n.Submit("testdata/jobs/add-bridge.nomad.hcl", "id", "no-bpffs")
		a := awaitTask(t, job)
		wantRedirected(t, n, a)
		job.Stop()
	})
	t.Run("Own", func(t *testing.T) {
		const pins = "mount -o remount,ro /sys/fs/bpf"
		testFaults(t, n, append([]fault{
			{name: "pins", mode: "cni/weir", inject: pins, want: []string{"redirect namespace", "/sys/fs/bpf/weir", "read-only"}},
			{name: "pins-bridge", mode: "bridge", repair: "mount -o remount,rw /sys/fs/bpf", want: []string{"redirect namespace", "/sys/fs/bpf/weir", "read-only"}},
		}, own...), own)
	})
	for _, each := range nodeFaults() {
		t.Run(each.name, func(t *testing.T) { testFaults(t, n, each.faults, nil) })
	}
	t.Run("Lock", func(t *testing.T) { waits(t, n.For(t)) })
	t.Run("Again", func(t *testing.T) { again(t, n.For(t)) })
	n.ExpectNothingLeft()
}

// testFaults lets all faults happen, and then repairs one after the other. own are
// those with a network of their own.
func testFaults(t *testing.T, node *nomad.Node, faults, own []fault) {
	n := node.For(t)
	index := func(f fault) int {
		for i, each := range own {
			if each.name == f.name {
				return i
			}
		}
		return 0
	}
	repaired := make(map[string]bool)
	repair := func(f fault) {
		if !repaired[f.name] {
			repaired[f.name] = true
			f.run(node, index(f), f.repair) // also when this test has ended
		}
	}
	for _, f := range faults {
		t.Cleanup(func() { repair(f) })
		f.run(n, index(f), f.inject)
	}
	jobs := make(map[string]*nomad.Job)
	for _, f := range faults {
		jobs[f.name] = submit(n, f)
	}
	for _, f := range faults {
		t.Run(f.name+"Fails", func(t *testing.T) {
			id, event := failure(t, n.For(t), jobs[f.name])
			t.Logf("Nomad says: %s", event)
			want := f.want
			if !f.foreign && f.name != "key" && f.name != "mtu" {
				want = append(want, "allocation "+id)
			}
			for _, part := range want {
				if !strings.Contains(event, part) {
					t.Errorf("Nomad's event is %q, want %q in it", event, part)
				}
			}
			if strings.Contains(event, "\n") {
				t.Errorf("Nomad's event is %q, want one line", event)
			}
			// DEL waits in line, too.
			test.EventuallyIn(t, inLine, func() error { return traces(n, f, id) }, "nothing to be left of the attempt")
			repair(f)
		})
	}
	for _, f := range faults {
		t.Run(f.name+"Repaired", func(t *testing.T) {
			n := n.For(t)
			wantRedirected(t, n, awaitTask(t, jobs[f.name]))
			jobs[f.name].Stop()
		})
	}
	wantOnly(t, n)
	for _, f := range faults {
		for _, place := range []string{"/bpf/weir/lookups/*", "/state/workloads/*", "/state/networks/*"} {
			if left := files(n, f.own()+place); len(left) > 0 {
				t.Errorf("%s is left: %q", f.own()+place, left)
			}
		}
	}
}

func submit(n *nomad.Node, f fault) *nomad.Job {
	if f.mode == "bridge" {
		return n.Submit("testdata/jobs/add-bridge.nomad.hcl", "id", f.name)
	}
	variables := []string{"id", f.name, "mode", f.network()}
	if f.ports {
		variables = append(variables, "port", "http")
	}
	if f.args != "" {
		variables = append(variables, "args", f.args)
	}
	return n.Submit("testdata/jobs/add-own.nomad.hcl", variables...)
}

// traces names what is on the node of an allocation.
func traces(n *nomad.Node, f fault, id string) error {
	var problems []error
	for _, pattern := range []string{
		"/run/netns/", "/var/lib/cni/results/*", "/run/weir/workloads/", "/run/weir/networks/", f.own() + "/state/*/",
	} {
		for _, file := range files(n, pattern+id+"*") {
			problems = append(problems, fmt.Errorf("%s%s", pattern, file))
		}
	}
	for _, owner := range leases(n) {
		if strings.Contains(owner, id) {
			problems = append(problems, fmt.Errorf("lease of %q", owner))
		}
	}
	if rules, err := n.Try("iptables-save"); err != nil || strings.Contains(rules, id) {
		problems = append(problems, fmt.Errorf("rules: %v: %s", err, rules))
	}
	return errors.Join(problems...)
}

// wantRedirected fails where the allocation's application can be reached from the
// node: it runs, but has no proxy that listens.
func wantRedirected(t *testing.T, n *nomad.Node, a *nomad.Alloc) {
	t.Helper()
	inside := &test.NetNS{Path: namespace(n, a)}
	test.Eventually(t, func() error {
		if got := n.Get(inside, "http://127.0.0.1:8080/"); got.Reply == nil {
			return fmt.Errorf("got %s", got)
		}
		return nil
	}, "the application")
	fields := strings.Fields(n.Command("nsenter", "--net=/run/netns/"+a.ID, "ip", "-o", "-4", "address", "show", "dev", "eth0"))
	if len(fields) < 4 {
		t.Fatalf("address of the allocation: %q", fields)
	}
	address, _, _ := strings.Cut(fields[3], "/")
	if got := n.Get(n.NetNS(), "http://"+address+":8080/"); got.Errno != syscall.ECONNREFUSED {
		t.Errorf("the application is asked without a proxy: %s, want it refused", got)
	}
}

// waits lets another process change the node for a while: ADD waits for it, within
// Nomad's first attempt.
func waits(t *testing.T, n *nomad.Node) {
	f := fault{name: "lock", mode: "cni/weir"}
	f.run(n, 0, "setsid flock --no-fork /run/weir/lock sleep 600 >/dev/null 2>&1 & echo $! >/run/lock.pid")
	job := submit(n, f)
	test.Eventually(t, func() error {
		if len(files(n, "/run/weir/networks/*.json")) == 0 {
			return os.ErrNotExist
		}
		return nil
	}, "a network of the allocation")
	if a := job.Alloc("task"); a.ClientStatus != "pending" {
		t.Errorf("the allocation is %s while the lock is held, want it pending", a.ClientStatus)
	}
	f.run(n, 0, "kill $(cat /run/lock.pid)")
	wantRedirected(t, n, awaitTask(t, job))
	if log := n.Nomad.Log(t); strings.Contains(log, "take lock") {
		t.Error("an attempt failed for the lock")
	}
	job.Stop()
}

// again repairs a fault while Nomad waits to try the same allocation again. In a network
// of Weir's the second ADD serves it. On Nomad's own bridge it does not come so far:
// the reference plugin refuses an allocation that has a lease, and Nomad places another;
// a third where the repair comes after the second has begun.
func again(t *testing.T, n *nomad.Node) {
	for _, mode := range []string{"cni/weir", "bridge"} {
		f := fault{name: "again-" + filepath.Base(mode), mode: mode, inject: "mount -o remount,ro /sys/fs/bpf", repair: "mount -o remount,rw /sys/fs/bpf"}
		f.run(n, 0, f.inject)
		const attempt = "failed to configure network: "
		tried := strings.Count(n.Nomad.Log(t), attempt)
		job := submit(n, f)
		test.Eventually(t, func() error {
			if now := strings.Count(n.Nomad.Log(t), attempt); now == tried {
				return fmt.Errorf("%d failures in the log", now)
			}
			return nil
		}, "the first failure")
		f.run(n, 0, f.repair)
		a := awaitTask(t, job)
		wantRedirected(t, n, a)
		var all []struct{ ID string }
		n.NomadGet("/v1/job/"+job.ID+"/allocations", &all)
		if mode == "cni/weir" && len(all) != 1 || mode == "bridge" && len(all) < 2 {
			t.Errorf("%s: the job had %d allocations, want 1 with cni/weir and more with bridge", mode, len(all))
		}
		wantOnly(t, n, a)
		job.Stop()
	}
}

// inLine is how long a failure may take to come: Nomad makes one network at a time, and
// sleeps for seconds between its attempts.
const inLine = 2 * time.Minute

// failure waits for the first allocation to fail and returns what Nomad says of it.
func failure(t *testing.T, n *nomad.Node, job *nomad.Job) (id, event string) {
	t.Helper()
	test.EventuallyIn(t, inLine, func() error {
		var list []struct {
			ID, ClientStatus string
			TaskStates       map[string]struct {
				Events []struct{ Type, DisplayMessage string }
			}
		}
		n.NomadGet("/v1/job/"+job.ID+"/allocations", &list)
		for _, a := range list {
			for _, state := range a.TaskStates {
				for _, e := range state.Events {
					if a.ClientStatus == "failed" && e.Type == "Setup Failure" {
						id, event = a.ID, e.DisplayMessage
						return nil
					}
				}
			}
		}
		return fmt.Errorf("allocations are %+v", list)
	}, "a failure")
	return id, event
}

// awaitTask waits until an allocation runs, after others that failed.
func awaitTask(t *testing.T, job *nomad.Job) (a *nomad.Alloc) {
	t.Helper()
	test.EventuallyIn(t, inLine, func() error {
		for _, each := range job.Allocs() {
			if each.ClientStatus == "running" {
				a = each
				return nil
			}
		}
		return os.ErrNotExist
	}, "an allocation that runs")
	return a
}
