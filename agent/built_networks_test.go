// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/weirmesh/weir/test"
)

// sharedLog is a log that a test reads while others write it.
type sharedLog struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *sharedLog) Write(text []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(text)
}

func (l *sharedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// What is put back of networks is counted and told, and so is that it cannot be, once.
func TestNetworksAreRepaired(t *testing.T) {
	n := newNode(t)
	var log sharedLog
	var calls atomic.Int32
	n.run(func(a *Agent) {
		a.log = slog.New(slog.NewTextHandler(&log, nil))
		a.networkInterval = 1 // as often as it can
		a.repairNetworks = func(context.Context) ([]string, error) {
			switch calls.Add(1) {
			case 1:
				return []string{"host port tcp 0.0.0.0:8080"}, nil
			case 2, 3:
				return nil, errors.New("list chains: no")
			}
			return nil, nil
		}
	})
	test.Eventually(t, func() error {
		if calls.Load() < 5 {
			return fmt.Errorf("asked %d times", calls.Load())
		}
		return nil
	}, "networks are looked at")
	if got := n.agent.Status().Counts.Repaired; got != 1 {
		t.Errorf("%d repairs counted, want 1", got)
	}
	for _, want := range []string{"host port tcp 0.0.0.0:8080", "list chains: no", "networks can be repaired again"} {
		if strings.Count(log.String(), want) != 1 {
			t.Errorf("log:\n%s\nwant %q once", log.String(), want)
		}
	}
}
