// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"context"
	"debug/buildinfo"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/weirmesh/weir/redirect/health"
	"golang.org/x/mod/semver"
)

// TestedNomad is the version on which the tests run jobs; leastNomad the first
// one with transparent_proxy.
const (
	TestedNomad = "v1.11.1"
	leastNomad  = "v1.8.0"
)

// The versions that Nomad asks of plugins.
const (
	leastConsulCNI = "v1.4.2" // else it places no job with transparent_proxy
	leastBridge    = "v1.3.0" // else it makes no CHECK when its client starts again
)

// Readiness checks what a node's Nomad needs and has of Weir. before says that
// Weir is not installed yet. proc is where the processes are, /proc as a rule.
// Nothing is changed: the plugins are run as Nomad runs them for their versions.
func (n Node) Readiness(ctx context.Context, proc string, before bool) []health.Check {
	c := &health.Checks{Group: "nomad"}
	dir := n.Layout.CNIPath
	if info, err := os.Stat(n.on(dir)); err == nil && info.IsDir() {
		c.OK("cni-path", "cni_path %s is there", dir)
		n.checkConsulCNI(ctx, c, before)
		n.checkBridge(ctx, c)
	} else if before {
		c.Warn("cni-path", "install the reference CNI plugins there, or name Nomad's cni_path with -cni-path", "cni_path %s is not there; 'weir install' makes it", dir)
	} else {
		c.Fault("cni-path", "name Nomad's cni_path with -cni-path, and run 'weir install' with it", "cni_path %s is not there", dir)
	}
	remarks := n.Remarks()
	for _, remark := range remarks {
		c.Fault("conflist", "correct that file or take it away, and restart Nomad's client", "%s", remark)
	}
	if len(remarks) == 0 {
		c.OK("conflist", "every network in %s can be read", n.Layout.CNIConfig)
	}
	n.checkNomad(ctx, c, proc, before)
	return c.List
}

// checkConsulCNI checks the plugin under the name by which Nomad calls it.
func (n Node) checkConsulCNI(ctx context.Context, c *health.Checks, before bool) {
	path := filepath.Join(n.Layout.CNIPath, consulName)
	owner, err := n.ownerOf(path)
	switch {
	case err != nil:
		c.Fault("consul-cni", "see what is at that path; 'weir install -replace' sets a file aside", "%v", err)
		return
	case owner == nobody && before:
		c.OK("consul-cni", "no consul-cni is in the way of Weir's")
		return
	case owner == nobody:
		c.Fault("consul-cni", "'weir install', and restart Nomad's client", "%s is not there: Nomad places no job with transparent_proxy here", path)
		return
	case owner == foreign && before:
		c.Warn("consul-cni", "'weir install -replace', which keeps it aside; 'weir uninstall' brings it back", "%s is not Weir's, but %s", path, describeProgram(n.on(path)))
	case owner == foreign:
		c.Fault("consul-cni", "'weir install -replace'; where a package brought it, 'apt-mark hold consul-cni'",
			"%s is not Weir's, but %s: it redirects new allocations, and Weir does not", path, describeProgram(n.on(path)))
	default:
		c.OK("consul-cni", "%s is Weir's", path)
	}
	version, err := pluginVersion(ctx, n.on(path))
	switch {
	case err != nil:
		c.Fault("consul-cni-version", "run that file and see why it fails; 'weir install' puts the plugin in place again", "Nomad cannot learn the version of %s: %v", path, err)
	case semver.Compare(version, leastConsulCNI) < 0:
		c.Fault("consul-cni-version", "'weir install', whose plugin says a newer one", "%s says version %s, and Nomad wants %s or newer", path, version, leastConsulCNI)
	default:
		c.OK("consul-cni-version", "%s says version %s, Nomad wants %s or newer", path, version, leastConsulCNI)
	}
}

// describeProgram says what a program is as far as it says so itself.
func describeProgram(path string) string {
	info, err := buildinfo.ReadFile(path)
	if err != nil || info.Path == "" {
		return "a program that does not say what it is"
	}
	return info.Path
}

// checkBridge checks the plugin that Nomad's own bridge mode needs.
func (n Node) checkBridge(ctx context.Context, c *health.Checks) {
	path := filepath.Join(n.Layout.CNIPath, "bridge")
	const remedy = "install the reference CNI plugins, 1.3.0 or newer, into Nomad's cni_path; networks of cni/weir do without"
	if _, err := os.Stat(n.on(path)); err != nil {
		c.Warn("bridge-plugin", remedy, "%s is not there: Nomad places no job with network mode bridge here", path)
		return
	}
	version, err := pluginVersion(ctx, n.on(path))
	switch {
	case err != nil:
		c.Warn("bridge-plugin", remedy, "Nomad cannot learn the version of %s: %v", path, err)
	case semver.Compare(version, leastBridge) < 0:
		c.Warn("bridge-plugin", remedy, "%s is of version %s: Nomad makes no CHECK before %s, so that its restart repairs nothing", path, version, leastBridge)
	default:
		c.OK("bridge-plugin", "%s is of version %s", path, version)
	}
}

// pluginVersion runs a plugin as Nomad does, without a command, and returns the
// first word that reads as a version.
func pluginVersion(ctx context.Context, path string) (string, error) {
	const timeout = 3 * time.Second // Nomad's own
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	plugin := exec.CommandContext(ctx, path)
	plugin.Env = []string{} // no CNI_COMMAND of this process
	out, err := plugin.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("run %s: %w", path, err)
	}
	return firstVersion(string(out))
}

// firstVersion is the first word that reads as a version, with its v.
func firstVersion(text string) (string, error) {
	for word := range strings.FieldsSeq(text) {
		if version := "v" + strings.TrimPrefix(word, "v"); semver.IsValid(version) {
			return version, nil
		}
	}
	return "", errors.New("no word of what it prints reads as a version")
}

// checkNomad looks for Nomad's agent among the processes.
func (n Node) checkNomad(ctx context.Context, c *health.Checks, proc string, before bool) {
	pid := nomadAgent(proc)
	if pid == 0 {
		c.Warn("nomad-version", "start Nomad's client, and run this again", "no process 'nomad agent' is found: its version is not checked")
		return
	}
	out, err := exec.CommandContext(ctx, filepath.Join(proc, strconv.Itoa(pid), "exe"), "version").Output()
	var version string
	if err == nil {
		version, err = firstVersion(string(out))
	}
	c.Version("nomad-version", "Nomad", version, err, TestedNomad, leastNomad)
	if before {
		return
	}
	installed, err := n.installedAt()
	if err != nil {
		return // told of consul-cni
	}
	started, err := startOf(proc, pid)
	switch {
	case err != nil:
		c.Warn("nomad-restart", "restart Nomad's client where it has run since before the installation", "when Nomad's agent (process %d) started is not known: %v", pid, err)
	case started.Before(installed):
		c.Warn("nomad-restart", "restart Nomad's client, or from 1.11.2 on send it SIGHUP; where that was done since, nothing is to be done",
			"Nomad's agent (process %d) started %s, before the plugin was installed (%s): it may not know the plugin",
			pid, started.Format(time.DateTime), installed.Format(time.DateTime))
	default:
		c.OK("nomad-restart", "Nomad's agent (process %d) started after the plugin was installed", pid)
	}
}

// nomadAgent is the process ID of a Nomad agent; 0 where none is found.
func nomadAgent(proc string) int {
	lines, err := filepath.Glob(filepath.Join(proc, "[0-9]*", "cmdline"))
	if err != nil {
		return 0
	}
	for _, path := range lines {
		text, err := os.ReadFile(path)
		if err != nil {
			continue // it ended
		}
		if args := strings.Split(string(text), "\x00"); filepath.Base(args[0]) == "nomad" && len(args) > 1 && args[1] == "agent" {
			pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
			if err == nil {
				return pid
			}
		}
	}
	return 0
}

// installedAt is when the plugin got its name of Consul's, or was replaced.
func (n Node) installedAt() (at time.Time, err error) {
	for _, name := range []string{pluginName, consulName} {
		info, err := os.Lstat(n.on(filepath.Join(n.Layout.CNIPath, name)))
		if errors.Is(err, fs.ErrNotExist) && name == pluginName {
			continue
		}
		if err != nil {
			return at, err
		}
		if info.ModTime().After(at) {
			at = info.ModTime()
		}
	}
	return at, nil
}

// startOf is when a process started, to a second.
func startOf(proc string, pid int) (time.Time, error) {
	text, err := os.ReadFile(filepath.Join(proc, strconv.Itoa(pid), "stat"))
	if err != nil {
		return time.Time{}, err
	}
	const (
		startTime = 19  // proc(5): field 22, counted from the one behind the name
		perSecond = 100 // USER_HZ, the same on every platform that Weir runs on
	)
	_, rest, _ := strings.Cut(string(text[strings.LastIndexByte(string(text), ')')+1:]), " ")
	fields := strings.Fields(rest)
	if len(fields) <= startTime {
		return time.Time{}, errors.New("its stat is too short")
	}
	ticks, err := strconv.ParseInt(fields[startTime], 10, 64)
	if err != nil {
		return time.Time{}, err
	}
	stat, err := os.ReadFile(filepath.Join(proc, "stat"))
	if err != nil {
		return time.Time{}, err
	}
	for line := range strings.Lines(string(stat)) {
		if boot, found := strings.CutPrefix(line, "btime "); found {
			seconds, err := strconv.ParseInt(strings.TrimSpace(boot), 10, 64)
			return time.Unix(seconds+ticks/perSecond, 0), err
		}
	}
	return time.Time{}, errors.New("the kernel does not say when it booted")
}
