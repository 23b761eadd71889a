// SPDX-License-Identifier: MPL-2.0

//go:build refuse

// Package refuse holds what must be true on a kernel that Weir does not support. Its tests run in
// the guest of such a kernel only.
package refuse_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test"
)

const (
	pinRoot  = "/sys/fs/bpf"
	stateDir = "/run/weir"
)

func TestMain(m *testing.M) { test.Main(m, nil) }

// named matches an error that says what is missing and the first kernel that has it.
var named = regexp.MustCompile(`bpf_\w+.*\b(5\.1[1-9]|6\.\d+)\b`)

func TestLoadRefusesAndLeavesNothing(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	leavesNothing(t)
	stdout, stderr, code := call(t, nil, "", "weir", "load")
	if code == 0 {
		t.Errorf("weir load succeeded: %s", stdout)
	}
	if !named.MatchString(stderr) {
		t.Errorf("error = %q, want what is missing and the first kernel that has it", stderr)
	}
	if lines := strings.Count(strings.TrimSpace(stderr), "\n") + 1; lines > 12 {
		t.Errorf("error has %d lines, want one clear error:\n%s", lines, stderr)
	}
	for _, noise := range []string{"invalid argument", "permission denied", "goroutine ", "processed "} {
		if strings.Contains(stderr, noise) {
			t.Errorf("error has %q of the kernel or the runtime in it: %s", noise, stderr)
		}
	}
	t.Logf("weir load said: %s", stderr)
}

func TestPluginRefusesAndLeavesNothing(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	ns := test.NewNetNS(t)
	leavesNothing(t)
	const conf = `{"cniVersion":"1.1.0","name":"weir","type":"consul-cni",
		"prevResult":{"cniVersion":"1.1.0","interfaces":[{"name":"eth0","sandbox":"%[1]s"}],
		"ips":[{"address":"172.26.64.2/20","interface":0}]}}`
	const request = `{"ProxyUserID":"101","ProxyInboundPort":20000,"ProxyOutboundPort":15001}`
	for _, command := range []string{"STATUS", "ADD"} {
		env := []string{"CNI_COMMAND=" + command, "CNI_CONTAINERID=0e7a4a0c-0000-0000-0000-000000000001", "CNI_IFNAME=eth0",
			"CNI_NETNS=" + ns.Path, "CNI_PATH=/src/bin", "CNI_ARGS=IgnoreUnknown=true;CONSUL_IPTABLES_CONFIG=" + request}
		stdout, stderr, code := call(t, env, fmt.Sprintf(conf, ns.Path), "weir-cni")
		if code == 0 || !named.MatchString(stdout) {
			t.Errorf("%s: exit status %d, answer %q; want an error that names what is missing\n%s", command, code, stdout, stderr)
		}
	}
}

func call(t *testing.T, env []string, stdin, name string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := exec.Command(name, args...)
	var out, complaint strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &out, &complaint
	cmd.Env = append(os.Environ(), env...)
	if err := cmd.Run(); cmd.ProcessState == nil {
		t.Fatalf("run %s: %v", name, err)
	}
	return out.String(), complaint.String(), cmd.ProcessState.ExitCode()
}

// leavesNothing compares, when the test ends, what the kernel and the directories hold with what
// they held before.
func leavesNothing(t *testing.T) {
	t.Helper()
	before := traces(t)
	t.Cleanup(func() {
		// The kernel frees what a process held shortly after its end.
		test.Eventually(t, func() error {
			if after := traces(t); after != before {
				return fmt.Errorf("before:\n%s\nnow:\n%s", before, after)
			}
			return nil
		}, "nothing of Weir is left")
	})
}

// traces describes every program, map and link of the kernel, every pin and every record.
func traces(t *testing.T) string {
	t.Helper()
	var text strings.Builder
	for _, kind := range []struct {
		name    string
		command uintptr
	}{
		{"programs", unix.BPF_PROG_GET_NEXT_ID}, {"maps", unix.BPF_MAP_GET_NEXT_ID}, {"links", unix.BPF_LINK_GET_NEXT_ID},
	} {
		ids, err := objects(kind.command)
		if err != nil {
			t.Fatalf("list %s: %v", kind.name, err)
		}
		fmt.Fprintf(&text, "%s %v\n", kind.name, ids)
	}
	for _, dir := range []string{pinRoot, stateDir} {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			// A lock file, and the directories themselves, load nothing.
			if err == nil && !entry.IsDir() && !strings.HasSuffix(path, "lock") {
				fmt.Fprintln(&text, path)
			}
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("list %s: %v", dir, err)
		}
	}
	return text.String()
}

// objects lists IDs by bpf(2) itself, so that nothing of Weir's own code is trusted here.
func objects(command uintptr) ([]uint32, error) {
	var ids []uint32
	attr := struct{ start, next, flags uint32 }{}
	for {
		_, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
		if errno == unix.ENOENT {
			return ids, nil
		}
		if errno != 0 {
			return nil, errno
		}
		ids = append(ids, attr.next)
		attr.start = attr.next
	}
}
