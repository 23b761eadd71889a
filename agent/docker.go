// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"
)

// What Nomad's Docker driver gives its containers.
const (
	allocLabel  = "com.hashicorp.nomad.alloc_id"
	pausePrefix = "nomad_init_" // of the container that holds an allocation's namespace
)

// containers is what Docker knows of Nomad's containers.
type containers struct {
	NetNS  map[string]string // the namespace that a running pause container holds, by allocation ID
	Tasks  map[string]string // name of the task, by container ID
	Allocs map[string]string // whose task it is, by container ID
	Error  string            // why it may be old; empty where there is no Docker
}

// docker follows Docker's engine API: its events are the trigger, the list of
// containers is the truth. When Docker restarts a pause container, the
// allocation gets another namespace at another path, of which nobody else tells.
type docker struct {
	client  *http.Client
	changed func()

	mu   sync.Mutex
	view containers

	namespaces map[string]string // of pause containers, by container ID, asked once for each start
}

// What Docker may cost the agent.
const (
	dockerTimeout = 10 * time.Second
	dockerRetry   = 2 * time.Second
	dockerHeaders = 64 << 10 // bytes
	dockerLimit   = 64 << 20 // bytes of an answer
	elementLimit  = 1 << 20  // bytes of an event, and of a container in the list
	eventsAtOnce  = 1024     // more wait in the socket
	listRest      = 100 * time.Millisecond
	listShare     = 4 // of the time that a list takes, until the next one
)

func newDocker(socket string, changed func()) *docker {
	return &docker{
		changed: changed, namespaces: make(map[string]string),
		client: &http.Client{Transport: &http.Transport{
			MaxConnsPerHost: 2, ResponseHeaderTimeout: dockerTimeout, MaxResponseHeaderBytes: dockerHeaders,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{Timeout: dockerTimeout}).DialContext(ctx, "unix", socket)
			},
		}},
	}
}

// current is the view as it is now. Its maps are never written again.
func (d *docker) current() containers {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.view
}

// run follows Docker until ctx ends. A node without Docker costs one connect
// in a while.
func (d *docker) run(ctx context.Context) {
	for {
		err := d.follow(ctx)
		if ctx.Err() != nil {
			return
		}
		text := ""
		if !errors.Is(err, fs.ErrNotExist) {
			text = err.Error()
		}
		d.mu.Lock()
		told := d.view.Error == text
		d.view.Error = text
		d.mu.Unlock()
		if !told {
			d.changed()
		}
		if _, alive := pause(ctx, dockerRetry, nil); !alive {
			return
		}
	}
}

// follow reads everything once and again after events, and returns when Docker
// does not answer any more. However many events come, the list is asked for
// with a rest in between: an event says that something changed, not what.
func (d *docker) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := d.get(ctx, "/events", map[string][]string{
		"type": {"container"}, "event": {"start", "die", "destroy"}, "label": {allocLabel},
	})
	if err != nil {
		return err
	}
	events, ended := make(chan string, eventsAtOnce), make(chan error, 1)
	var reader sync.WaitGroup
	reader.Go(func() { ended <- readEvents(ctx, stream, events) })
	defer func() {
		cancel() // which ends the stream too
		reader.Wait()
		_ = stream.Close()
	}()
	clear(d.namespaces)
	for {
		began := time.Now()
		if err := d.read(ctx); err != nil {
			return err
		}
		if _, alive := pause(ctx, max(listRest, listShare*time.Since(began)), nil); !alive {
			return ctx.Err()
		}
		select {
		case err := <-ended:
			return err
		case id := <-events:
			delete(d.namespaces, id)
		}
		for range len(events) {
			delete(d.namespaces, <-events)
		}
	}
}

// readEvents hands on the containers that events are about, until the stream
// ends or has a line that no event is as long as.
func readEvents(ctx context.Context, stream io.Reader, events chan<- string) error {
	lines := bufio.NewScanner(stream)
	lines.Buffer(nil, elementLimit)
	for lines.Scan() {
		if len(lines.Bytes()) == 0 {
			continue
		}
		var event struct{ Actor struct{ ID string } }
		if err := json.Unmarshal(lines.Bytes(), &event); err != nil {
			return fmt.Errorf("follow Docker: read event: %w", err)
		}
		select {
		case events <- event.Actor.ID:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	err := lines.Err()
	switch {
	case errors.Is(err, bufio.ErrTooLong):
		err = fmt.Errorf("event of more than %d bytes", elementLimit)
	case err == nil:
		err = io.EOF
	}
	return fmt.Errorf("follow Docker: %w", err)
}

// read lists the containers and asks for the namespaces that are not known yet.
func (d *docker) read(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, dockerTimeout)
	defer cancel()
	list, err := d.list(ctx)
	if err != nil {
		return err
	}
	next := containers{NetNS: make(map[string]string), Tasks: make(map[string]string), Allocs: make(map[string]string)}
	known := make(map[string]string)
	for _, c := range list {
		id := c.Labels[allocLabel]
		if len(c.Names) == 0 || !isAllocID(id) {
			continue
		}
		pause, task := nameOf(c.Names, id)
		if !pause {
			if task != "" {
				next.Tasks[c.ID], next.Allocs[c.ID] = task, id
			}
			continue
		}
		if c.State != "running" {
			continue
		}
		netns, asked := d.namespaces[c.ID]
		if !asked || isGone(netns) { // the event of its restart may be lost

			var answer struct {
				NetworkSettings struct{ SandboxKey string }
			}
			err := d.ask(ctx, "/containers/"+c.ID+"/json", &answer)
			if errors.Is(err, errNoContainer) {
				continue // it ended
			}
			if err != nil {
				return err
			}
			netns = answer.NetworkSettings.SandboxKey
		}
		if known[c.ID] = netns; netns != "" {
			next.NetNS[id] = netns
		}
	}
	d.namespaces = known
	d.mu.Lock()
	same := maps.Equal(d.view.NetNS, next.NetNS) && maps.Equal(d.view.Tasks, next.Tasks) && d.view.Error == ""
	d.view = next
	d.mu.Unlock()
	if !same {
		d.changed()
	}
	return nil
}

// nameOf says what the names of an allocation's container make of it: that which
// holds the namespace, or a task's. A task may have any name, and begins with the
// pause container's prefix where its job wants so.
func nameOf(names []string, alloc string) (pause bool, task string) {
	for _, name := range names {
		name = strings.TrimPrefix(name, "/")
		if name == pausePrefix+alloc {
			return true, ""
		}
		if of, found := strings.CutSuffix(name, "-"+alloc); found && !strings.Contains(of, "/") {
			task = of
		}
	}
	return false, task
}

var errNoContainer = errors.New("no such container")

// container is one of the list.
type container struct {
	ID     string `json:"Id"`
	Names  []string
	State  string
	Labels map[string]string
}

// list asks for the containers of allocations. One after the other is read, so
// that neither one nor all can be longer than is right.
func (d *docker) list(ctx context.Context) (list []container, err error) {
	const path = "/containers/json"
	body, err := d.get(ctx, path, map[string][]string{"label": {allocLabel}})
	if err != nil {
		return nil, err
	}
	defer body.Close()
	whole := &boundedBody{body: body, limit: dockerLimit}
	element := &boundedBody{body: whole, limit: elementLimit}
	answer := json.NewDecoder(element)
	if _, err = answer.Token(); err != nil {
		return nil, fmt.Errorf("ask Docker for %s: %w", path, err)
	}
	for answer.More() {
		var c container
		element.read = 0
		if err := answer.Decode(&c); err != nil {
			return nil, fmt.Errorf("ask Docker for %s: %w", path, err)
		}
		if isContainerID(c.ID) {
			list = append(list, c)
		}
	}
	if _, err = answer.Token(); err != nil {
		return nil, fmt.Errorf("ask Docker for %s: %w", path, err)
	}
	return list, nil
}

// ask asks about one container.
func (d *docker) ask(ctx context.Context, path string, answer any) error {
	body, err := d.get(ctx, path, nil)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(&boundedBody{body: body, limit: elementLimit}).Decode(answer); err != nil {
		return fmt.Errorf("ask Docker for %s: %w", path, err)
	}
	return nil
}

func (d *docker) get(ctx context.Context, path string, filters map[string][]string) (io.ReadCloser, error) {
	if filters != nil {
		text, err := json.Marshal(filters)
		if err != nil {
			return nil, fmt.Errorf("ask Docker for %s: %w", path, err)
		}
		path += "?filters=" + url.QueryEscape(string(text))
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker"+path, nil)
	if err != nil {
		return nil, fmt.Errorf("ask Docker for %s: %w", path, err)
	}
	response, err := d.client.Do(request)
	if err != nil {
		return nil, fmt.Errorf("ask Docker: %w", err)
	}
	switch response.StatusCode {
	case http.StatusOK:
		return response.Body, nil
	case http.StatusNotFound:
		err = errNoContainer
	default:
		err = errors.New(response.Status)
	}
	return nil, errors.Join(fmt.Errorf("ask Docker for %s: %w", path, err), response.Body.Close())
}

// containerOf finds the ID of a container in the path of its cgroup, whatever
// the driver: "/docker/<id>", "docker-<id>.scope", "libpod-<id>.scope".
func containerOf(cgroup string) string {
	for _, part := range slices.Backward(strings.Split(cgroup, "/")) {
		part = strings.TrimSuffix(part, ".scope")
		if i := strings.LastIndexByte(part, '-'); i >= 0 {
			part = part[i+1:]
		}
		if isContainerID(part) {
			return part
		}
	}
	return ""
}

func isContainerID(text string) bool {
	const length = 64
	return len(text) == length && strings.Trim(text, "0123456789abcdef") == ""
}
