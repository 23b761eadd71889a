// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/weirmesh/weir/redirect"
	"github.com/weirmesh/weir/redirect/store"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test/envoy"
	"github.com/weirmesh/weir/test/spawn"
)

// The UIDs and ports of the demo are those of a Nomad job with Consul's
// defaults.
const (
	ifName       = "eth0"
	proxyUID     = 101
	taskUID      = 1000
	outboundPort = 15001
	inboundPort  = 20000
	servicePort  = 8080
	adminAddress = "127.0.0.2:19000"
)

// allocation is one of the two allocations: a namespace, an Envoy, a task.
type allocation struct {
	id      string
	group   string
	address netip.Prefix
	netns   string
	cgroup  string
	proxy   *envoy.Proxy
	tasks   []*spawn.Process
	seen    int // lines of the access log that were shown already
}

// newAllocation makes the namespace and the cgroups of an allocation.
func newAllocation(n *node, id, group, address string) (*allocation, error) {
	a := &allocation{
		id: id, group: group,
		address: netip.MustParsePrefix(address),
		netns:   filepath.Join(runDir, "netns", group),
		cgroup:  filepath.Join(n.cgroup, group),
	}
	n.allocs = append(n.allocs, a)
	for _, name := range []string{"", "task", "connect-proxy"} {
		if err := os.Mkdir(filepath.Join(a.cgroup, name), 0o755); err != nil {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
	}
	if err := os.Mkdir(a.proxyDir(), 0o755); err != nil {
		return nil, fmt.Errorf("make directory for Envoy: %w", err)
	}
	return a, n.connect(a)
}

func (a *allocation) veth() string     { return "veth" + a.id[:8] }
func (a *allocation) proxyDir() string { return filepath.Join(runDir, "envoy-"+a.group) }
func (a *allocation) key() workload.AttachmentID {
	return workload.AttachmentID{ContainerID: a.id, IfName: ifName}
}

// cniArgs is CNI_ARGS as Nomad 1.11 writes it for a job with a
// transparent_proxy block.
func (a *allocation) cniArgs() string {
	config := fmt.Sprintf(`{"ConsulDNSIP":"","ConsulDNSPort":0,"ProxyUserID":"%d","ProxyInboundPort":%d,"ProxyOutboundPort":%d,`+
		`"ExcludeInboundPorts":null,"ExcludeOutboundPorts":null,"ExcludeOutboundCIDRs":null,"ExcludeUIDs":null,`+
		`"NetNS":"%s","IptablesProvider":null}`, proxyUID, inboundPort, outboundPort, a.netns)
	return strings.Join([]string{
		"IgnoreUnknown=true", "NOMAD_REGION=global", "NOMAD_NAMESPACE=default", "NOMAD_JOB_ID=demo",
		"NOMAD_GROUP_NAME=" + a.group, "NOMAD_ALLOC_ID=" + a.id, "CONSUL_IPTABLES_CONFIG=" + config,
	}, ";")
}

// cniStdin is what libcni gives a chained plugin: its own entry of the
// conflist, and the result of the plugins before it.
func (a *allocation) cniStdin() ([]byte, error) {
	return json.Marshal(map[string]any{
		"cniVersion": "0.4.0", "name": "nomad", "type": "consul-cni", "log_level": "debug",
		"prevResult": map[string]any{
			"cniVersion": "0.4.0",
			"interfaces": []any{
				map[string]any{"name": bridgeName},
				map[string]any{"name": a.veth()},
				map[string]any{"name": ifName, "sandbox": a.netns},
			},
			"ips": []any{map[string]any{
				"version": "4", "interface": 2, "address": a.address.String(), "gateway": gateway,
			}},
			"routes": []any{map[string]any{"dst": "0.0.0.0/0"}},
			"dns":    map[string]any{},
		},
	})
}

// cni calls the plugin under the name by which Nomad finds it and returns
// how long it took.
func (a *allocation) cni(ctx context.Context, command string) (time.Duration, error) {
	stdin, err := a.cniStdin()
	if err != nil {
		return 0, fmt.Errorf("render request: %w", err)
	}
	plugins := filepath.Join(runDir, "plugins")
	cmd := exec.CommandContext(ctx, filepath.Join(plugins, "consul-cni"))
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Env = append(os.Environ(),
		"CNI_COMMAND="+command, "CNI_CONTAINERID="+a.id, "CNI_NETNS="+a.netns,
		"CNI_IFNAME="+ifName, "CNI_PATH="+plugins,
		"WEIR_PIN_DIR="+pinDir, "WEIR_STATE_DIR="+filepath.Join(runDir, "state"))
	if command != "DEL" { // Nomad's DEL has none
		cmd.Env = append(cmd.Env, "CNI_ARGS="+a.cniArgs())
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // see package spawn
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return 0, fmt.Errorf("call plugin: %s: %w\n%s%s", command, err, stdout.Bytes(), stderr.Bytes())
	}
	return time.Since(start), nil
}

// startProxy starts the allocation's Envoy with the listeners that Consul
// would give it.
func (a *allocation) startProxy(ctx context.Context, binary string) (err error) {
	loopback := netip.MustParseAddr("127.0.0.1")
	a.proxy, err = envoy.Start(ctx, envoy.Spec{
		Binary: binary,
		Config: envoy.Config{
			Outbound: netip.AddrPortFrom(loopback, outboundPort),
			Inbound:  netip.AddrPortFrom(netip.IPv4Unspecified(), inboundPort),
			Service:  netip.AddrPortFrom(loopback, servicePort),
			Admin:    netip.MustParseAddrPort(adminAddress),
		},
		NetNS: a.netns, Cgroup: filepath.Join(a.cgroup, "connect-proxy"), UID: proxyUID, Dir: a.proxyDir(),
	})
	return err
}

// serviceID is the ID that Nomad gives to the allocation's service.
func (a *allocation) serviceID() string {
	return fmt.Sprintf("_nomad-task-%s-group-%s-%s-%d", a.id, a.group, a.group, servicePort)
}

// startSidecar starts the Envoy that gets its configuration from Consul.
func (a *allocation) startSidecar(binary, bootstrap string) error {
	file := filepath.Join(a.proxyDir(), "consul.json")
	if err := os.WriteFile(file, []byte(bootstrap), 0o644); err != nil {
		return fmt.Errorf("start sidecar: %w", err)
	}
	log, err := os.Create(filepath.Join(a.proxyDir(), "sidecar.log"))
	if err != nil {
		return fmt.Errorf("start sidecar: %w", err)
	}
	defer log.Close()
	sidecar, err := spawn.Start(spawn.Spec{
		Binary: binary, Args: []string{"-c", file, "--disable-hot-restart", "--concurrency", "1", "--log-level", "warn"},
		NetNS: a.netns, Cgroup: filepath.Join(a.cgroup, "connect-proxy"), UID: proxyUID, Dir: a.proxyDir(), Stdout: log, Stderr: log,
	})
	if err != nil {
		return err
	}
	a.tasks = append(a.tasks, sidecar)
	return nil
}

// task describes a program of the demo's own as a task of the allocation.
func (a *allocation) task(args ...string) spawn.Spec {
	return spawn.Spec{
		Binary: "/proc/self/exe", Args: args, Env: []string{},
		NetNS: a.netns, Cgroup: filepath.Join(a.cgroup, "task"), UID: taskUID,
	}
}

// stop ends the allocation's programs.
func (a *allocation) stop() error {
	var errs []error
	if a.proxy != nil {
		errs = append(errs, a.proxy.Stop())
	}
	for _, task := range a.tasks {
		errs = append(errs, task.Stop(time.Second))
	}
	return errors.Join(errs...)
}

// newLines waits for count more lines in the access log of the allocation's
// Envoy and returns all that were not returned before.
func (a *allocation) newLines(ctx context.Context, count int) ([]envoy.Connection, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	lines, err := a.proxy.Await(ctx, a.seen, count)
	if err != nil {
		return nil, fmt.Errorf("read what Envoy of %q saw: %w", a.group, err)
	}
	a.seen += len(lines)
	return lines, nil
}

// datapath is the data path of the demo alone: a live one on the same
// machine has other directories.
func datapath() *redirect.Datapath {
	return redirect.New(store.Paths{PinDir: pinDir, StateDir: filepath.Join(runDir, "state")})
}
