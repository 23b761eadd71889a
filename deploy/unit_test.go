// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
)

// The unit takes most privileges from the agent: that it comes up, repairs, and
// comes back, is only shown by systemd itself.
func TestUnitUnderSystemd(t *testing.T) {
	m := bootMachine(t)
	wait(t, "the agent says that it is ready", m.active)
	wait(t, "that there is no Consul to be told", func() bool {
		out, err := m.run("weir", "status")
		return err != nil && strings.Contains(out, "not in sync with Consul")
	})
	before := m.must(t, "systemctl", "show", "-P", "MainPID", unitName)
	m.must(t, "sh", "-c", "echo 'consul { enabled = false }' >/etc/weir.d/without.hcl && systemctl reload "+unitName)
	wait(t, "the agent without Consul is in order", func() bool { _, err := m.run("weir", "status"); return err == nil && m.active() })
	if now := m.must(t, "systemctl", "show", "-P", "MainPID", unitName); now != before {
		t.Errorf("the process is %s after a reload, and was %s", now, before)
	}
	const pin = "/sys/fs/bpf/weir/links/weir_connect4"
	m.must(t, "rm", pin)
	wait(t, "a removed pin is put back", func() bool { _, err := m.run("test", "-e", pin); return err == nil })
	m.must(t, "systemctl", "kill", "--kill-whom=main", "-s", "KILL", unitName)
	wait(t, "a killed agent is back", func() bool {
		now, _ := m.run("systemctl", "show", "-P", "MainPID", unitName)
		return now != before && now != "0" && m.active()
	})
	if out, err := m.run("weir", "status"); err != nil {
		t.Errorf("weir status after the restart: %v\n%s", err, out)
	}
	m.must(t, "systemctl", "enable", unitName)
	m.must(t, "systemctl", "stop", unitName)
	if out, err := m.run("weir", "status"); err == nil || !strings.Contains(out, "the agent does not run") {
		t.Errorf("weir status where systemd should run the agent: %v\n%s", err, out)
	}
	m.must(t, "systemctl", "disable", unitName)
	if out, err := m.run("weir", "status"); err != nil || !strings.Contains(out, "agent: none runs") {
		t.Errorf("weir status where nobody wants an agent: %v\n%s", err, out)
	}
}

// Where the machine's first process waits for no child, what has ended stays a zombie.
func TestZombieHasEnded(t *testing.T) {
	test.Need(t, test.Tool("cat"))
	program := exec.Command("cat")
	stdin, err := program.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := program.Start(); err != nil {
		t.Fatal(err)
	}
	if hasEnded(program.Process.Pid) {
		t.Error("a program that runs has ended")
	}
	if err := stdin.Close(); err != nil {
		t.Fatal(err)
	}
	wait(t, "the end of a program that nobody waits for", func() bool { return hasEnded(program.Process.Pid) })
	if err := program.Wait(); err != nil {
		t.Error(err)
	}
	if !hasEnded(program.Process.Pid) {
		t.Error("a process that is gone has not ended")
	}
}
