// SPDX-License-Identifier: MPL-2.0

package sysctl

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

var ports = []string{"net", "ipv4", "ip_local_port_range"}

// Both instances have the keys of the namespace that the thread is in.
func TestKeysAreOfTheNamespace(t *testing.T) {
	test.Need(t, test.Root)
	before := readIn(t, nil, Shared())
	for _, keys := range []*Keys{Shared(), Own()} {
		t.Run(fmt.Sprintf("own=%t", keys.IsOwn()), func(t *testing.T) {
			one, other := test.NewNetNS(t), test.NewNetNS(t)
			one.Do(func() {
				if changed, err := keys.Set("2000\t2999", ports...); err != nil || !changed {
					t.Errorf("set: changed %t, %v", changed, err)
				}
				if changed, err := keys.Set("2000\t2999", ports...); err != nil || changed {
					t.Errorf("set again: changed %t, %v", changed, err)
				}
			})
			if got := readIn(t, one, Shared()); got != "2000\t2999" {
				t.Errorf("/proc shows %q after it was set", got)
			}
			if got := readIn(t, one, keys); got != "2000\t2999" {
				t.Errorf("the keys show %q after it was set", got)
			}
			if got := readIn(t, other, keys); got == "2000\t2999" {
				t.Error("another namespace has the value as well")
			}
			if err := keys.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	if after := readIn(t, nil, Shared()); after != before {
		t.Errorf("the caller's own namespace had %q, has %q", before, after)
	}
}

func TestOwnIsAnInstanceOfItsOwn(t *testing.T) {
	test.Need(t, test.Root)
	keys := Own()
	defer keys.Close()
	if !keys.IsOwn() {
		t.Fatal("root of the machine gets no instance of procfs")
	}
	var shared, own unix.Stat_t
	if err := errors.Join(unix.Stat("/proc/sys", &shared), unix.Fstatat(keys.root, "sys", &own, 0)); err != nil {
		t.Fatal(err)
	}
	if shared.Dev == own.Dev {
		t.Errorf("both are on device %d", own.Dev)
	}
}

func TestAmong(t *testing.T) {
	test.Need(t, test.Root)
	dir := t.TempDir() // as /run is, where the records are
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	add := func(from, to int) {
		for i := from; i < to; i++ {
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	expect := func(dir string, own bool) {
		t.Helper()
		keys := Among(dir)
		defer keys.Close()
		if keys.IsOwn() != own {
			t.Errorf("own instance: %t, want %t", keys.IsOwn(), own)
		}
	}
	expect(filepath.Join(dir, "none"), false)
	expect(dir, false)
	add(0, Crowded-1)
	expect(dir, false)
	add(Crowded-1, 2*Crowded)
	expect(dir, true)
}

func TestKeyThatIsNotThere(t *testing.T) {
	test.Need(t, test.Root)
	for _, keys := range []*Keys{Shared(), Own()} {
		if _, err := keys.Read("net", "ipv4", "none"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("own=%t: read: %v", keys.IsOwn(), err)
		}
		if changed, err := keys.Set("1", "net", "ipv4", "none"); changed || err != nil {
			t.Errorf("own=%t: set: changed %t, %v", keys.IsOwn(), changed, err)
		}
		if err := keys.Write("1", "net", "ipv4", "none"); err == nil {
			t.Errorf("own=%t: it was written", keys.IsOwn())
		}
		keys.Close()
	}
}

// A value that the kernel refuses is an error.
func TestValueThatIsRefused(t *testing.T) {
	test.Need(t, test.Root)
	for _, keys := range []*Keys{Shared(), Own()} {
		test.NewNetNS(t).Do(func() {
			if changed, err := keys.Set("ports", ports...); changed || !errors.Is(err, unix.EINVAL) {
				t.Errorf("own=%t: changed %t, %v", keys.IsOwn(), changed, err)
			}
		})
		keys.Close()
	}
}

func readIn(t *testing.T, ns *test.NetNS, keys *Keys) (value string) {
	t.Helper()
	var err error
	read := func() { value, err = keys.Read(ports...) }
	if ns == nil {
		read()
	} else {
		ns.Do(read)
	}
	if err != nil {
		t.Fatal(err)
	}
	return value
}
