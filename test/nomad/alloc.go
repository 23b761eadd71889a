// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad/wire"
	"github.com/weirmesh/weir/test/spawn"
)

// Alloc is an allocation, as Nomad told when it was asked.
type Alloc struct {
	ID            string
	Group         string `json:"TaskGroup"`
	JobID         string
	NodeName      string
	ClientStatus  string
	DesiredStatus string
	CreateIndex   uint64
	TaskStates    map[string]struct {
		State  string
		Failed bool
		Events []struct{ Type, DisplayMessage string }
	}

	node *Node
}

// Events is what Nomad says happened to the allocation's tasks.
func (a *Alloc) Events() string {
	var told strings.Builder
	for task, state := range a.TaskStates {
		for _, event := range state.Events {
			fmt.Fprintf(&told, "  %s/%s: %s: %s\n", a.Group, task, event.Type, event.DisplayMessage)
		}
	}
	return told.String()
}

// Cgroup is the cgroup-v2 directory of a task; it works while Nomad is down. With
// raw_exec on a machine with v1 controllers it is that of Nomad itself.
func (a *Alloc) Cgroup(task string) string {
	a.node.tb.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", a.PID(task)))
	if err != nil {
		a.node.tb.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return filepath.Join(test.CgroupRoot(a.node.tb), strings.TrimSpace(path))
		}
	}
	a.node.tb.Fatalf("task %s of %s is in no cgroup of v2: %s", task, a.ID, text)
	panic("unreachable")
}

// group looks where the drivers put their groups, with and without systemd, and in
// hierarchies of v1 where there is none in v2.
func (a *Alloc) group(task string) (string, error) {
	patterns := []string{
		"nomad/" + a.ID + "." + task, "nomad.slice/*/" + a.ID + "." + task + ".scope",
	}
	if id, err := a.node.containerID(task + "-" + a.ID); err == nil {
		patterns = append(patterns, "docker/"+id, "system.slice/docker-"+id+".scope")
	}
	for _, root := range []string{test.CgroupRoot(a.node.tb), "/sys/fs/cgroup/freezer"} {
		for _, pattern := range patterns {
			found, err := filepath.Glob(filepath.Join(root, pattern))
			if err != nil {
				return "", err
			}
			if len(found) == 1 {
				return found[0], nil
			}
		}
	}
	return "", fmt.Errorf("task %s of %s has no cgroup at %q", task, a.ID, patterns)
}

// containerID reads it from Docker's own files, so that Docker may be down.
func (n *Node) containerID(name string) (string, error) {
	files, err := filepath.Glob(filepath.Join(n.machine.dir, "docker", "containers", "*", "config.v2.json"))
	if err != nil {
		return "", err
	}
	for _, file := range files {
		var config struct{ ID, Name string }
		text, err := os.ReadFile(file)
		if err != nil || json.Unmarshal(text, &config) != nil {
			continue // it is being written or removed
		}
		if config.Name == "/"+name {
			return config.ID, nil
		}
	}
	return "", fmt.Errorf("no container %s", name)
}

// PID is the first process of a task, as this machine counts. A task that starts
// is waited for.
func (a *Alloc) PID(task string) (pid int) {
	a.node.tb.Helper()
	eventually(a.node.tb, 10*time.Second, func() (err error) {
		pid, err = a.pid(task)
		return err
	}, "process of "+task)
	return pid
}

func (a *Alloc) pid(task string) (int, error) {
	dir, err := a.group(task)
	if err != nil {
		return 0, err
	}
	text, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if err != nil {
		return 0, err
	}
	first := 0
	for field := range strings.FieldsSeq(string(text)) {
		var pid int
		if _, err := fmt.Sscan(field, &pid); err != nil {
			return 0, err
		}
		exe, err := os.Readlink("/proc/" + field + "/exe")
		if err != nil || filepath.Base(exe) == "nomad" {
			continue // gone, or the driver's own
		}
		if first == 0 || pid < first {
			first = pid
		}
	}
	if first == 0 {
		return 0, fmt.Errorf("task %s of %s has no process", task, a.ID)
	}
	return first, nil
}

// Kill kills a task's first process as a crash does: "kill -9".
func (a *Alloc) Kill(task string) {
	a.node.tb.Helper()
	if err := unix.Kill(a.PID(task), unix.SIGKILL); err != nil {
		a.node.tb.Fatalf("kill task %s: %v", task, err)
	}
}

// NetNS is the path of the allocation's network namespace, by one of its tasks.
func (a *Alloc) NetNS(task string) string {
	a.node.tb.Helper()
	return fmt.Sprintf("/proc/%d/ns/net", a.PID(task))
}

// Port is a port of the allocation's network by its label: the node's, and the one
// inside.
func (a *Alloc) Port(label string) (host, inside uint16) {
	a.node.tb.Helper()
	var told struct {
		AllocatedResources struct {
			Shared struct {
				Ports []struct {
					Label     string
					Value, To uint16
				}
			}
		}
	}
	a.node.NomadGet("/v1/allocation/"+a.ID, &told)
	for _, port := range told.AllocatedResources.Shared.Ports {
		if port.Label == label {
			if port.To == 0 {
				port.To = port.Value
			}
			return port.Value, port.To
		}
	}
	a.node.tb.Fatalf("allocation %s of %s/%s has no port %q", a.ID, a.JobID, a.Group, label)
	panic("unreachable")
}

// Env is the environment of a task's process.
func (a *Alloc) Env(task string) map[string]string {
	a.node.tb.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", a.PID(task)))
	if err != nil {
		a.node.tb.Fatal(err)
	}
	env := make(map[string]string)
	for pair := range strings.SplitSeq(string(text), "\x00") {
		if name, value, ok := strings.Cut(pair, "="); ok {
			env[name] = value
		}
	}
	return env
}

// Exec runs a program as a process of the task: in its namespaces and its cgroup,
// under its user, with its environment. It works while Nomad is down; "nomad alloc
// exec" can be had by [Node.Command].
func (a *Alloc) Exec(task string, args ...string) (string, error) {
	a.node.tb.Helper()
	var stdout, stderr strings.Builder
	cmd := a.command(task, &stdout, &stderr, args)
	if err := cmd.Wait(); err != nil {
		return stdout.String(), fmt.Errorf("run %q in task %s: %w: %s", args, task, err, stderr.String())
	}
	return stdout.String(), nil
}

// command starts a program as a process of the task.
func (a *Alloc) command(task string, stdout, stderr io.Writer, args []string) *exec.Cmd {
	a.node.tb.Helper()
	pid, group := a.PID(task), a.Cgroup(task)
	info, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	if err != nil {
		a.node.tb.Fatal(err)
	}
	owner := info.Sys().(*syscall.Stat_t)
	fd, err := unix.Open(group, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		a.node.tb.Fatalf("open cgroup: %v", err)
	}
	defer unix.Close(fd)
	cmd := exec.CommandContext(a.node.tb.Context(), "nsenter", append([]string{
		"--target", fmt.Sprint(pid), "--mount", "--net", "--pid", "--ipc", "--uts",
		"--setuid", fmt.Sprint(owner.Uid), "--setgid", fmt.Sprint(owner.Gid), "--",
	}, args...)...)
	for name, value := range a.Env(task) {
		if name != "PATH" {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
	}
	cmd.Env = append(cmd.Env, "PATH=/usr/local/bin:/bin:/usr/bin:/opt/tools")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd}
	cmd.Stdout, cmd.Stderr = stdout, stderr
	if err := cmd.Start(); err != nil {
		a.node.tb.Fatalf("run %q in task %s: %v", args, task, err)
	}
	return cmd
}

// App runs the test program in a task and returns what came of it: see
// test/nomad/app for the words that it knows.
func (a *Alloc) App(task string, args ...string) wire.Outcome {
	a.node.tb.Helper()
	text, err := a.Exec(task, append([]string{"app"}, args...)...)
	if err != nil {
		a.node.tb.Fatal(err)
	}
	var outcome wire.Outcome
	if err := json.Unmarshal([]byte(text), &outcome); err != nil {
		a.node.tb.Fatalf("run %q in task %s: %v: %s", args, task, err, text)
	}
	return outcome
}

// Get asks a URL from a task, once.
func (a *Alloc) Get(task, address string) wire.Outcome {
	a.node.tb.Helper()
	return a.App(task, "get", address)
}

// How long an answer of the mesh may take: longer where Consul's catalog has a service as
// failing. Where one is taken out and registered again at once, as Nomad does when it
// restarts tasks, the check of its sidecar can pass in Consul's agent and stay critical in
// its catalog until the agent's next full sync, up to two minutes later (seen with Consul
// 1.22.2, in four of about 2,900 registrations on a busy machine).
const (
	answerPatience = 30 * time.Second
	consulPatience = 150 * time.Second
)

// EventuallyGet asks until check is content with what came of it. A nil check
// wants an answer of a task.
func (a *Alloc) EventuallyGet(task, address string, check func(wire.Outcome) error) (outcome wire.Outcome) {
	a.node.tb.Helper()
	if check == nil {
		check = func(got wire.Outcome) error {
			if !got.OK() || got.Reply == nil {
				return fmt.Errorf("got %s", got)
			}
			return nil
		}
	}
	until, last := time.Now().Add(answerPatience), false
	eventually(a.node.tb, consulPatience, func() error {
		outcome = a.Get(task, address)
		err := check(outcome)
		if err == nil || time.Now().Before(until) {
			return err
		}
		failing, unasked := a.node.api.consul.criticalChecks()
		switch {
		case len(failing) > 0:
			last = false
			return fmt.Errorf("%w; Consul: %v", err, failing)
		case last:
			a.node.tb.Fatalf("wait %s for GET %s from %s: %v", answerPatience, address, task, errors.Join(err, unasked))
		}
		// A check may have passed since Envoy answered, and Envoy hear of it now.
		until, last = time.Now().Add(envoyDelay), true
		return err
	}, "GET "+address+" from "+task)
	return outcome
}

// File is where this process sees a file of the allocation's directory, such as
// "alloc/loop.log".
func (a *Alloc) File(name string) string {
	return a.node.Path(filepath.Join("/var/lib/nomad/alloc", a.ID, name))
}

// Log is what a task has written to "stdout" or "stderr".
func (a *Alloc) Log(task, stream string) string {
	a.node.tb.Helper()
	text, err := os.ReadFile(a.File(filepath.Join("alloc/logs", task+"."+stream+".0")))
	if err != nil {
		a.node.tb.Fatalf("read log: %v", err)
	}
	return string(text)
}

// Envoy asks the admin API of the allocation's proxy. The task is one of the
// service's own; Nomad tells it the address.
func (a *Alloc) Envoy(task, service, path string) string {
	a.node.tb.Helper()
	address := a.Env(task)["NOMAD_ENVOY_ADMIN_ADDR_"+strings.ReplaceAll(service, "-", "_")]
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: spawn.Dialer(a.NetNS(task))}}
	response, err := client.Get("http://" + address + path)
	if err != nil {
		a.node.tb.Fatalf("ask Envoy of %s: %v", service, err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		a.node.tb.Fatalf("ask Envoy of %s: %v", service, err)
	}
	return string(text)
}

// EnvoyStat is the sum of the proxy's counters and gauges whose names match a
// regular expression.
func (a *Alloc) EnvoyStat(task, service, pattern string) (sum uint64) {
	a.node.tb.Helper()
	for line := range strings.Lines(a.Envoy(task, service, "/stats?filter="+url.QueryEscape(pattern))) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		number, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			a.node.tb.Fatalf("read Envoy's %s: %v", name, err)
		}
		sum += number
	}
	return sum
}
