// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/listening"
	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/test"
)

// A proxy that does not listen ten seconds after its allocation came is a problem,
// which says whose the sockets are that listen in its place.
func TestProxyThatNeverListensIsAProblem(t *testing.T) {
	n := newNode(t)
	cgroup := test.NewCgroup(t)
	n.config.CgroupRoot = cgroup.Path
	n.Datapath = redirect.New(n.config.Paths())
	nothing, _ := n.transparent(numbered(1))
	remapped, _ := n.transparent(numbered(2))
	heard, _ := n.transparent(numbered(3))
	n.cached(numbered(4), test.NewNetNS(t).Path, "") // plain
	n.fake.answers(registered(numbered(1), numbered(2), numbered(3), numbered(4)))
	envoys := cgroup.Child(t, "envoy")
	serve := func(ns *test.NetNS, uid uint32) *test.ServerProcess {
		spec := test.Spec{NetNS: ns, Cgroup: envoys, UID: uid, GID: uid}
		return test.EchoProcess(t, spec, "tcp4", "127.0.0.1:15001")
	}
	n.run()
	began := time.Now()
	foreign := serve(remapped, 100101)
	serve(heard, 101)
	pid := foreign.PID
	wants := map[string][]string{
		numbered(1): {"does not listen on ports 15001 and", "20001: nothing does", "nomad alloc logs"},
		numbered(2): {"under UID 101: 127.0.0.1:15001 is UID 100101's", fmt.Sprintf("process %d", pid), "/envoy)", "userns_mode"},
		numbered(4): {"does not listen on port 20001: nothing does"},
	}
	told := func(id string) string { return fmt.Sprint(n.eventually(id, api.StateManaged).Problems) }
	test.Eventually(t, func() error {
		for id, want := range wants {
			problems := told(id)
			if missing := slices.DeleteFunc(slices.Clone(want), func(text string) bool { return strings.Contains(problems, text) }); len(missing) > 0 {
				return fmt.Errorf("problems of %s are %s, without %q", id, problems, missing)
			}
		}
		return nil
	}, "each to be told")
	if took := time.Since(began); took < listening.ProxyStart {
		t.Errorf("told after %s, want no sooner than after %s", took, listening.ProxyStart)
	}
	if problems := told(numbered(3)); strings.Contains(problems, "does not listen") {
		t.Errorf("problems of a proxy that listens: %s", problems)
	}
	serve(nothing, 101)
	test.Eventually(t, func() error {
		if problems := told(numbered(1)); strings.Contains(problems, "does not listen") {
			return fmt.Errorf("problems are %s", problems)
		}
		return nil
	}, "the problem to go")
}
