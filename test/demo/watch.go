// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/monitor"
	"github.com/weirmesh/weir/test/spawn"
)

// watch collects what the kernel reports of connections.
type watch struct {
	mutex  sync.Mutex
	events []monitor.Event
	stop   context.CancelFunc
	done   chan struct{}
	err    error // valid once done is closed
}

// startWatch returns once events arrive for certain: it dials Envoy's admin
// port in web, which is local and harmless, until that is reported.
func (s *story) startWatch(ctx context.Context) (*watch, error) {
	listen, stop := context.WithCancel(ctx)
	w := &watch{stop: stop, done: make(chan struct{})}
	go func() {
		defer close(w.done)
		w.err = datapath().Events(listen, func(event monitor.Event) error {
			w.mutex.Lock()
			defer w.mutex.Unlock()
			w.events = append(w.events, event)
			return nil
		})
	}()
	dial := spawn.Dialer(s.web.netns)
	_, err := w.await(ctx, bpfmap.Local, 1, func() error {
		conn, err := dial(ctx, "tcp", adminAddress)
		if err != nil {
			return fmt.Errorf("dial %s: %w", adminAddress, err)
		}
		return conn.Close()
	})
	if err != nil {
		return nil, errors.Join(err, w.end())
	}
	return w, nil
}

// await returns the events since the last call, in the order of their time, as
// soon as count of them have the verdict. Before each look it calls nudge.
func (w *watch) await(ctx context.Context, verdict bpfmap.Verdict, count int, nudge func() error) ([]monitor.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if err := nudge(); err != nil {
			return nil, err
		}
		if events := w.take(verdict, count); events != nil {
			return events, nil
		}
		select {
		case <-w.done:
			return nil, fmt.Errorf("read events: they ended early: %w", w.err)
		case <-ctx.Done():
			return nil, fmt.Errorf("await %d events of verdict %s: %w", count, verdict, ctx.Err())
		case <-tick.C:
		}
	}
}

func (w *watch) take(verdict bpfmap.Verdict, count int) []monitor.Event {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	have := 0
	for _, event := range w.events {
		if event.Verdict == verdict {
			have++
		}
	}
	if have < count {
		return nil
	}
	taken := w.events
	w.events = nil
	slices.SortFunc(taken, func(a, b monitor.Event) int { return a.Time.Compare(b.Time) })
	return taken
}

// end stops the watch.
func (w *watch) end() error {
	w.stop()
	<-w.done
	return w.err
}
