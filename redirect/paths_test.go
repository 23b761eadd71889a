// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/redirect/program"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test"
)

func TestPathsFromEnvAndDefaults(t *testing.T) {
	env := map[string]string{"WEIR_PIN_DIR": "/sys/fs/bpf/other", "WEIR_CGROUP_ROOT": "/cgroup"}
	paths := store.PathsFromEnv(func(name string) string { return env[name] })
	if diff := cmp.Diff(store.Paths{PinDir: "/sys/fs/bpf/other", CgroupRoot: "/cgroup"}, paths); diff != "" {
		t.Errorf("paths of the environment (-want +got):\n%s", diff)
	}
	got := paths.Or(store.Paths{PinDir: "/no", StateDir: "/state", CgroupRoot: "/no"})
	if diff := cmp.Diff(store.Paths{PinDir: "/sys/fs/bpf/other", StateDir: "/state", CgroupRoot: "/cgroup"}, got); diff != "" {
		t.Errorf("paths with a fallback (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(store.Paths{PinDir: store.DefaultPinDir, StateDir: store.DefaultStateDir}, New(store.Paths{}).Paths()); diff != "" {
		t.Errorf("default paths (-want +got):\n%s", diff)
	}
}

func TestFindCgroupRootReadsMountinfo(t *testing.T) {
	const (
		v1     = "30 23 0:26 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
		inner  = "31 23 0:27 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
		hybrid = "32 23 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw,nsdelegate\n"
		other  = "33 23 0:28 / /cgroup2 rw - tmpfs cgroup2 rw\n"
	)
	for _, tc := range []struct{ name, mountinfo, want string }{
		{"hybrid", v1 + inner + hybrid, "/sys/fs/cgroup/unified"},
		{"a place with a space", "33 23 0:27 / /mnt/a\\040b rw - cgroup2 cgroup2 rw\n", "/mnt/a b"},
		{"only a part of the hierarchy", v1 + inner, ""},
		{"only v1", v1, ""},
		{"something of that name", other, ""},
		{"nothing", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "mountinfo")
			if err := os.WriteFile(file, []byte(tc.mountinfo), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := host.FindCgroupRoot(file)
			if got != tc.want || (err == nil) != (tc.want != "") {
				t.Errorf("root = %q, %v; want %q", got, err, tc.want)
			}
			if err != nil && (!errors.Is(err, probe.ErrUnsupported) || !strings.Contains(err.Error(), "mount it at")) {
				t.Errorf("error %v: want ErrUnsupported with a remedy", err)
			}
		})
	}
}

func TestCgroupRootIsTheRealOne(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2)
	dir, err := store.Paths{}.OpenCgroupRoot()
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	if dir.Name() != test.CgroupRoot(t) {
		t.Errorf("root = %s, want %s", dir.Name(), test.CgroupRoot(t))
	}
	id, err := program.CgroupID(dir)
	if err != nil {
		t.Fatal(err)
	}
	if id != 1 {
		t.Errorf("ID of the root's cgroup = %d, want 1", id)
	}
}

const cgroupRootFunc = "redirect.cgroupRoot"

// tellCgroupRoot prints why the root of this process's cgroup namespace is none.
func tellCgroupRoot(args []string) error {
	dir, err := store.Paths{CgroupRoot: args[0]}.OpenCgroupRoot()
	if err == nil {
		fmt.Println("root", dir.Name())
		return dir.Close()
	}
	fmt.Println(err)
	return nil
}

// In a system container the root is that of its cgroup namespace: the refusal
// names the way out, which works, and what it costs.
func TestCgroupRootOfASystemContainer(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.Tool("unshare"))
	dir, cgroup := t.TempDir(), test.NewCgroup(t)
	binary, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	inside := func(root string) string {
		t.Helper()
		const script = `echo $$ > "$1"/cgroup.procs && exec unshare --cgroup --mount sh -c '
			mount -t cgroup2 none "$2" && exec "$3" -test.run=^$ -- "$4"' sh "$@"`
		command := exec.Command("sh", "-c", script, "sh", cgroup.Path, dir, binary, root)
		command.Env = append(os.Environ(), "WEIR_TEST_HELPER="+cgroupRootFunc)
		out, err := command.CombinedOutput()
		if err != nil {
			t.Fatalf("in a cgroup namespace of its own: %v\n%s", err, out)
		}
		return string(out)
	}
	refusal := inside("")
	for _, want := range []string{dir, "system container", "host's cgroup namespace", fmt.Sprintf("cgroup_root = %q", dir), "not redirected"} {
		if !strings.Contains(refusal, want) {
			t.Errorf("refusal = %q, want %q in it", refusal, want)
		}
	}
	if got := inside(dir); got != "root "+dir+"\n" {
		t.Errorf("with cgroup_root it says %q, want that root", got)
	}
}
