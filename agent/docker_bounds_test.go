// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"bytes"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/test"
)

// What comes from Docker's socket without an end is given up, before it costs
// memory, and told.
func TestDockerWithoutAnEndIsGivenUp(t *testing.T) {
	t.Parallel()
	const most = 4 * discover.ElementLimit // an element, and what sockets and libraries hold
	quiet := func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	}
	label := fmt.Sprintf(`"Labels":{%q:%q}`, discover.AllocLabel, numbered(1))
	pause := strings.Repeat("a", 64)
	for name, c := range map[string]struct {
		path, begin string // of the answer that goes on for ever
		want        string
	}{
		"an event without an end of line": {"/events", `{"Actor":{"ID":"`, "event of more than 1048576 bytes"},
		"a container in the list":         {"/containers/json", `[{"Id":"`, "more than 1048576 bytes"},
		"a container":                     {"/containers/" + pause + "/json", `{"Id":"`, "more than 1048576 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var sent, times atomic.Int64
			socket := filepath.Join(t.TempDir(), "docker.sock")
			serveDocker(t, socket, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				switch {
				case r.URL.Path == c.path:
					times.Add(1)
					fmt.Fprint(w, c.begin)
					for block := bytes.Repeat([]byte("a"), 64<<10); ; {
						n, err := w.Write(block)
						if sent.Add(int64(n)); err != nil {
							return
						}
					}
				case r.URL.Path == "/events":
					quiet(w, r)
				case r.URL.Path != "/containers/json":
					fmt.Fprint(w, `{"NetworkSettings":{"SandboxKey":"/first"}}`)
				default:
					fmt.Fprintf(w, `[{"Id":%q,"Names":["/nomad_init_%s"],"State":"running",%s}]`, pause, numbered(1), label)
				}
			}))
			d := runDocker(t, socket)
			test.Eventually(t, func() error {
				if told := d.Current().Error; !strings.Contains(told, c.want) {
					return fmt.Errorf("told is %q", told)
				}
				return nil
			}, "it to be told")
			if n := sent.Load(); n > times.Load()*most {
				t.Errorf("%d bytes were read in %d tries, want at most %d in each", n, times.Load(), most)
			}
		})
	}
}

// Events tell that something changed; the list is asked for after many of them,
// not after each, and after the last.
func TestDockerListIsNotAskedOncePerEvent(t *testing.T) {
	t.Parallel()
	const events = 20_000
	var lists, said atomic.Int64
	label := fmt.Sprintf(`"Labels":{%q:%q}`, discover.AllocLabel, numbered(1))
	mux := http.NewServeMux()
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		for i := range events {
			fmt.Fprintf(w, "{\"status\":\"die\",\"Actor\":{\"ID\":\"%064x\"}}\n", i)
			said.Add(1)
		}
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	mux.HandleFunc("GET /containers/json", func(w http.ResponseWriter, _ *http.Request) {
		lists.Add(1)
		name := "before"
		if said.Load() == events {
			name = "after"
		}
		fmt.Fprintf(w, `[{"Id":%q,"Names":["/%s-%s"],"State":"running",%s}]`, strings.Repeat("b", 64), name, numbered(1), label)
	})
	socket := filepath.Join(t.TempDir(), "docker.sock")
	serveDocker(t, socket, mux)
	d := runDocker(t, socket)
	test.Eventually(t, func() error {
		if task := d.Current().Tasks[strings.Repeat("b", 64)]; task != "after" {
			return fmt.Errorf("the task is %q", task)
		}
		return nil
	}, "what was true after the last event")
	if n := lists.Load(); n > events/100 {
		t.Errorf("the list was asked for %d times for %d events", n, events)
	}
}
