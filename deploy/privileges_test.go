// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/test"
)

// duty is one thing that the agent has to do on a node. holds says why it does
// not, in the words of whoever shows it.
type duty struct {
	name  string
	holds func(n *privateNode) error
}

// What the agent has to do. Without the first two there is none of the others.
const (
	comesUp         = "comes up"
	loads           = "has its data path in force"
	reaches         = "reaches Consul"
	guards          = "guards a plain allocation whose namespace was mounted after it began"
	takesIn         = "takes in a listener that is older than its rows"
	hearsOfNetworks = "hears of what changes in a workload's network"
	seesNftables    = "sees what Consul's own rules redirect, in nftables"
	seesIptables    = "sees what Consul's own rules redirect, in legacy iptables"
)

var duties = []duty{
	{comesUp, (*privateNode).comesUp},
	{loads, (*privateNode).loads},
	{reaches, (*privateNode).reachesConsul},
	{guards, (*privateNode).guards},
	{takesIn, (*privateNode).takesIn},
	{hearsOfNetworks, (*privateNode).hearsOfNetworks},
	{seesNftables, func(n *privateNode) error { return n.state(n.nft, "consul") }},
	{seesIptables, func(n *privateNode) error { return n.state(n.legacy, "consul") }},
}

// The unit leaves the agent few capabilities. With all of them it does its
// duties; each is taken away in turn, and the duties that fail then, those and
// no others, are why the agent has it.
func TestUnitLeavesTheLeastPrivileges(t *testing.T) {
	n := newPrivateNode(t)
	const drop = "CapabilityBoundingSet=~"
	losses := []struct {
		name string
		line string            // of the unit, beside those that it has
		lost map[string]string // duties, and what is said of each
	}{
		{"nothing", "", nil},
		{"SYS_ADMIN", drop + "CAP_SYS_ADMIN", map[string]string{
			loads: "operation not permitted",
		}},
		{"NET_ADMIN", drop + "CAP_NET_ADMIN", map[string]string{
			guards:       "list nftables chains: operation not permitted",
			takesIn:      "operation not permitted", // the filter of forwarded packets, and routes
			seesNftables: "list nftables chains: operation not permitted",
			seesIptables: "list nftables chains: operation not permitted",
		}},
		{"NET_BROADCAST", drop + "CAP_NET_BROADCAST", map[string]string{
			hearsOfNetworks: "watch networks: operation not permitted",
		}},
		{"SYS_PTRACE", drop + "CAP_SYS_PTRACE", map[string]string{
			takesIn: "is not registered: it gets no connections",
		}},
		{"DAC_READ_SEARCH", drop + "CAP_DAC_READ_SEARCH", map[string]string{
			takesIn: "is not registered: it gets no connections",
		}},
		{"mounts of the host", "MountFlags=private", map[string]string{
			guards:       "namespace is gone",
			takesIn:      "namespace is gone",
			seesNftables: "namespace is gone",
			seesIptables: "namespace is gone",
		}},
	}
	var taken []string
	for _, loss := range losses {
		if capability, found := strings.CutPrefix(loss.line, drop); found {
			taken = append(taken, strings.ToLower(capability))
		}
		if loss.line != "" && len(loss.lost) == 0 {
			t.Errorf("nothing is lost without %s", loss.name)
		}
	}
	left := strings.Fields(n.must(t, "systemctl", "show", "-P", "CapabilityBoundingSet", unitName))
	slices.Sort(left)
	slices.Sort(taken)
	if diff := cmp.Diff(left, taken); diff != "" {
		t.Errorf("capabilities of the unit and those taken away in turn (-unit +taken):\n%s", diff)
	}
	for _, loss := range losses {
		t.Run("without "+loss.name, func(t *testing.T) {
			n.startAgent(t, loss.line)
			for _, duty := range duties {
				said, lost := loss.lost[duty.name]
				what := "an agent that " + duty.name
				if lost {
					what = fmt.Sprintf("%q in place of an agent that %s", said, duty.name)
				}
				test.Eventually(t, func() error {
					err := duty.holds(n)
					switch {
					case !lost:
						return err
					case err == nil:
						return errors.New("it does")
					case !strings.Contains(strings.Join(strings.Fields(err.Error()), " "), said): // whatever line it is on
						return err
					}
					return nil
				}, what)
				if lost && (duty.name == comesUp || duty.name == loads) {
					return
				}
				if duty.name == loads {
					n.allocate(t) // only now: what came before the agent is easier to find
				}
			}
		})
	}
}

// startAgent starts the agent on a node that has nothing of Weir yet, with one
// more line in its unit.
func (n *privateNode) startAgent(t *testing.T, line string) {
	t.Helper()
	dir := filepath.Join(n.root, "run/systemd/system", unitName+".d")
	text := "[Service]\n" + line + "\n"
	if err := errors.Join(os.MkdirAll(dir, 0o755), os.WriteFile(filepath.Join(dir, "line.conf"), []byte(text), 0o644)); err != nil {
		t.Fatal(err)
	}
	n.must(t, "systemctl", "daemon-reload")
	n.must(t, "systemctl", "start", "--no-block", unitName)
	t.Cleanup(func() {
		n.must(t, "systemctl", "stop", unitName)
		n.must(t, "weir", "unload", "-force")
	})
}

func (n *privateNode) comesUp() error {
	if n.active() {
		return nil
	}
	log, err := n.run("journalctl", "--no-pager", "--lines", "10", "--unit", unitName)
	return fmt.Errorf("it is not ready: %w\n%s", err, log)
}

// loads reports what the agent says of the data path. It comes up where that cannot
// be loaded too, and tells why: what was in force stays, and it is tried again.
func (n *privateNode) loads() error {
	view, err := n.view()
	if err == nil && view.DataPath != "" {
		err = errors.New(view.DataPath)
	}
	return err
}

func (n *privateNode) reachesConsul() error {
	view, err := n.view()
	if err == nil && !view.Consul.InSync {
		err = errors.New("not in sync: " + view.Consul.Error)
	}
	return err
}

// guards reports whether of the plain allocation's ports the proxy's alone can be
// reached, which nobody but the agent sees to.
func (n *privateNode) guards() error {
	if err := n.state(n.plain, "managed"); err != nil {
		return err
	}
	if err := n.dial(n.plain, taskPort); !errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("the task's port is not refused: %v", err)
	}
	return n.dial(n.plain, inboundPort)
}

// takesIn reports whether connections come to the proxy of the transparent
// allocation, whose listener is older than the agent's knowledge of its port.
func (n *privateNode) takesIn() error {
	if err := n.state(n.transparent, "managed"); err != nil {
		return err
	}
	answer, err := test.Ask(n.net, "tcp", n.transparent.at(taskPort))
	if err != nil {
		problems, _ := n.run("weir", "workloads")
		return fmt.Errorf("%w\n%s", err, problems)
	}
	if answer.Server != n.proxy.Name {
		return errors.New("connected to " + answer.Server)
	}
	return nil
}

// hearsOfNetworks reports what the agent says of its watch: what it is for is
// tested where namespaces are at hand.
func (n *privateNode) hearsOfNetworks() error {
	view, err := n.view()
	if err != nil {
		return err
	}
	if text := fmt.Sprint(view.Problems); strings.Contains(text, "watch networks") {
		return errors.New(text)
	}
	return nil
}

// state reports whether the agent has the allocation in that state, and in sync
// with Consul where it is under Weir.
func (n *privateNode) state(a *privateAlloc, want string) error {
	view, err := n.view()
	if err != nil {
		return err
	}
	for _, w := range view.Workloads {
		if w.ID != a.id {
			continue
		}
		if w.State != want || want == "managed" && !w.InSync {
			return fmt.Errorf("it is %s, in sync %t: %v", w.State, w.InSync, w.Problems)
		}
		return nil
	}
	return errors.New("the agent does not know it")
}
