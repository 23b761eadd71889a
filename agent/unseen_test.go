// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

func (n *node) answers() error {
	_, err := api.ReadStatus(context.Background(), n.config.StateDir)
	return err
}

// metric returns an error unless the agent shows the line.
func (n *node) metric(line string) error {
	address := n.agent.Status().Telemetry
	response, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && !strings.Contains(string(text), line+"\n") {
		err = fmt.Errorf("metrics do not have %q", line)
	}
	return err
}

func (n *node) problem(part string) error {
	problems := n.agent.Status().Problems
	for _, problem := range problems {
		if strings.Contains(problem.What, part) {
			return nil
		}
	}
	return fmt.Errorf("problems %v: none says %q", problems, part)
}

// Somebody wipes the state directory: the socket comes back, for root alone, and
// so does what libcni still knows.
func TestWipedStateDirectory(t *testing.T) {
	n := newNode(t)
	id := numbered(1)
	_, key := n.transparent(id)
	n.fake.answers(registered(id))
	n.run()
	n.eventually(id, api.StateManaged)
	// The agent writes there at the same time.
	test.Eventually(t, func() error { return os.RemoveAll(n.config.StateDir) }, "the directory to be wiped")
	test.Eventually(t, n.answers, "the socket to come back")
	info, err := os.Stat(filepath.Join(n.config.StateDir, api.SocketName))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v; want it with mode 0600", info, err)
	}
	test.Eventually(t, func() error {
		known, err := n.Records()
		if err == nil && (len(known) != 1 || known[0].Key != key) {
			err = fmt.Errorf("records of %v, want one of %s", known, key)
		}
		return err
	}, "the record to come back")
}

// One record that cannot be read ends neither the agent nor what it does for the
// others; it is named, counted, and made anew.
func TestAgentStartsBesideABadRecord(t *testing.T) {
	n := newNode(t)
	bad, good := numbered(1), numbered(2)
	_, key := n.transparent(bad)
	n.transparent(good)
	n.fake.answers(registered(good))
	path := filepath.Join(n.config.StateDir, "workloads", key.String()+".json")
	if err := os.Truncate(path, 30); err != nil {
		t.Fatal(err)
	}
	n.run()
	n.eventually(good, api.StateManaged)
	if err := errors.Join(n.problem(path), n.metric(`weir_state_unseen{reason="record_unreadable"} 1`)); err != nil {
		t.Error(err)
	}
	test.Eventually(t, func() error {
		if known, err := n.Records(); err != nil || len(known) != 2 {
			return fmt.Errorf("records of %v, %v; want both", known, err)
		}
		return nil
	}, "the record to be made anew")
}

// Somebody stopped has the lock when the agent starts. It tells so, and goes on
// once that is over.
func TestAgentStartsBesideAStoppedHolderOfTheLock(t *testing.T) {
	n := newNode(t)
	id := numbered(1)
	n.transparent(id)
	n.fake.answers(registered(id))
	lock := filepath.Join(n.config.StateDir, "lock")
	holder, release := test.HoldLock(t, lock)
	if err := holder.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	n.run(func(a *Agent) { a.datapath = redirect.New(n.config.Paths()).Within(50 * time.Millisecond) })
	test.Eventually(t, n.answers, "the agent to answer")
	test.Eventually(t, func() error {
		return errors.Join(n.problem(fmt.Sprintf("process %d (cat)", holder.Pid)), n.metric(`weir_state_unseen{reason="locked"} 1`))
	}, "the agent to tell of it")
	if err := holder.Signal(unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	release()
	n.eventually(id, api.StateManaged)
	test.Eventually(t, func() error {
		if reasons := (source{n.agent}).Unseen(); len(reasons) > 0 {
			return fmt.Errorf("reasons %v", reasons)
		}
		return nil
	}, "the agent to see again")
}

// libcni writes a result in place, also that of an allocation that runs. Read halfway it
// neither ends the allocation nor takes its open ports away.
func TestResultThatCannotBeReadEndsNothing(t *testing.T) {
	n := newNode(t)
	n.ports = []any{mapped(8181), mapped(20001)}
	ns := test.NewNetNS(t)
	n.cached(numbered(1), ns.Path, "")
	n.fake.answers(registered(numbered(1)))
	a := n.newStepwise()
	removed := func(want uint64) {
		t.Helper()
		a.pass(true)
		list, err := n.Records()
		if got := a.Status().Counts.Removed; err != nil || got != want || len(list) != 1-int(want) {
			t.Fatalf("on record %+v, %v, removed %d; want %d", list, err, got, want)
		}
		if len(list) == 1 && (!list[0].Complete || !slices.Equal(list[0].MeshConfig.ExcludeInboundPorts, []uint16{8181})) {
			t.Fatalf("in force %v: %+v, want port 8181 open", list[0].Complete, list[0].MeshConfig)
		}
	}
	a.asks(t.Context())
	removed(0)
	path := filepath.Join(n.config.CNI.CacheDir, "results", "nomad-"+numbered(1)+"-eth0")
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, half := range [][]byte{nil, whole[:len(whole)/2]} {
		test.WriteFile(t, path, string(half))
		removed(0)
	}
	test.WriteFile(t, path, string(whole))
	removed(0)

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	removed(1)
}
