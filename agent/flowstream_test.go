// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/agent/flow"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/test"
)

// A reader that stands still loses its own lines and is told how many and why; who
// reads beside it gets all. Both go on for longer than the server lets a request last.
func TestFlowsSlowReader(t *testing.T) {
	config := configfile.DefaultConfig()
	config.StateDir, config.Consul.Enabled, config.Docker.Socket = t.TempDir(), false, ""
	a, err := New(config, Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	a.flows.Ring = flow.NewRing(640*flow.RecordSize, time.Hour)
	listener, err := net.Listen("unix", filepath.Join(config.StateDir, api.SocketName))
	if err != nil {
		t.Fatal(err)
	}
	const timeout = 100 * time.Millisecond
	server := &http.Server{Handler: a.server.LocalAPI(), ReadTimeout: timeout, WriteTimeout: timeout}
	go func() { _ = server.Serve(listener) }() // until it is closed
	t.Cleanup(func() {
		close(a.flows.Done)
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})

	began := time.Now()
	release := make(chan struct{})
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	type reader struct {
		seen, lost atomic.Uint64
		done       chan error
	}
	read := func(wait <-chan struct{}) *reader {
		r := &reader{done: make(chan error, 1)}
		go func() {
			r.done <- api.ReadFlows(ctx, config.StateDir, api.FlowQuery{Follow: true}, func(flow api.Flow) error {
				<-wait
				switch flow.Cause {
				case "":
					r.seen.Add(1)
				case api.LostByReader:
					r.lost.Add(flow.Lost)
				default:
					return fmt.Errorf("flow %+v", flow)
				}
				return nil
			})
		}()
		return r
	}
	now := make(chan struct{})
	close(now)
	quick, slow := read(now), read(release)
	put := func(count int) {
		for range count {
			a.flows.Ring.Append(flow.Record{At: time.Now().UnixNano(), Workload: &flow.Workload{Job: "shop"}, Verdict: bpfmap.Redirected})
		}
	}
	// Both wait for what is to come.
	test.Eventually(t, func() error {
		if waiting := a.flows.Readers.Load(); waiting != 2 {
			return fmt.Errorf("%d readers", waiting)
		}
		return nil
	}, "two readers")
	test.Eventually(t, func() error {
		if time.Since(began) < 3*timeout {
			return errors.New("too early")
		}
		return nil
	}, "the server's bounds to pass")
	const batch, all = 200, 12000
	for total := batch; total <= all; total += batch {
		put(batch)
		test.Eventually(t, func() error {
			if seen := quick.seen.Load(); seen != uint64(total) {
				return fmt.Errorf("%d of %d, %d lost", seen, total, quick.lost.Load())
			}
			return nil
		}, "the quick reader")
	}
	close(release)
	test.Eventually(t, func() error {
		if seen, lost := slow.seen.Load(), slow.lost.Load(); seen+lost != all {
			return fmt.Errorf("it got %d and lost %d, want %d together", seen, lost, all)
		}
		return nil
	}, "the slow reader")
	if slow.lost.Load() == 0 || quick.lost.Load() != 0 {
		t.Errorf("the slow reader lost %d and the quick one %d, want some and none", slow.lost.Load(), quick.lost.Load())
	}
	var told []api.Flow
	err = api.ReadFlows(context.Background(), config.StateDir, api.FlowQuery{}, func(flow api.Flow) error {
		told = append(told, flow)
		return nil
	})
	if err != nil || len(told) < 2 || told[0].Cause != api.LostByMemory || told[0].Lost+uint64(len(told)-1) != all {
		t.Errorf("history of %d lines, %v: the first is %+v, want it to tell what gave way", len(told), err, told[0])
	}
	cancel()
	for _, r := range []*reader{quick, slow} {
		if err := <-r.done; err != nil {
			t.Error(err)
		}
	}
	if err := api.ReadFlows(context.Background(), config.StateDir, api.FlowQuery{Verdicts: []string{"lucky"}}, nil); err == nil {
		t.Error("a verdict that there is not is taken")
	}
}

// A node whose data path is loaded anew has another ring, and the agent reads that.
func TestFlowsFollowTheRing(t *testing.T) {
	n := newNode(t)
	cgroup := test.NewCgroup(t)
	n.config.CgroupRoot = cgroup.Path
	n.Datapath = redirect.New(n.config.Paths())
	mesh, _ := n.transparent(numbered(1))
	n.fake.answers(registered(numbered(1)))
	n.run()
	n.eventually(numbered(1), api.StateManaged)
	task := test.NewClient(t, test.Spec{NetNS: mesh, Cgroup: cgroup, UID: 1000, GID: 1000})
	n.recording(task)
	if _, err := n.Unload(); err != nil {
		t.Fatal(err)
	}
	since := time.Now()
	test.Eventually(t, func() error {
		_, _ = task.Ask("tcp4", "127.0.0.1:1") // nobody listens
		count := 0
		err := api.ReadFlows(context.Background(), n.config.StateDir, api.FlowQuery{Port: 1, Since: since}, func(api.Flow) error {
			count++
			return nil
		})
		if err == nil && count == 0 {
			err = errors.New("nothing is recorded")
		}
		return err // where the data path is not back yet, that nothing is recorded at present
	}, "the agent to record again")
}
