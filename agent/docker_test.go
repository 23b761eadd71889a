// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// engine is a real Docker of the test's own, without any network.
type engine struct {
	t      *testing.T
	socket string
}

const engineImage = "weir-test"

func startDocker(t *testing.T) *engine {
	t.Helper()
	test.Need(t, test.Root, test.Tool("dockerd"), test.Tool("docker"), test.Tool("busybox"))
	dir, err := os.MkdirTemp("", "weir-docker-") // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	e := &engine{t: t, socket: filepath.Join(dir, "docker.sock")}
	output := new(bytes.Buffer)
	daemon := exec.Command("dockerd", "--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"),
		"--pidfile", filepath.Join(dir, "pid"), "--containerd-namespace", "weir-test", "-H", "unix://"+e.socket,
		"--storage-driver", "vfs", "--bridge=none", "--iptables=false", "--ip6tables=false")
	daemon.Stdout, daemon.Stderr = output, output
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := daemon.Process.Signal(unix.SIGTERM); err != nil {
			t.Error(err)
		}
		if err := daemon.Wait(); err != nil {
			t.Logf("dockerd: %v\n%s", err, output)
		}
	})
	client := &http.Client{Transport: discover.NewDocker(e.socket, nil).Client.Transport}
	test.Eventually(t, func() error {
		answer, err := client.Get("http://docker/_ping")
		if err != nil {
			return err
		}
		return answer.Body.Close()
	}, "dockerd to answer")
	e.importImage()
	return e
}

// importImage makes an image of the machine's static busybox.
func (e *engine) importImage() {
	e.t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		e.t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		e.t.Fatal(err)
	}
	archive := new(bytes.Buffer)
	writer := tar.NewWriter(archive)
	if err := writer.WriteHeader(&tar.Header{Name: "busybox", Mode: 0o755, Size: int64(len(data))}); err != nil {
		e.t.Fatal(err)
	}
	if _, err := writer.Write(data); err != nil {
		e.t.Fatal(err)
	}
	if err := writer.Close(); err != nil {
		e.t.Fatal(err)
	}
	command := exec.Command("docker", "-H", "unix://"+e.socket, "import", "-", engineImage)
	command.Stdin = archive
	if out, err := command.CombinedOutput(); err != nil {
		e.t.Fatalf("docker import: %v\n%s", err, out)
	}
}

func (e *engine) docker(args ...string) string {
	e.t.Helper()
	out, err := exec.Command("docker", append([]string{"-H", "unix://" + e.socket}, args...)...).CombinedOutput()
	if err != nil {
		e.t.Fatalf("docker %v: %v\n%s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// pause starts what Nomad's driver starts for an allocation, and returns the
// path of its namespace.
func (e *engine) pause(id string) string {
	e.t.Helper()
	e.docker("run", "-d", "--name", discover.PausePrefix+id, "--label", discover.AllocLabel+"="+id, "--network", "none", engineImage, "/busybox", "sleep", "600")
	e.t.Cleanup(func() { e.docker("rm", "-f", discover.PausePrefix+id) })
	return e.netns(id)
}

func (e *engine) netns(id string) string {
	e.t.Helper()
	return e.docker("inspect", "-f", "{{.NetworkSettings.SandboxKey}}", discover.PausePrefix+id)
}

// When Docker restarts a pause container, the allocation has another namespace
// at another path, and libcni goes on naming the old one.
func TestAgentFollowsAPauseContainerThatDockerRestarts(t *testing.T) {
	n := newNode(t)
	docker := startDocker(t)
	n.config.Docker.Socket = docker.socket
	id := numbered(1)
	first := docker.pause(id)
	n.cached(id, first, "")
	n.fake.answers(registered(id))
	n.run()
	n.eventually(id, api.StateManaged)
	before := n.cookieOf(first)
	n.wantCookie(before)

	docker.docker("restart", "-t", "0", discover.PausePrefix+id)
	second := docker.netns(id)
	n.wantCookie(n.cookieOf(second))
	if after := n.cookieOf(second); after == before {
		t.Errorf("the namespace is still %d: nothing was tested", before)
	}

	// One that libcni knows nothing of, which is found by its container alone.
	third := docker.pause(numbered(2))
	endTask := runsTask(t, numbered(2), "connect-proxy-web", third)
	n.fake.answers(registered(id, numbered(2)))
	n.eventually(numbered(2), api.StateManaged)
	endTask()
	docker.docker("stop", "-t", "0", discover.PausePrefix+numbered(2))
	n.eventually(numbered(2), api.StateUnprotected)
	if !discover.IsGone(third) {
		t.Errorf("namespace %s is still there: nothing was tested", third)
	}
}

func (n *node) cookieOf(path string) uint64 {
	n.t.Helper()
	cookie, err := host.Cookie(path)
	if err != nil {
		n.t.Fatal(err)
	}
	return cookie
}

// runDocker follows the Docker at a socket until the test ends.
func runDocker(t *testing.T, socket string) *discover.Docker {
	t.Helper()
	d := discover.NewDocker(socket, func() {})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return d
}

// Docker may start after the agent, end and come again.
func TestDockerIsFoundWhenItStartsLater(t *testing.T) {
	t.Parallel()
	socket := filepath.Join(t.TempDir(), "docker.sock")
	d := runDocker(t, socket)
	fake := newFakeDocker(t, socket)
	test.Eventually(t, func() error {
		if view := d.Current(); view.NetNS[numbered(1)] != "/first" || view.Tasks[strings.Repeat("b", 64)] != "connect-proxy-web" || view.Error != "" {
			return fmt.Errorf("the view is %+v", view)
		}
		return nil
	}, "the containers to be known")
	endServer(fake)
	test.Eventually(t, func() error {
		view := d.Current()
		if view.NetNS[numbered(1)] != "/first" {
			t.Fatalf("the view is %+v, want the last known state", view)
		}
		if view.Error == "" {
			return fmt.Errorf("the view is %+v", view)
		}
		return nil
	}, "the end of Docker to be told")
}

func TestContainerOf(t *testing.T) {
	id := strings.Repeat("0a", 32)
	for path, want := range map[string]string{
		"/docker/" + id: id, "/system.slice/docker-" + id + ".scope": id, "/machine.slice/libpod-" + id + ".scope/container": id,
		"/nomad/" + numbered(1) + ".web": "", "/": "", "/docker/" + id[1:]: "", "/docker/" + strings.ToUpper(id): "",
	} {
		if got := discover.ContainerOf(path); got != want {
			t.Errorf("container of %s = %q, want %q", path, got, want)
		}
	}
}
