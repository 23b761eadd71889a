// SPDX-License-Identifier: MPL-2.0

package test_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/weirmesh/weir/test"
)

func TestMain(m *testing.M) {
	test.Main(m, map[string]func([]string) error{"whoami": whoAmI})
}

// identity is what a process says of itself.
type identity struct {
	UID, GID, PID int
	NetNS, Cgroup string
	PIDNS         string
	Args          []string
}

func whoAmI(args []string) error {
	return test.Serve(func(question string) (identity, error) {
		if question == "fail" {
			return identity{}, fmt.Errorf("answer: %w", syscall.ENETUNREACH)
		}
		netns, err := os.Readlink("/proc/thread-self/ns/net")
		if err != nil {
			return identity{}, err
		}
		pidns, err := os.Readlink("/proc/self/ns/pid")
		if err != nil {
			return identity{}, err
		}
		cgroups, err := os.ReadFile("/proc/self/cgroup")
		if err != nil {
			return identity{}, err
		}
		_, cgroup, _ := strings.Cut(string(cgroups), "0::")
		cgroup, _, _ = strings.Cut(cgroup, "\n")
		return identity{os.Getuid(), os.Getgid(), os.Getpid(), netns, cgroup, pidns, args}, nil
	})
}

func TestHelperHasTheIdentityOfItsSpec(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2)
	ns, cgroup := test.NewNetNS(t), test.NewCgroup(t).Child(t, "child")
	p := test.Helper(t, test.Spec{NetNS: ns, Cgroup: cgroup, UID: 3_000_000_101, GID: 102}, "whoami", "a", "-b")

	var got identity
	if err := p.Call("who", &got); err != nil {
		t.Fatal(err)
	}
	var inside string
	ns.Do(func() { inside = threadNetNS(t) })
	if got.UID != 3_000_000_101 || got.GID != 102 || got.PID != p.PID {
		t.Errorf("identity = %+v, want user 3000000101, group 102, PID %d", got, p.PID)
	}
	if got.NetNS != inside {
		t.Errorf("netns = %s, want %s", got.NetNS, inside)
	}
	if want := strings.TrimPrefix(cgroup.Path, test.CgroupRoot(t)); got.Cgroup != want {
		t.Errorf("cgroup = %s, want %s", got.Cgroup, want)
	}
	if want := []string{"a", "-b"}; fmt.Sprint(got.Args) != fmt.Sprint(want) {
		t.Errorf("arguments = %q, want %q", got.Args, want)
	}
}

func TestHelperRunsInAnotherPIDNamespace(t *testing.T) {
	test.Need(t, test.Root, test.Tool("unshare"), test.Tool("nsenter"))
	other := exec.Command("unshare", "--pid", "--fork", "--kill-child", "cat")
	input, err := other.StdinPipe()
	if err == nil {
		err = other.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(input.Close(), other.Wait()); err != nil {
			t.Errorf("end of the namespace: %v", err)
		}
	})
	var first int
	test.Eventually(t, func() error {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%[1]d/task/%[1]d/children", other.Process.Pid))
		if err == nil {
			_, err = fmt.Sscan(string(children), &first)
		}
		return err
	}, "the namespace's first process")
	want, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", first))
	if err != nil {
		t.Fatal(err)
	}

	p := test.Helper(t, test.Spec{NetNS: test.NewNetNS(t), UID: 101, GID: 102, PIDNS: first}, "whoami")
	var got identity
	if err := p.Call("who", &got); err != nil {
		t.Fatal(err)
	}
	if got.PIDNS != want || got.UID != 101 || got.GID != 102 {
		t.Errorf("identity = %+v, want user 101, group 102, PID namespace %s", got, want)
	}
}

func TestHelperErrorKeepsItsErrno(t *testing.T) {
	test.Need(t, test.Root)
	p := test.Helper(t, test.Spec{NetNS: test.NewNetNS(t)}, "whoami")
	if err := p.Call("fail", nil); !errors.Is(err, syscall.ENETUNREACH) {
		t.Errorf("error = %v, want one that is ENETUNREACH", err)
	}
	var got identity
	if err := p.Call("who", &got); err != nil || got.PID != p.PID {
		t.Errorf("call after an error = %+v, %v; want an answer of PID %d", got, err, p.PID)
	}
	p.Stop()
	if err := p.Call("who", &got); err == nil {
		t.Error("call of a stopped process succeeded")
	}
}

func TestReplyIsOneLineOfJSON(t *testing.T) {
	line, err := json.Marshal(test.Reply{Server: "s"})
	if err != nil {
		t.Fatal(err)
	}
	if want := `{"server":"s","peer":"","local":""}`; string(line) != want {
		t.Errorf("reply = %s, want %s", line, want)
	}
}

func threadNetNS(tb testing.TB) string {
	tb.Helper()
	name, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		tb.Fatal(err)
	}
	return name
}
