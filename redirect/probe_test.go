// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/weirmesh/weir/redirect/probe"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

func TestProbePassesHere(t *testing.T) {
	test.Need(t, test.Root, test.BPF)
	if err := probe.Probe(); err != nil {
		t.Error(err)
	}
}

func TestProbeNamesWhatIsMissing(t *testing.T) {
	lacking := func() error { return fmt.Errorf("ask the kernel: %w", ebpf.ErrNotSupported) }
	there := func() error { return nil }
	err := probe.ProbeFor([]probe.Requirement{
		{What: "helper one", Why: "to do one thing", Since: "5.7", ProbeFor: lacking},
		{What: "helper two", Why: "to do two things", Since: "5.8", ProbeFor: there},
		{What: "helper three", Why: "to do three things", Since: "5.9", ProbeFor: lacking},
	})
	if !errors.Is(err, probe.ErrUnsupported) {
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
	if err := probe.ProbeFor([]probe.Requirement{{What: "helper one", Why: "to do one thing", Since: "5.7", ProbeFor: there}}); err != nil {
		t.Errorf("probe with nothing missing: %v", err)
	}
}

// A probe that could not be made says nothing of the kernel.
func TestProbeThatFailsIsNotAMissingFeature(t *testing.T) {
	err := probe.ProbeFor([]probe.Requirement{{What: "helper one", Why: "to do one thing", Since: "5.7", ProbeFor: func() error { return unix.EPERM }}})
	if err == nil || errors.Is(err, probe.ErrUnsupported) || !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "helper one") {
		t.Errorf("probe: %v, want the cause and what was asked for", err)
	}
}

func TestRequirementsAreExplained(t *testing.T) {
	seen := make(map[string]bool)
	for _, need := range probe.Requirements() {
		if need.What == "" || !strings.HasPrefix(need.Why, "to ") || need.Since == "" || need.ProbeFor == nil {
			t.Errorf("requirement %+v is not explained", need)
		}
		if seen[need.What] {
			t.Errorf("requirement %q is there twice", need.What)
		}
		seen[need.What] = true
	}
}

// The plugin's STATUS: good before the first load, which it does not make, and after.
func TestProbeOfANode(t *testing.T) {
	d := unloadedDatapath(t)
	if err := d.Probe(); err != nil {
		t.Errorf("probe before load: %v", err)
	}
	if _, err := os.Stat(d.Paths().PinDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pin directory after a probe: %v, want none", err)
	}
	if _, err := d.Load(); err != nil {
		t.Fatal(err)
	}
	if err := d.Probe(); err != nil {
		t.Errorf("probe after load: %v", err)
	}
	paths := d.Paths()
	paths.PinDir, paths.CgroupRoot = paths.PinDir+"_other", t.TempDir()
	if err := New(paths).Probe(); err == nil {
		t.Error("probe with a cgroup root that is none passes")
	}
}
