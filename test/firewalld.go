// SPDX-License-Identifier: MPL-2.0

package test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// DebiansFirewalld requires firewalld out of Debian's packages.
const DebiansFirewalld Requirement = "Debian's firewalld"

// Firewalld is a real one in a namespace, with a system bus of its own. It knows nothing
// of the machine's bus, rules and configuration.
type Firewalld struct {
	tb   testing.TB
	ns   *NetNS
	root string // of the unpacked packages
	etc  string // a copy of their configuration
	env  []string
	log  *os.File
	cmd  *exec.Cmd // nil: it is stopped
}

// firewalldBus lets everybody own and send everything.
const firewalldBus = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-BUS Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=%s</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>
`

func findFirewalld() (string, error) {
	tools, err := toolsDir()
	if err != nil {
		return "", err
	}
	root := filepath.Join(tools, "firewalld")
	if _, err := os.Stat(filepath.Join(root, "usr/sbin/firewalld")); err != nil {
		return "", fmt.Errorf("%w: run test/tools/setup.sh firewalld", err)
	}
	return root, nil
}

// NewFirewalld starts the bus, and firewalld with the configuration that Debian ships.
func NewFirewalld(tb testing.TB, ns *NetNS) *Firewalld {
	tb.Helper()
	Need(tb, DebiansFirewalld, Tool("dbus-daemon"))
	root, err := findFirewalld()
	if err != nil {
		tb.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "weir-bus-") // short: it holds a socket
	if err != nil {
		tb.Fatal(err)
	}
	socket, config := filepath.Join(dir, "bus"), filepath.Join(dir, "bus.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, firewalldBus, socket), 0o600); err != nil {
		tb.Fatal(err)
	}
	if err := os.CopyFS(filepath.Join(dir, "etc"), os.DirFS(filepath.Join(root, "etc/firewalld"))); err != nil {
		tb.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		tb.Fatal(err)
	}
	bus := exec.Command("dbus-daemon", "--config-file="+config, "--nofork", "--nopidfile", "--nosyslog")
	if err := bus.Start(); err != nil {
		tb.Fatalf("start dbus-daemon: %v", err)
	}
	f := &Firewalld{tb: tb, ns: ns, root: root, etc: filepath.Join(dir, "etc"), log: log, env: append(os.Environ(),
		"DBUS_SYSTEM_BUS_ADDRESS=unix:path="+socket, "PYTHONPATH="+root+"/usr/lib/python3/dist-packages", "PYTHONDONTWRITEBYTECODE=1")}
	tb.Cleanup(func() {
		f.Stop()
		_ = bus.Process.Kill()
		_ = bus.Wait()
		if text, err := os.ReadFile(log.Name()); err == nil && tb.Failed() {
			tb.Logf("firewalld said:\n%s", text)
		}
		log.Close()
		os.RemoveAll(dir)
	})
	Eventually(tb, func() error { _, err := os.Stat(socket); return err }, "the bus")
	f.Start()
	return f
}

func (f *Firewalld) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command("/usr/bin/python3", append([]string{filepath.Join(f.root, program)}, args...)...)
	cmd.Env = f.env
	return cmd
}

// Start starts firewalld and waits until its rules are there.
func (f *Firewalld) Start() {
	f.tb.Helper()
	cmd := f.command("usr/sbin/firewalld", "--nofork", "--nopid", "--log-target=console",
		"--default-config="+f.root+"/usr/lib/firewalld", "--system-config="+f.etc)
	cmd.Stdout, cmd.Stderr = f.log, f.log
	var err error
	f.ns.Do(func() { err = cmd.Start() })
	if err != nil {
		f.tb.Fatalf("start firewalld: %v", err)
	}
	f.cmd = cmd
	Eventually(f.tb, func() error { return f.try("--state") }, "firewalld to run")
}

// Stop ends firewalld, which takes its rules with it.
func (f *Firewalld) Stop() {
	if f.cmd != nil {
		_ = f.cmd.Process.Signal(syscall.SIGTERM)
		_ = f.cmd.Wait()
		f.cmd = nil
	}
}

// Command runs firewall-cmd.
func (f *Firewalld) Command(args ...string) {
	f.tb.Helper()
	if err := f.try(args...); err != nil {
		f.tb.Fatal(err)
	}
}

func (f *Firewalld) try(args ...string) (err error) {
	var out []byte
	f.ns.Do(func() { out, err = f.command("usr/bin/firewall-cmd", args...).CombinedOutput() })
	if err != nil {
		return fmt.Errorf("firewall-cmd %q: %w: %s", args, err, out)
	}
	return nil
}
