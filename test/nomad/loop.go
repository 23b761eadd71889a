// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/weirmesh/weir/test/nomad/wire"
)

// Loop is a client in a task that asks on and on, whatever dies meanwhile.
type Loop struct {
	alloc *Alloc
	file  string
	ended chan error
	told  strings.Builder

	read int64 // how much of the file is in list
	list []wire.Outcome
}

// Loop starts asking a URL from a task, every 50 ms. It ends with [Loop.Stop], the
// task, the node or the test.
func (a *Alloc) Loop(task, url string) *Loop {
	a.node.tb.Helper()
	name := filepath.Join("alloc", fmt.Sprintf("loop-%d", time.Now().UnixNano()))
	l := &Loop{alloc: a, file: a.File(name), ended: make(chan error, 1)}
	cmd := a.command(task, nil, &l.told, []string{"app", "loop", url, filepath.Join(a.Env(task)["NOMAD_ALLOC_DIR"], filepath.Base(name)), "50ms"})
	go func() { l.ended <- cmd.Wait() }()
	return l
}

// Outcomes are those of the attempts that have ended so far, the oldest first.
func (l *Loop) Outcomes() []wire.Outcome {
	l.alloc.node.tb.Helper()
	text, err := l.unread()
	if err != nil {
		l.alloc.node.tb.Fatalf("read what a loop did: %v", err)
	}
	for line := range strings.Lines(text) {
		if !strings.HasSuffix(line, "\n") {
			break // it is being written
		}
		var outcome wire.Outcome
		if err := json.Unmarshal([]byte(line), &outcome); err != nil {
			l.alloc.node.tb.Fatalf("read what a loop did: %v: %s", err, line)
		}
		l.list = append(l.list, outcome)
		l.read += int64(len(line))
	}
	return slices.Clone(l.list)
}

// unread is what the loop has written since it was last read: a long one is read
// again and again.
func (l *Loop) unread() (string, error) {
	file, err := os.Open(l.file)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer file.Close()
	if _, err := file.Seek(l.read, io.SeekStart); err != nil {
		return "", err
	}
	text, err := io.ReadAll(file)
	return string(text), err
}

// Await waits until the loop has done as many more attempts that pass the check.
func (l *Loop) Await(count int, what string, check func(wire.Outcome) bool) {
	l.alloc.node.tb.Helper()
	before := len(l.Outcomes())
	eventually(l.alloc.node.tb, consulPatience, func() error {
		select {
		case err := <-l.ended:
			l.alloc.node.tb.Fatalf("the loop ended by itself: %v: %s", err, l.told.String())
		default:
		}
		list := l.Outcomes()
		good := 0
		for _, outcome := range list[before:] {
			if check(outcome) {
				good++
			}
		}
		if good < count {
			return fmt.Errorf("%d of %d attempts; the last: %s", good, len(list)-before, list[max(0, len(list)-1):])
		}
		return nil
	}, fmt.Sprintf("%d attempts: %s", count, what))
}

// Stop ends the loop and returns all outcomes. A loop that ended by itself fails
// the test.
func (l *Loop) Stop() []wire.Outcome {
	l.alloc.node.tb.Helper()
	// It is whole under its other name when its writer has ended.
	done := l.file + ".done"
	if err := os.Link(l.file, done); err != nil {
		l.alloc.node.tb.Fatalf("stop loop: %v", err)
	}
	if err := os.Remove(l.file); err != nil {
		l.alloc.node.tb.Fatalf("stop loop: %v", err)
	}
	select {
	case err := <-l.ended:
		if err != nil {
			l.alloc.node.tb.Fatalf("stop loop: %v: %s", err, l.told.String())
		}
	case <-time.After(15 * time.Second):
		l.alloc.node.tb.Fatal("stop loop: it does not end")
	}
	l.file = done
	return l.Outcomes()
}
