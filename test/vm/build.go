// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// builder compiles for the guest and packs initramfs images.
type builder struct {
	root  string // of the module
	dir   string // for what is built
	arch  string
	tools string // the guest's programs, unpacked
}

// module is the module path; test binaries are reported by their import path.
const modulePath = "github.com/weirmesh/weir"

func (b builder) goTool(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = b.root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+b.arch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("run go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

// compile builds the init program, the commands and the test binaries.
func (b builder) compile(ctx context.Context, tests []suiteOfTests) error {
	if err := os.MkdirAll(b.dir, 0o755); err != nil {
		return err
	}
	for _, c := range append([]string{"test/vm"}, commands...) {
		if err := b.goTool(ctx, "build", "-trimpath", "-ldflags=-s -w", "-o", b.binary(c), "./"+c); err != nil {
			return err
		}
	}
	for _, s := range tests {
		args := []string{"test", "-c", "-trimpath", "-ldflags=-s -w", "-o", b.binary(s.dir) + ".test"}
		// "guest" leaves out what needs a compiler.
		args = append(args, "-tags="+strings.TrimSuffix("guest,"+s.tags, ","))
		if err := b.goTool(ctx, append(args, "./"+s.dir)...); err != nil {
			return err
		}
		if _, err := os.Stat(b.binary(s.dir) + ".test"); err != nil {
			return fmt.Errorf("build tests of %s: the package has none", s.dir)
		}
	}
	return nil
}

func (b builder) binary(dir string) string {
	return filepath.Join(b.dir, strings.ReplaceAll(dir, "/", "_"))
}

// guestRuns says how the guest calls the test binaries.
func guestRuns(tests []suiteOfTests, timeout string, env []string) []guestRun {
	var runs []guestRun
	for _, s := range tests {
		name := "/src/" + s.dir + "/" + path.Base(s.dir) + ".test"
		command := []string{name, "-test.v=test2json", "-test.paniconexit0", "-test.count=1", "-test.timeout=" + timeout}
		if s.run != "" {
			command = append(command, "-test.run="+s.run)
		}
		runs = append(runs, guestRun{Package: modulePath + "/" + s.dir, Dir: "/src/" + s.dir, Command: command, Env: env})
	}
	return runs
}

// initramfs writes the image of one kernel and one job.
func (b builder) initramfs(file string, k image, tests []suiteOfTests, j job) error {
	modules, err := resolveModules(k.modules, guestModules)
	if err != nil {
		return err
	}
	for _, m := range modules {
		j.Modules = append(j.Modules, m.name)
	}
	text, err := json.MarshalIndent(j, "", "  ")
	if err != nil {
		return err
	}
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close()
	c := newCpio(out)
	for name, target := range map[string]string{
		"/bin": "usr/bin", "/sbin": "usr/sbin", "/lib": "usr/lib", "/lib64": "usr/lib64", "/var/run": "/run",
		"/usr/sbin/iptables": "iptables-nft", "/usr/sbin/ip6tables": "ip6tables-nft",
	} {
		c.symlink(name, target)
	}
	for _, dir := range []string{"/proc", "/sys", "/dev", "/run", "/root", "/usr/lib64"} {
		c.dir(dir, 0o755)
	}
	c.dir("/tmp", 0o1777)
	c.data("/etc/passwd", []byte("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n"))
	c.data("/etc/group", []byte("root:x:0:\nnogroup:x:65534:\n"))
	c.data("/etc/hosts", []byte("127.0.0.1 localhost\n::1 localhost\n"))
	c.data("/etc/resolv.conf", nil)
	c.data(jobPath, text)
	for _, m := range modules {
		c.data("/modules/"+m.name+".ko", m.elf)
	}
	if err := b.programs(c); err != nil {
		return fmt.Errorf("pack programs: %w", err)
	}
	if err := b.binaries(c, tests); err != nil {
		return fmt.Errorf("pack tests: %w", err)
	}
	if err := c.close(); err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return out.Close()
}

// programs packs what runs and what it is linked with, not what documents it. A package may still
// place files in /bin and /lib, which are links to those of /usr.
func (b builder) programs(c *cpio) error {
	for _, top := range []string{"usr/", ""} {
		for _, dir := range []string{"bin", "sbin", "lib", "lib64"} {
			from := filepath.Join(b.tools, top+dir)
			if _, err := os.Stat(from); err != nil {
				continue
			}
			skip := []string{"systemd", "locale", "tmpfiles.d"}
			keep := func(rel string) bool {
				return !slices.Contains(skip, filepath.Base(rel)) && !strings.HasSuffix(rel, ".a") && !strings.Contains(rel, "/gconv")
			}
			if err := c.tree(from, "/usr/"+dir, keep); err != nil {
				return err
			}
		}
	}
	etc := filepath.Join(b.tools, "etc")
	if err := c.tree(etc, "/etc", func(string) bool { return true }); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	applets := "sh ls cat cp mv rm mkdir mount umount ps dmesg grep sed awk head tail less vi id env sleep kill find mknod stat wc nc"
	for _, applet := range strings.Fields(applets) {
		c.symlink("/usr/bin/"+applet, "busybox")
	}
	return nil
}

func (b builder) binaries(c *cpio, tests []suiteOfTests) error {
	init, err := os.ReadFile(b.binary("test/vm"))
	if err != nil {
		return err
	}
	c.executable("/init", init)
	for _, dir := range commands {
		text, err := os.ReadFile(b.binary(dir))
		if err != nil {
			return err
		}
		c.executable("/src/bin/"+path.Base(dir), text)
	}
	for _, s := range tests {
		text, err := os.ReadFile(b.binary(s.dir) + ".test")
		if err != nil {
			return err
		}
		c.executable("/src/"+s.dir+"/"+path.Base(s.dir)+".test", text)
		for _, data := range []string{s.dir + "/testdata", s.data} {
			if _, err := os.Stat(filepath.Join(b.root, data)); data == "" || err != nil {
				continue
			}
			if err := c.tree(filepath.Join(b.root, data), "/src/"+data, func(string) bool { return true }); err != nil {
				return err
			}
		}
	}
	return nil
}
