// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/weirmesh/weir/test"
)

func TestProbePassesHere(t *testing.T) {
	test.Need(t, test.Root, test.BPF)
	if err := Probe(); err != nil {
		t.Error(err)
	}
}

func TestProbeNamesWhatIsMissing(t *testing.T) {
	lacking := func() error { return fmt.Errorf("ask the kernel: %w", ebpf.ErrNotSupported) }
	there := func() error { return nil }
	err := probe([]requirement{
		{what: "helper one", why: "to do one thing", since: "5.7", probe: lacking},
		{what: "helper two", why: "to do two things", since: "5.8", probe: there},
		{what: "helper three", why: "to do three things", since: "5.9", probe: lacking},
	})
	if !errors.Is(err, ErrUnsupported) {
		t.Fatalf("probe: %v, want ErrUnsupported", err)
	}
	for _, want := range []string{"6.1", "helper one, needed to do one thing (Linux 5.7)", "helper three, needed to do three things (Linux 5.9)"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("probe: %v; want it to say %q", err, want)
		}
	}
	if strings.Contains(err.Error(), "helper two") {
		t.Errorf("probe: %v; it names what is there", err)
	}
	if err := probe([]requirement{{what: "helper one", why: "to do one thing", since: "5.7", probe: there}}); err != nil {
		t.Errorf("probe with nothing missing: %v", err)
	}
}

// A probe that could not be made says nothing of the kernel.
func TestProbeThatFailsIsNotAMissingFeature(t *testing.T) {
	err := probe([]requirement{{what: "helper one", why: "to do one thing", since: "5.7", probe: func() error { return unix.EPERM }}})
	if err == nil || errors.Is(err, ErrUnsupported) || !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "helper one") {
		t.Errorf("probe: %v, want the cause and what was asked for", err)
	}
}

func TestRequirementsAreExplained(t *testing.T) {
	seen := make(map[string]bool)
	for _, need := range requirements() {
		if need.what == "" || !strings.HasPrefix(need.why, "to ") || need.since == "" || need.probe == nil {
			t.Errorf("requirement %+v is not explained", need)
		}
		if seen[need.what] {
			t.Errorf("requirement %q is there twice", need.what)
		}
		seen[need.what] = true
	}
}

// The plugin's STATUS: good before the first load, which it does not make, and after.
func TestProbeOfANode(t *testing.T) {
	d := unloadedDatapath(t)
	if err := d.Probe(); err != nil {
		t.Errorf("probe before load: %v", err)
	}
	if _, err := os.Stat(d.paths.PinDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pin directory after a probe: %v, want none", err)
	}
	if _, err := d.Load(); err != nil {
		t.Fatal(err)
	}
	if err := d.Probe(); err != nil {
		t.Errorf("probe after load: %v", err)
	}
	paths := d.paths
	paths.PinDir, paths.CgroupRoot = paths.PinDir+"_other", t.TempDir()
	if err := New(paths).Probe(); err == nil {
		t.Error("probe with a cgroup root that is none passes")
	}
}
