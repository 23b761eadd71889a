// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/test"
)

// withOwnCache runs a program with a /var/lib of its own: cnitool keeps its cache there.
const withOwnCache = `mount --bind "$1" /var/lib && shift && exec "$@"`

// cnitool is CNI's own runtime for the command line, on a node.
type cnitool struct {
	host  *test.NetNS
	cache string
	env   []string
}

// run runs it in the host's namespace and returns what it prints.
func (c *cnitool) run(command, network string, allocation *test.NetNS) (stdout string, err error) {
	cmd := exec.Command("unshare", "--mount", "sh", "-c", withOwnCache, "sh", c.cache, "cnitool", command, network, allocation.Path)
	var out, problem bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = append(os.Environ(), c.env...), &out, &problem
	c.host.Do(func() { err = cmd.Run() })
	if err != nil {
		err = fmt.Errorf("cnitool %s: %w: %s", command, err, problem.String())
	}
	return out.String(), err
}

// Both networks in each version of CNI that the plugin speaks, driven by cnitool: the
// result is of the version that the list names, and each command does what that version
// has it do.
func TestCnitool(t *testing.T) {
	test.Need(t, test.Root, test.CgroupV2, test.BPF, test.Tool("iptables"), test.Tool("nft"), test.Tool("unshare"), test.Tool("cnitool"))
	reference, source := test.CNIPath(t), built(t)
	for _, name := range []string{"weir", "weir-chained"} {
		for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
			t.Run(name+" "+version, func(t *testing.T) {
				n := emptyNode(t)
				n.install(t, source, false)
				paths, config := privatePaths(t), t.TempDir()
				list := bytes.Replace(n.conflist(t, name), []byte(`"cniVersion": "1.0.0"`), []byte(`"cniVersion": "`+version+`"`), 1)
				if version == "0.3.1" { // the reference firewall begins with 0.4.0
					list = regexp.MustCompile(`\{ "type": "firewall".* \},\n`).ReplaceAll(list, nil)
				}
				if err := os.WriteFile(filepath.Join(config, name+".conflist"), list, 0o644); err != nil {
					t.Fatal(err)
				}
				c := &cnitool{host: test.NewNetNS(t), cache: t.TempDir(), env: []string{
					"CNI_PATH=" + n.on("/opt/cni/bin") + ":" + reference, "NETCONFPATH=" + config,
					"CNI_ARGS=IgnoreUnknown=true;NOMAD_ALLOC_ID=0b5d0c1e-7c0f-4d0e-9a51-2f6c8e1d0a01;CONSUL_IPTABLES_CONFIG=" + consulArgument,
				}}
				c.walk(t, paths, name, version)
			})
		}
	}
}

func (c *cnitool) walk(t *testing.T, paths store.Paths, name, version string) {
	allocation := test.NewBareNetNS(t)
	must := func(command string) string {
		t.Helper()
		out, err := c.run(command, name, allocation)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	must("status") // before 1.1.0 cnitool asks no plugin
	address := addressOf(t, must("add"), version)
	wantRedirected(t, paths, allocation, address)
	if version == "0.3.1" {
		if _, err := c.run("check", name, allocation); err == nil || !strings.Contains(err.Error(), "does not support the CHECK command") {
			t.Errorf("check = %v, want cnitool's refusal", err)
		}
	} else {
		must("check")
	}
	must("del")
	wantNothingLeft(t, paths, c.host)

	// Attachments that cnitool knows it ends by DEL. In 1.1.0 it also has the plugin
	// collect those that it does not know, without the list of those that are valid.
	must("add")
	_, err := c.run("gc", name, allocation)
	if refused := err != nil && strings.Contains(err.Error(), "nothing is collected without a list of what is valid"); refused != (version == "1.1.0") {
		t.Errorf("gc = %v", err)
	}
	wantNothingLeft(t, paths, c.host)
}

// addressOf is the one address of a result, which is of that version.
func addressOf(t *testing.T, printed, version string) netip.Addr {
	t.Helper()
	var result struct {
		CNIVersion string `json:"cniVersion"`
		IPs        []struct {
			Version string // of IP: only results before 1.0.0 have it
			Address netip.Prefix
		}
	}
	if err := json.Unmarshal([]byte(printed), &result); err != nil || len(result.IPs) != 1 {
		t.Fatalf("result %s has not one address: %v", printed, err)
	}
	family := ""
	if strings.HasPrefix(version, "0.") {
		family = "4"
	}
	if result.CNIVersion != version || result.IPs[0].Version != family {
		t.Errorf("result is of version %q, its address of family %q; want %q, %q:\n%s", result.CNIVersion, result.IPs[0].Version, version, family, printed)
	}
	return result.IPs[0].Address.Addr()
}
