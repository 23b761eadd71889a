// SPDX-License-Identifier: MPL-2.0

package network

import (
	"errors"
	"io"
	"net"
	"os/exec"
	"strings"
	"testing"

	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/test"
)

// nodes that drop what they forward, each by the rules that it loads.
func droppingNodes() map[string]string {
	docker := ""
	for _, command := range []string{"iptables", "ip6tables"} {
		docker += command + " -P FORWARD DROP; " + command + " -N DOCKER-USER; " + command + " -A DOCKER-USER -j RETURN; " +
			command + " -I FORWARD -j DOCKER-USER\n"
	}
	return map[string]string{
		"iptables policy":        "iptables -P FORWARD DROP; ip6tables -P FORWARD DROP",
		"iptables with rules":    "iptables -P FORWARD DROP; ip6tables -P FORWARD DROP; iptables -A FORWARD -i other0 -j ACCEPT",
		"iptables reject at end": "iptables -A FORWARD -i other0 -j ACCEPT; iptables -A FORWARD -j REJECT; ip6tables -A FORWARD -j REJECT",
		"Docker's":               docker,
		"nftables policy":        "nft add table inet fw; nft 'add chain inet fw forward { type filter hook forward priority 0; policy drop; }'",
		"nftables reject at end": "nft add table inet fw; nft 'add chain inet fw forward { type filter hook forward priority 0; }'; nft add rule inet fw forward reject",
	}
}

func TestNodeThatDropsWhatItForwards(t *testing.T) {
	for name, rules := range droppingNodes() {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			test.Need(t, test.Tool("iptables"))
			n.run(t, "sh", "-ec", rules)
			n.run(t, "sysctl", "-qw", "net.bridge.bridge-nf-call-iptables=1", "net.bridge.bridge-nf-call-ip6tables=1")
			before := n.run(t, "nft", "-s", "list", "ruleset")
			a, _ := n.added(t, "a")
			b, result := n.added(t, "b")
			for _, ip := range addresses(result) {
				addr := net.JoinHostPort(ip, "80")
				test.Echo(t, b.ns, "tcp", addr)
				if err := test.DialErr(t, a.ns, addr); err != nil {
					t.Errorf("a to b, %s: %v", addr, err)
				}
			}
			for _, addr := range []string{"192.0.2.2:80", "[2001:db8::2]:80"} {
				test.Echo(t, n.outside, "tcp", addr)
				if err := test.DialErr(t, a.ns, addr); err != nil {
					t.Errorf("a to the world, %s: %v", addr, err)
				}
			}
			for _, command := range []string{"iptables", "ip6tables"} {
				if list := n.run(t, command, "-S"); strings.Contains(list, "incompatible") {
					t.Errorf("%s -S: %s", command, list)
				}
			}
			for _, gone := range []*allocation{a, b} {
				if err := n.remove(gone); err != nil {
					t.Fatal(err)
				}
			}
			if after := n.run(t, "nft", "-s", "list", "ruleset"); after != before {
				t.Errorf("rules after the last DEL:\n%s\nwant those before the first ADD:\n%s", after, before)
			}
		})
	}
}

// What the operator says in DOCKER-USER stays ahead of the plugin's accept.
func TestOperatorsRulesInDockerUserStayFirst(t *testing.T) {
	n := newNode(t)
	test.Need(t, test.Tool("iptables"))
	n.run(t, "sh", "-ec", `iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -A DOCKER-USER -d 192.0.2.2 -p tcp --dport 81 -j REJECT
		iptables -A DOCKER-USER -j RETURN; iptables -I FORWARD -j DOCKER-USER`)
	a, _ := n.added(t, "a")
	test.Echo(t, n.outside, "tcp", "192.0.2.2:80")
	test.Echo(t, n.outside, "tcp", "192.0.2.2:81")
	if err := test.DialErr(t, a.ns, "192.0.2.2:80"); err != nil {
		t.Error(err)
	}
	if test.CanDial(t, a.ns, "192.0.2.2:81") {
		t.Error("dialled what the operator rejects")
	}
	want := []string{"-A DOCKER-USER -d 192.0.2.2/32", "-A DOCKER-USER -i weir0", "-A DOCKER-USER -o weir0", "-A DOCKER-USER -j RETURN"}
	list := n.run(t, "iptables", "-S", "DOCKER-USER")
	at := 0
	for _, part := range want {
		i := strings.Index(list[at:], part)
		if i < 0 {
			t.Fatalf("DOCKER-USER: want %q in this order:\n%s", want, list)
		}
		at += i
	}
}

// A node that drops on purpose is opened for what allocations begin and for
// their host ports, not for everybody who has a route to them.
func TestDropStaysForWhatNobodyAskedFor(t *testing.T) {
	n := newNode(t)
	test.Need(t, test.Tool("iptables"))
	n.run(t, "iptables", "-P", "FORWARD", "DROP")
	a, result := n.added(t, "a")
	addr := net.JoinHostPort(addresses(result)[0], "80")
	test.Echo(t, a.ns, "tcp", addr)
	n.outside.Do(func() { runHere(t, "ip", "route", "add", subnet4, "via", "192.0.2.1") })
	if test.CanDial(t, n.outside, addr) {
		t.Errorf("the world reached %s without a host port", addr)
	}
}

func TestLegacyIptablesThatDrop(t *testing.T) {
	n := newNode(t)
	test.Need(t, test.Tool("iptables-legacy"))
	var missing error
	n.ns.Do(func() { missing = tryHere("iptables-legacy", "-P", "FORWARD", "DROP") })
	if missing != nil {
		if test.Tool("iptables-legacy").Missing() == nil {
			t.Skipf("needs a kernel with ip_tables: %v", missing)
		}
	}
	a := n.allocation(t, "a")
	_, err := n.add(a)
	if !errors.Is(err, attachment.ErrForward) || !strings.Contains(err.Error(), bridge) {
		t.Fatalf("error %v: want ErrForward that names the bridge", err)
	}
	if err := n.remove(a); err != nil {
		t.Fatal(err)
	}
	n.wantNothingLeft(t)
	n.ns.Do(func() {
		if err := n.network().Probe(n.path); !errors.Is(err, attachment.ErrForward) {
			t.Errorf("STATUS: %v: want ErrForward", err)
		}
	})
	n.run(t, "iptables-legacy", "-I", "FORWARD", "-o", bridge, "-j", "ACCEPT")
	n.run(t, "iptables-legacy", "-I", "FORWARD", "-i", bridge, "-j", "ACCEPT")
	b, _ := n.added(t, "b")
	test.Echo(t, n.outside, "tcp", "192.0.2.2:80")
	if err := test.DialErr(t, b.ns, "192.0.2.2:80"); err != nil {
		t.Errorf("with the operator's rules: %v", err)
	}
	n.run(t, "iptables-legacy", "-F", "FORWARD")
	n.run(t, "iptables-legacy", "-P", "FORWARD", "ACCEPT")
	n.run(t, "ip6tables-legacy", "-P", "FORWARD", "DROP")
	if _, err := n.add(n.allocation(t, "c")); !errors.Is(err, attachment.ErrForward) || !strings.Contains(err.Error(), "ip6tables") {
		t.Errorf("error %v: want ErrForward that names ip6tables", err)
	}
}

// firewalld owns its table: nobody else may write to it. What it lets through by the
// bridge's name is the operator's word; without one ADD says so.
func TestTableThatHasAnOwner(t *testing.T) {
	n := newNode(t)
	owner := exec.Command("nft", "-i")
	input, err := owner.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	n.ns.Do(func() { err = owner.Start() })
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		input.Close()
		if err := owner.Wait(); err != nil {
			t.Errorf("end the owner: %v", err)
		}
	})
	tell := func(commands, done string) {
		t.Helper()
		if _, err := io.WriteString(input, commands); err != nil {
			t.Fatal(err)
		}
		test.Eventually(t, func() error {
			if rules := n.run(t, "nft", "list", "ruleset"); !strings.Contains(rules, done) {
				return errors.New(rules)
			}
			return nil
		}, "the owner's rules")
	}
	tell("add table inet firewalld { flags owner; }\n"+
		"add chain inet firewalld forward { type filter hook forward priority 10; policy drop; }\n", "policy drop")
	a := n.allocation(t, "a")
	if _, err := n.add(a); !errors.Is(err, attachment.ErrForward) || !strings.Contains(err.Error(), "inet firewalld forward") || !strings.Contains(err.Error(), bridge) {
		t.Errorf("error %v: want ErrForward that names the chain and the bridge", err)
	}
	n.wantNothingLeft(t)
	tell("add rule inet firewalld forward iifname "+bridge+" accept\nadd rule inet firewalld forward oifname "+bridge+" accept\n", `oifname "`+bridge+`"`)
	b, _ := n.added(t, "b")
	test.Echo(t, n.outside, "tcp", "192.0.2.2:80")
	if err := test.DialErr(t, b.ns, "192.0.2.2:80"); err != nil {
		t.Errorf("with the operator's rules: %v", err)
	}
}
