// SPDX-License-Identifier: MPL-2.0

package discover

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
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/weirmesh/weir/agent/bounded"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/agent/wait"
)

// What Nomad's Docker driver gives its containers.
const (
	AllocLabel  = "com.hashicorp.nomad.alloc_id"
	PausePrefix = "nomad_init_" // of the container that holds an allocation's namespace
)

// Containers is what Docker knows of Nomad's containers.
type Containers struct {
	NetNS  map[string]string // the namespace that a running pause container holds, by allocation ID
	Tasks  map[string]string // name of the task, by container ID
	Allocs map[string]string // whose task it is, by container ID
	Error  string            // why it may be old; empty where there is no Docker
}

// Docker follows Docker's engine API: its events are the trigger, the list of
// containers is the truth. When Docker restarts a pause container, the
// allocation gets another namespace at another path, of which nobody else tells.
type Docker struct {
	Client  *http.Client
	changed func()

	mu   sync.Mutex
	View Containers

	namespaces map[string]string // of pause containers, by container ID, asked once for each start
}

// What Docker may cost the agent.
const (
	dockerTimeout = 10 * time.Second
	dockerRetry   = 2 * time.Second
	dockerHeaders = 64 << 10 // bytes
	dockerLimit   = 64 << 20 // bytes of an answer
	ElementLimit  = 1 << 20  // bytes of an event, and of a container in the list
	eventsAtOnce  = 1024     // more wait in the socket
	listRest      = 100 * time.Millisecond
	listShare     = 4 // of the time that a list takes, until the next one
)

func NewDocker(socket string, changed func()) *Docker {
	return &Docker{
		changed: changed, namespaces: make(map[string]string),
		Client: &http.Client{Transport: &http.Transport{
			MaxConnsPerHost: 2, ResponseHeaderTimeout: dockerTimeout, MaxResponseHeaderBytes: dockerHeaders,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return (&net.Dialer{Timeout: dockerTimeout}).DialContext(ctx, "unix", socket)
			},
		}},
	}
}

// Current is the view as it is now. Its maps are never written again.
func (d *Docker) Current() Containers {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.View
}

// Run follows Docker until ctx ends. A node without Docker costs one connect
// in a while.
func (d *Docker) Run(ctx context.Context) {
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
		told := d.View.Error == text
		d.View.Error = text
		d.mu.Unlock()
		if !told {
			d.changed()
		}
		if _, alive := wait.Pause(ctx, dockerRetry, nil); !alive {
			return
		}
	}
}

// follow reads everything once and again after events, and returns when Docker
// does not answer any more. However many events come, the list is asked for
// with a rest in between: an event says that something changed, not what.
func (d *Docker) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := d.get(ctx, "/events", map[string][]string{
		"type": {"container"}, "event": {"start", "die", "destroy"}, "label": {AllocLabel},
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
		if _, alive := wait.Pause(ctx, max(listRest, listShare*time.Since(began)), nil); !alive {
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
	lines.Buffer(nil, ElementLimit)
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
		err = fmt.Errorf("event of more than %d bytes", ElementLimit)
	case err == nil:
		err = io.EOF
	}
	return fmt.Errorf("follow Docker: %w", err)
}

// read lists the containers and asks for the namespaces that are not known yet.
func (d *Docker) read(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, dockerTimeout)
	defer cancel()
	list, err := d.List(ctx)
	if err != nil {
		return err
	}
	next := Containers{NetNS: make(map[string]string), Tasks: make(map[string]string), Allocs: make(map[string]string)}
	known := make(map[string]string)
	for _, c := range list {
		id := c.Labels[AllocLabel]
		if len(c.Names) == 0 || !registration.IsAllocID(id) {
			continue
		}
		pause, task := NameOf(c.Names, id)
		if !pause {
			if task != "" {
				next.Tasks[c.ID], next.Allocs[c.ID] = task, id
			}
			continue
		}
		if c.State != "running" {
			continue
		}
		netns, err := d.namespaceOf(ctx, c.ID)
		if errors.Is(err, errNoContainer) {
			continue // it ended
		}
		if err != nil {
			return err
		}
		if known[c.ID] = netns; netns != "" {
			next.NetNS[id] = netns
		}
	}
	d.namespaces = known
	d.mu.Lock()
	same := maps.Equal(d.View.NetNS, next.NetNS) && maps.Equal(d.View.Tasks, next.Tasks) && d.View.Error == ""
	d.View = next
	d.mu.Unlock()
	if !same {
		d.changed()
	}
	return nil
}

// namespaceOf is the namespace of a container, as it was last told where that still lives:
// the event of its restart may be lost.
func (d *Docker) namespaceOf(ctx context.Context, id string) (string, error) {
	if netns, asked := d.namespaces[id]; asked && !IsGone(netns) {
		return netns, nil
	}
	var answer struct {
		NetworkSettings struct{ SandboxKey string }
	}
	path := "/containers/" + id + "/json"
	err := d.ask(ctx, path, &answer)
	netns := answer.NetworkSettings.SandboxKey
	if err == nil && netns != "" && !filepath.IsAbs(netns) {
		err = fmt.Errorf("ask Docker for %s: SandboxKey %q is no absolute path", path, netns)
	}
	return netns, err
}

// NameOf says what the names of an allocation's container make of it: that which
// holds the namespace, or a task's. A task may have any name, and begins with the
// pause container's prefix where its job wants so.
func NameOf(names []string, alloc string) (pause bool, task string) {
	for _, name := range names {
		name = strings.TrimPrefix(name, "/")
		if name == PausePrefix+alloc {
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

// List asks for the containers of allocations. One after the other is read, so
// that neither one nor all can be longer than is right.
func (d *Docker) List(ctx context.Context) (list []container, err error) {
	const path = "/containers/json"
	body, err := d.get(ctx, path, map[string][]string{"label": {AllocLabel}})
	if err != nil {
		return nil, err
	}
	defer body.Close()
	whole := &bounded.Reader{From: body, Limit: dockerLimit}
	element := &bounded.Reader{From: whole, Limit: ElementLimit}
	answer := json.NewDecoder(element)
	if _, err = answer.Token(); err != nil {
		return nil, fmt.Errorf("ask Docker for %s: %w", path, err)
	}
	for answer.More() {
		var c container
		element.Count = 0
		if err := answer.Decode(&c); err != nil {
			return nil, fmt.Errorf("ask Docker for %s: %w", path, err)
		}
		if IsContainerID(c.ID) {
			list = append(list, c)
		}
	}
	if _, err = answer.Token(); err != nil {
		return nil, fmt.Errorf("ask Docker for %s: %w", path, err)
	}
	return list, nil
}

// ask asks about one container.
func (d *Docker) ask(ctx context.Context, path string, answer any) error {
	body, err := d.get(ctx, path, nil)
	if err != nil {
		return err
	}
	defer body.Close()
	if err := json.NewDecoder(&bounded.Reader{From: body, Limit: ElementLimit}).Decode(answer); err != nil {
		return fmt.Errorf("ask Docker for %s: %w", path, err)
	}
	return nil
}

func (d *Docker) get(ctx context.Context, path string, filters map[string][]string) (io.ReadCloser, error) {
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
	response, err := d.Client.Do(request)
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

// ContainerOf finds the ID of a container in the path of its cgroup, whatever
// the driver: "/docker/<id>", "docker-<id>.scope", "libpod-<id>.scope".
func ContainerOf(cgroup string) string {
	for _, part := range slices.Backward(strings.Split(cgroup, "/")) {
		part = strings.TrimSuffix(part, ".scope")
		if i := strings.LastIndexByte(part, '-'); i >= 0 {
			part = part[i+1:]
		}
		if IsContainerID(part) {
			return part
		}
	}
	return ""
}

func IsContainerID(text string) bool {
	const length = 64
	return len(text) == length && strings.Trim(text, "0123456789abcdef") == ""
}
