// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/nomad"
)

// failing stands in for a plugin: it fails ADD until it has been asked so often, and
// otherwise is the real one beside it.
const failing = `#!/bin/sh
if [ "$CNI_COMMAND" = ADD ] && [ "$(cat %[1]s.left)" -gt 0 ]; then
	echo $(($(cat %[1]s.left) - 1)) >%[1]s.left
	echo '{"cniVersion": "1.0.0", "code": 999, "msg": "injected failure of %[2]s"}'
	exit 1
fi
exec %[1]s.real "$@"
`

const plugins = "/opt/cni/bin/"

// breakPlugin makes a plugin fail its next ADDs, until it is mended.
func breakPlugin(n *nomad.Node, name string, times int) (mend func()) {
	n.Command("mv", plugins+name, "/opt/"+name+".real")
	n.Write("/opt/"+name+".left", fmt.Sprintln(times), 0o644)
	n.Write(plugins+name, fmt.Sprintf(failing, "/opt/"+name, name), 0o755)
	return func() { n.Command("mv", "/opt/"+name+".real", plugins+name) }
}

// TestFailedAdd lets an ADD fail at each of its steps. Nomad's event says what failed
// and what to do; nothing half-done is left; when the cause is gone the job runs, as
// the same allocation where Nomad's own retries suffice.
func TestFailedAdd(t *testing.T) {
	n := nomad.Start(t, nomad.Options{NoDocker: true, NoAgent: true})
	const always = 1000
	command := func(harm, remedy string) func(*nomad.Node) func() {
		return func(n *nomad.Node) func() {
			n.Command("sh", "-c", harm)
			return func() { n.Command("sh", "-c", remedy) }
		}
	}
	for _, each := range []struct {
		name   string
		inject func(*nomad.Node) (mend func())
		want   []string // in Nomad's event
	}{
		{"NoPortmap", command("mv /opt/cni/bin/portmap /opt/", "mv /opt/portmap /opt/cni/bin/"), []string{"portmap", "cni_path"}},
		{"LeasesReadOnly", command("mkdir -p /run/weir/leases && mount -t tmpfs -o ro none /run/weir/leases", "umount /run/weir/leases"), []string{"/run/weir/leases", "read-only"}},
		{"PortmapFails", func(n *nomad.Node) func() { return breakPlugin(n, "portmap", always) }, []string{"injected failure of portmap"}},
		{"NoBridge", command("ip link del weir; ip link add weir type veth peer name weirp", "ip link del weir"), []string{"bridge weir: a device of type veth has that name"}},
		{"PinsReadOnly", command("mount -o remount,ro /sys/fs/bpf", "mount -o remount,rw /sys/fs/bpf"), []string{"/sys/fs/bpf", "read-only"}},
		{"StateReadOnly", command("mkdir -p /run/weir && mount -t tmpfs -o ro none /run/weir", "umount /run/weir"), []string{"/run/weir", "read-only"}},
	} {
		t.Run(each.name, func(t *testing.T) {
			mend := each.inject(n) // of the node's own test: this one may have ended by then
			n := n.For(t)
			mended := false
			t.Cleanup(func() {
				if !mended {
					mend()
				}
			})
			job := n.Submit("testdata/jobs/life-add.nomad.hcl", "id", "add", "mode", "cni/weir")
			event := failure(t, n, job)
			for _, want := range append(each.want, "add") {
				if !strings.Contains(event, want) {
					t.Errorf("Nomad's event is %q, want %q in it", event, want)
				}
			}
			t.Logf("Nomad says: %s", event)
			wantOnly(t, n)
			mend()
			mended = true
			a := awaitTask(t, job)
			if got := n.Get(n.NetNS(), "http://"+a.Workload().Addresses[0]+":8080/"); got.Reply != nil {
				t.Errorf("the application is reached without a proxy: %s", got)
			}
			job.Stop()
		})
	}
	t.Run("Twice", func(t *testing.T) {
		mend := breakPlugin(n, "portmap", 2)
		defer mend()
		n := n.For(t)
		job := n.Submit("testdata/jobs/life-add.nomad.hcl", "id", "add", "mode", "cni/weir")
		a := awaitTask(t, job)
		var all []struct{ ID string }
		n.NomadGet("/v1/job/"+job.ID+"/allocations", &all)
		if len(all) != 1 {
			t.Errorf("the job had %d allocations, want Nomad's third ADD to serve the first", len(all))
		}
		wantOnly(t, n, a)
		job.Stop()
	})
	n.ExpectNothingLeft()
}

// failure waits for the first allocation to fail and returns what Nomad says of it.
func failure(t *testing.T, n *nomad.Node, job *nomad.Job) (event string) {
	t.Helper()
	test.Eventually(t, func() error {
		var list []struct {
			ClientStatus string
			TaskStates   map[string]struct {
				Events []struct{ Type, DisplayMessage string }
			}
		}
		n.NomadGet("/v1/job/"+job.ID+"/allocations", &list)
		for _, a := range list {
			for _, state := range a.TaskStates {
				for _, e := range state.Events {
					if a.ClientStatus == "failed" && e.Type == "Setup Failure" {
						event = e.DisplayMessage
						return nil
					}
				}
			}
		}
		return fmt.Errorf("allocations are %+v", list)
	}, "a failure")
	return event
}

// awaitTask waits until an allocation runs, after others that failed.
func awaitTask(t *testing.T, job *nomad.Job) (a *nomad.Alloc) {
	t.Helper()
	test.Eventually(t, func() error {
		for _, each := range job.Allocs() {
			if each.ClientStatus == "running" {
				a = each
				return nil
			}
		}
		return os.ErrNotExist
	}, "an allocation that runs")
	return a
}
