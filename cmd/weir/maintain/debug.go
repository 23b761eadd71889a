// SPDX-License-Identifier: MPL-2.0

package maintain

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hashicorp/cli"
	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/agent/configfile"
	"github.com/weirmesh/weir/cmd/weir/base"
	"github.com/weirmesh/weir/cmd/weir/debug"
	"github.com/weirmesh/weir/cni/request"
	"golang.org/x/sys/unix"
)

// debugAllocations is how many allocations with problems are explained.
const debugAllocations = 20

func NewDebug(env base.Env) *base.Command {
	c := base.New(env, "debug", "Write an archive for whoever is to help with this node", `  Writes one tar.gz with what the other commands tell: status, doctor, workloads,
  verdicts, guard, changes, the last connections, a second of "weir top", versions,
  the configuration, the agent's log where journalctl has it, and for allocations
  with problems what decides about them. It changes nothing.

  It has no payload of any connection, and no secret: tokens of the configuration,
  of its files and of the environment, the agent's too, are replaced by
  "[removed]" wherever they stand. It does have names, addresses and processes: look
  at it before you hand it on. What could not be had is in errors.txt.

  The file is made for root alone, and must not be there yet.

  Write it, and look at what is in it:

      $ weir debug -o node7.tar.gz
      $ tar -tzf node7.tar.gz`).WithPaths()
	out := c.Flags.String("o", "", "`file` to write (default: weir-debug-HOST-TIME.tar.gz, here)")
	config := c.Flags.String("config", "", "`path` of the agent's configuration (default /etc/weir.d)")
	flows := c.Flags.Int("flows", 1000, "`count` of the last connections")
	lines := c.Flags.Int("log", 2000, "`count` of the last lines of the agent's log")
	c.Do = func() (int, error) {
		return 0, writeArchive(c, *out, cmp.Or(*config, request.DefaultConfigDir), *flows, *lines)
	}
	return c
}

func writeArchive(c *base.Command, out, configPath string, flows, lines int) (err error) {
	now := time.Now().UTC()
	host, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("read host name: %w", err)
	}
	title := "weir-debug-" + host + "-" + now.Format("20060102T150405Z")
	out = cmp.Or(out, title+".tar.gz")
	file, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("write archive: %w", err)
	}
	defer func() {
		if err = errors.Join(err, file.Close()); err != nil {
			err = errors.Join(err, os.Remove(out))
		}
	}()
	view, _, _ := c.Agent()
	config, configErr := configfile.ReadConfig(configPath, c.Getenv)
	if errors.Is(configErr, fs.ErrNotExist) {
		config, configErr = configfile.ReadConfig("", c.Getenv)
	}
	b := &bundle{Command: c, archive: debug.NewArchive(file, title, now, secrets(c, config, configPath))}
	for _, part := range debugParts(flows, configPath) {
		b.ask(part.file, part.args...)
	}
	b.explain(view)
	b.put("config.json", configText(config), configErr)
	text, err := systemText(now, host)
	b.put("system.json", text, err)
	text, err = c.Journal(c.Ctx, lines)
	b.put("agent.log", text, err)
	if len(b.missing) > 0 {
		b.add("errors.txt", strings.Join(b.missing, "\n")+"\n")
	}
	if err := errors.Join(b.err, b.archive.Close()); err != nil {
		return fmt.Errorf("write archive: %w", err)
	}
	c.UI.Output(fmt.Sprintf("%s: %s", out, base.CountOf(b.files, "file")))
	if len(b.missing) > 0 {
		c.UI.Output(c.Paint(base.Yellow, base.CountOf(len(b.missing), "part")+" could not be had: errors.txt in it says why"))
	}
	c.UI.Output("It has names, addresses and processes of this node, no payload and no token: look at it before you hand it on")
	return nil
}

// debugPart is a file that has what another command prints.
type debugPart struct {
	file string
	args []string
}

func debugParts(flows int, config string) []debugPart {
	doctor := []string{"doctor"}
	if config != request.DefaultConfigDir {
		doctor = append(doctor, "-config", config)
	}
	return []debugPart{
		{"version.json", []string{"version", "-json"}},
		{"status.txt", []string{"status", "-verbose"}},
		{"status.json", []string{"status", "-json"}},
		{"doctor.txt", append(slices.Clone(doctor), "-verbose")},
		{"doctor.json", append(slices.Clone(doctor), "-json")},
		{"workloads.txt", []string{"workloads", "-verbose"}},
		{"workloads.json", []string{"workloads", "-json"}},
		{"verdicts.json", []string{"verdicts", "-json"}},
		{"guard.json", []string{"guard", "-json"}},
		{"flows.json", []string{"flows", "-json", "-last", strconv.Itoa(flows)}},
		{"changes.json", []string{"changes", "-json"}},
		{"top.json", []string{"top", "-json", "-once", "-interval", "1s"}},
		{"config.txt", []string{"config", "validate", config}},
	}
}

// bundle is an archive that is being filled.
type bundle struct {
	*base.Command
	archive *debug.Archive
	files   int
	missing []string // what could not be had, and why
	err     error    // the archive cannot be written
}

func (b *bundle) add(name, content string) {
	b.files++
	b.err = errors.Join(b.err, b.archive.Add(name, content))
}

func (b *bundle) put(name, content string, err error) {
	if err != nil {
		b.missing = append(b.missing, name+": "+err.Error())
	}
	if content != "" {
		b.add(name, content)
	}
}

// ask adds what a command prints. Its exit code may well say that something is wrong.
func (b *bundle) ask(name string, args ...string) {
	var out, complaints bytes.Buffer
	world := b.Env
	world.Terminal, world.UI = false, &cli.BasicUi{Writer: &out, ErrorWriter: &complaints}
	if args[0] != "version" && args[0] != "config" {
		for flag, dir := range map[string]string{"-pin-dir": b.Paths.PinDir, "-state-dir": b.Paths.StateDir, "-cgroup-root": b.Paths.CgroupRoot} {
			if dir != "" {
				args = append(args, flag, dir)
			}
		}
	}
	world.Run(args, world)
	var err error
	if complaints.Len() > 0 {
		err = errors.New(strings.TrimSpace(complaints.String()))
	}
	b.put(name, out.String(), err)
}

// explain adds what decides about the allocations that have problems.
func (b *bundle) explain(view api.Status) {
	count := 0
	for _, w := range view.Workloads {
		if len(w.Problems) == 0 || w.State != api.StateManaged {
			continue
		}
		if count++; count > debugAllocations {
			b.missing = append(b.missing, fmt.Sprintf("allocations/: of those with problems, %d are there", debugAllocations))
			return
		}
		b.ask(filepath.Join("allocations", w.ID, "explain.json"), "explain", "-json", w.ID)
		b.ask(filepath.Join("allocations", w.ID, "dump.txt"), "dump", w.ID)
	}
}

// secrets are all that must not get into the archive, as far as this node tells.
func secrets(c *base.Command, config configfile.Config, configPath string) *debug.Secrets {
	secrets := &debug.Secrets{}
	secrets.Config(config)
	secrets.Files(configPath)
	var variables []string
	for _, name := range []string{"CONSUL_HTTP_TOKEN", "CONSUL_HTTP_AUTH", "NOMAD_TOKEN", "VAULT_TOKEN"} {
		variables = append(variables, name+"="+c.Getenv(name))
	}
	if traffic, err := c.AskTraffic(c.Ctx, c.StateDir(), time.Now()); err == nil {
		proc := cmp.Or(c.Proc, "/proc")
		if text, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(traffic.Agent.PID), "environ")); err == nil {
			variables = append(variables, strings.Split(string(text), "\x00")...)
		}
	}
	secrets.Environment(variables)
	return secrets
}

// configText is the configuration as it is in force, defaults filled in.
func configText(config configfile.Config) string {
	if consul := *config.Consul; consul.Token != "" {
		consul.Token = debug.Removed
		config.Consul = &consul
	}
	text, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return err.Error()
	}
	return string(text) + "\n"
}

// systemText is what the node is.
func systemText(now time.Time, host string) (string, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "", fmt.Errorf("read kernel: %w", err)
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return "", fmt.Errorf("read system: %w", err)
	}
	release, err := os.ReadFile("/etc/os-release")
	system := ""
	for line := range strings.Lines(string(release)) {
		if value, found := strings.CutPrefix(strings.TrimSpace(line), "PRETTY_NAME="); found {
			system = strings.Trim(value, `"`)
		}
	}
	text, marshalErr := json.MarshalIndent(map[string]any{
		"schema": base.Schema, "time": now, "host": host, "kernel": unix.ByteSliceToString(name.Release[:]), "machine": unix.ByteSliceToString(name.Machine[:]),
		"system": system, "uptime_seconds": info.Uptime, "memory_bytes": uint64(info.Totalram) * uint64(info.Unit),
	}, "", "  ")
	return string(text) + "\n", errors.Join(err, marshalErr)
}

// Journal is the end of the agent's log, where systemd keeps it.
func Journal(ctx context.Context, lines int) (string, error) {
	const timeout, most = 30 * time.Second, 16 << 20
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, "journalctl", "--unit", "weir-agent", "--lines", strconv.Itoa(lines), "--no-pager", "--output", "short-iso").Output()
	if err != nil {
		return "", fmt.Errorf("read the agent's log by journalctl: %w", err)
	}
	return string(out[max(0, len(out)-most):]), nil
}
