// SPDX-License-Identifier: MPL-2.0

package redirect

import (
	"errors"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/weirmesh/weir/redirect/host"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"
	"golang.org/x/sys/unix"
)

// nftTable makes a table with chains as iptables-nft and nft do.
func nftTable(t *testing.T, ns *test.NetNS, family nftables.TableFamily, table string, chains ...string) {
	t.Helper()
	var err error
	ns.Do(func() {
		var conn *nftables.Conn
		if conn, err = nftables.New(); err != nil {
			return
		}
		made := conn.AddTable(&nftables.Table{Family: family, Name: table})
		for _, chain := range chains {
			conn.AddChain(&nftables.Chain{Table: made, Name: chain})
		}
		err = conn.Flush()
	})
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("needs a kernel with nf_tables: %v", err)
	}
	if err != nil {
		t.Fatalf("make nftables table: %v", err)
	}
}

func TestConsulRulesAreFoundInNftables(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF)
	d := newDatapath(t)
	for _, tc := range []struct {
		name   string
		family nftables.TableFamily
		table  string
		chains []string
		want   bool
	}{
		{"iptables-nft", nftables.TableFamilyIPv4, "nat", []string{"OUTPUT", "CONSUL_PROXY_OUTPUT"}, true},
		{"iptables-nft, IPv6", nftables.TableFamilyIPv6, "nat", []string{"CONSUL_PROXY_INBOUND"}, true},
		{"nft", nftables.TableFamilyINet, "consul_tproxy", []string{"output"}, true},
		{"nft without chains", nftables.TableFamilyINet, "consul_tproxy", nil, false},
		{"others", nftables.TableFamilyIPv4, "nat", []string{"OUTPUT", "CNI-HOSTPORT-DNAT", "MY_CONSUL_PROXY_"}, false},
		{"another table", nftables.TableFamilyINet, "filter", []string{"input"}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ns := test.NewNetNS(t)
			if found, err := host.RedirectedByConsul(ns.Path); err != nil || found {
				t.Fatalf("an empty namespace is redirected: %t, %v", found, err)
			}
			nftTable(t, ns, tc.family, tc.table, tc.chains...)
			consulRules(t, d, ns, tc.want)
		})
	}
}

// consulRules fails the test unless the rules are found, or not, and ADD goes by it.
func consulRules(t *testing.T, d *Datapath, ns *test.NetNS, want bool) {
	t.Helper()
	found, err := host.RedirectedByConsul(ns.Path)
	if err != nil || found != want {
		t.Errorf("redirected by Consul: %t, %v; want %t", found, err, want)
	}
	key := workload.AttachmentID{ContainerID: "ruled", IfName: "eth0"}
	request := workload.Request{}
	full(&request)
	err = d.Add(Attachment{Key: key, NetNS: ns.Path, Request: request})
	if !want {
		if err != nil {
			t.Errorf("add: %v", err)
		}
		if err := d.Remove(key); err != nil {
			t.Error(err)
		}
		return
	}
	if !errors.Is(err, host.ErrConsulRules) {
		t.Errorf("add: %v, want ErrConsulRules", err)
	}
	nothingLeft(t, d)
	if v4, v6 := routesOf(t, ns); v4 || v6 {
		t.Errorf("routes are left: IPv4 %t, IPv6 %t", v4, v6)
	}
}

func TestConsulRulesAreFoundInIptables(t *testing.T) {
	for _, tool := range []string{"iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"} {
		t.Run(tool, func(t *testing.T) {
			test.Need(t, test.Root, test.CgroupV2, test.BPF, test.Tool(tool))
			d := newDatapath(t)
			ns := test.NewNetNS(t)
			rule := func(args string) {
				t.Helper()
				ns.Do(func() {
					if out, err := exec.Command(tool, strings.Fields(args)...).CombinedOutput(); err != nil {
						t.Fatalf("%s %s: %v: %s", tool, args, err, out)
					}
				})
			}
			rule("-t nat -N CNI-DN-1")
			rule("-t nat -A OUTPUT -p tcp -j CNI-DN-1")
			rule("-t filter -A INPUT -p tcp --dport 1 -j DROP")
			consulRules(t, d, ns, false)
			rule("-t nat -N CONSUL_PROXY_OUTPUT")
			rule("-t nat -A OUTPUT -p tcp -j CONSUL_PROXY_OUTPUT")
			consulRules(t, d, ns, true)
			rule("-t nat -D OUTPUT -p tcp -j CONSUL_PROXY_OUTPUT")
			rule("-t nat -X CONSUL_PROXY_OUTPUT")
			consulRules(t, d, ns, false)
		})
	}
}

// To look does not make: old tables exist in a namespace once somebody asks.
func TestLookForConsulRulesMakesNoTable(t *testing.T) {
	test.Need(t, test.Root)
	ns := test.NewNetNS(t)
	before := tablesOf(t, ns)
	if _, err := host.RedirectedByConsul(ns.Path); err != nil {
		t.Fatal(err)
	}
	if now := tablesOf(t, ns); now != before {
		t.Errorf("tables of the namespace: %q, were %q", now, before)
	}
}

// tablesOf lists what iptables, old and new, has in the namespace.
func tablesOf(t *testing.T, ns *test.NetNS) (all string) {
	t.Helper()
	opened, err := host.OpenNamespace(ns.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer opened.Close()
	err = opened.Do(func() error {
		for _, name := range []string{"ip_tables_names", "ip6_tables_names"} {
			all += readIfThere(t, "/proc/thread-self/net/"+name)
		}
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := conn.ListTables()
		for _, table := range tables {
			all += table.Name + "\n"
		}
		if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EINVAL) {
			return nil
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
