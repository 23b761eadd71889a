// SPDX-License-Identifier: MPL-2.0

// Command vm runs the kernel tests on the kernels of Debian, each in a virtual machine.
//
// A guest is a Debian cloud kernel with an initramfs that holds this program as /init, Debian's
// busybox, nft, iptables and ip, the modules the tests need, and the test binaries. Kernels and
// programs are the newest of their suite in the archive that this machine's apt uses; they are kept
// in .tools/kernels.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// options are the command line.
type options struct {
	kernel, arch, run string
	scale             string
	timeout           time.Duration
	parallel          int
	shell, report     bool
	verbose           bool
}

func main() {
	if filepath.Base(os.Args[0]) == "init" {
		guest()
		return
	}
	var o options
	flag.StringVar(&o.kernel, "kernel", os.Getenv("KERNEL"), "only this kernel: "+kernelNames()+" (environment: KERNEL)")
	flag.StringVar(&o.arch, "arch", cmp.Or(os.Getenv("ARCH"), runtime.GOARCH), "architecture: amd64 or arm64 (environment: ARCH)")
	flag.StringVar(&o.run, "run", "", "only tests that match, as in go test")
	flag.StringVar(&o.scale, "scale", os.Getenv("WEIR_TEST_SCALE"), "size of heavy tests; by default what suits the accelerator (environment: WEIR_TEST_SCALE)")
	flag.DurationVar(&o.timeout, "timeout", 30*time.Minute, "for one guest")
	flag.IntVar(&o.parallel, "parallel", 3, "guests at a time")
	flag.BoolVar(&o.shell, "shell", false, "boot one kernel and give a shell in it")
	flag.BoolVar(&o.report, "report", false, "measure the programs on each kernel and write the table of docs/compatibility.md")
	flag.BoolVar(&o.verbose, "v", false, "print what the guests print, as it comes")
	flag.Parse()

	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := start(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "test/vm:", err)
		os.Exit(1)
	}
}

func kernelNames() string {
	var names []string
	for _, k := range kernels {
		names = append(names, k.name)
	}
	return strings.Join(names, ", ")
}

// run is one invocation.
type run struct {
	options
	dir     string // .tools/vm
	archive *archive
	builder builder
	accel   string
	out     sync.Mutex // standard output, one kernel at a time
}

func (r *run) note(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "# "+format+"\n", args...)
}

func start(ctx context.Context, o options) error {
	if _, ok := machines[o.arch]; !ok {
		return fmt.Errorf("architecture %q: not amd64 or arm64", o.arch)
	}
	chosen := slices.Clone(kernels)
	if o.kernel != "" {
		chosen = slices.DeleteFunc(chosen, func(k kernel) bool { return k.name != o.kernel })
	}
	if len(chosen) == 0 {
		return fmt.Errorf("kernel %q: not one of %s", o.kernel, kernelNames())
	}
	if o.shell && len(chosen) > 1 {
		return errors.New("a shell needs one kernel: give -kernel")
	}
	if o.report {
		chosen = slices.DeleteFunc(chosen, func(k kernel) bool { return k.refuse })
	}
	root, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		return fmt.Errorf("find module: %w", err)
	}
	r := &run{options: o}
	top := strings.TrimSpace(string(root))
	r.dir = filepath.Join(top, ".tools", "vm")
	r.builder = builder{root: top, dir: filepath.Join(r.dir, "bin-"+o.arch), arch: o.arch}
	r.archive = &archive{dir: filepath.Join(top, ".tools", "kernels"), arch: o.arch, note: r.note}
	if mirrors := strings.Fields(os.Getenv("WEIR_DEBIAN_MIRROR")); len(mirrors) > 0 {
		r.archive.mirrors = mirrors
	} else if r.archive.mirrors, err = mirrorsFromSources("/etc/apt"); err != nil {
		return err
	}
	if _, err := exec.LookPath(machines[o.arch].qemu); err != nil {
		return fmt.Errorf("find emulator: %w; Debian's package %s has it", err, machines[o.arch].pkg)
	}

	var tests []suiteOfTests
	for _, s := range suites {
		if o.report && s.dir != reportSuite {
			continue
		}
		if slices.ContainsFunc(chosen, func(k kernel) bool { return k.refuse == s.refused }) {
			tests = append(tests, s)
		}
	}
	images, err := r.prepare(ctx, chosen, tests)
	if err != nil {
		return err
	}
	if o.shell {
		return r.shellIn(ctx, chosen[0], images[0], tests)
	}
	results, err := r.all(ctx, chosen, images, tests)
	if err != nil {
		return err
	}
	if o.report {
		return writeTable(filepath.Join(top, "docs", "compatibility.md"), results)
	}
	return summarize(os.Stdout, chosen, results)
}

// prepare fetches, unpacks and compiles what all guests need, at the same time.
func (r *run) prepare(ctx context.Context, chosen []kernel, tests []suiteOfTests) ([]image, error) {
	images := make([]image, len(chosen))
	errs := make([]error, len(chosen)+2)
	var wg sync.WaitGroup
	for i, k := range chosen {
		wg.Go(func() {
			images[i], errs[i] = r.archive.kernel(ctx, k.suite)
			if errs[i] == nil && k.name != "newest" && !strings.HasPrefix(images[i].release, k.name+".") {
				errs[i] = fmt.Errorf("resolve kernel of %s: it is %s, not a %s", k.suite, images[i].release, k.name)
			}
		})
	}
	wg.Go(func() { r.builder.tools, errs[len(chosen)] = r.archive.guestRoot(ctx) })
	wg.Go(func() { errs[len(chosen)+1] = r.builder.compile(ctx, tests) })
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	r.accel = "tcg"
	if r.arch == runtime.GOARCH {
		initrd := filepath.Join(r.dir, "probe.initrd")
		if err := r.builder.initramfs(initrd, images[len(images)-1], nil, job{}); err != nil {
			return nil, fmt.Errorf("build initramfs: %w", err)
		}
		var err error
		if r.accel, err = accelerator(ctx, r.dir, r.arch, images[len(images)-1].vmlinuz, initrd, r.note); err != nil {
			return nil, fmt.Errorf("try KVM: %w", err)
		}
	}
	if r.scale == "" {
		r.scale = map[string]string{"tcg": "0.02", "kvm": "0.2"}[r.accel]
	}
	return images, nil
}

// job is what the guest of one kernel does.
func (r *run) job(k kernel, tests []suiteOfTests) (job, []suiteOfTests) {
	mine := slices.DeleteFunc(slices.Clone(tests), func(s suiteOfTests) bool { return s.refused != k.refuse })
	j := job{Env: []string{"CI=1", "WEIR_TEST_BIN=/src/bin", "WEIR_TEST_SCALE=" + r.scale}, Shell: r.shell}
	for i := range mine {
		if r.run != "" {
			mine[i].run = r.run
		}
		if r.report {
			mine[i].run = reportTest
			j.Env = append(j.Env, reportEnv+"=1")
		}
	}
	j.Runs = guestRuns(mine, max(r.timeout-30*time.Second, 10*time.Second).String(), nil)
	return j, mine
}

func (r *run) boot(k kernel, img image, tests []suiteOfTests) (guestBoot, error) {
	j, mine := r.job(k, tests)
	initrd := filepath.Join(r.dir, k.name+"-"+r.arch+".initrd")
	if err := r.builder.initramfs(initrd, img, mine, j); err != nil {
		return guestBoot{}, fmt.Errorf("build initramfs of %s: %w", k.name, err)
	}
	name := k.name
	if r.arch != runtime.GOARCH {
		name += "-" + r.arch
	}
	return guestBoot{arch: r.arch, accel: r.accel, kernel: img.vmlinuz, initrd: initrd,
		log: filepath.Join(r.dir, name+".log"), timeout: r.timeout, booted: min(r.timeout, 3*time.Minute)}, nil
}

func (r *run) shellIn(ctx context.Context, k kernel, img image, tests []suiteOfTests) error {
	b, err := r.boot(k, img, tests)
	if err != nil {
		return err
	}
	b.shell = true
	cmd := b.command(ctx)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}

// kernelResult is one row of the outcome.
type kernelResult struct {
	image    image
	accel    string
	packages []packageResult
	took     time.Duration
	err      error // of the guest
}

// all runs the guests, some at a time, and prints each when it is done.
func (r *run) all(ctx context.Context, chosen []kernel, images []image, tests []suiteOfTests) ([]kernelResult, error) {
	results := make([]kernelResult, len(chosen))
	errs := make([]error, len(chosen))
	slots := make(chan struct{}, max(r.parallel, 1))
	var wg sync.WaitGroup
	for i, k := range chosen {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			results[i], errs[i] = r.one(ctx, k, images[i], tests)
			if errs[i] == nil && r.accel == "tcg" && diedOfPatching(results[i].err) {
				r.note("kernel %s: the emulator ran code that the guest had patched away; its guest is started once more", k.name)
				results[i], errs[i] = r.one(ctx, k, images[i], tests)
			}
			if errs[i] == nil {
				errs[i] = r.again(ctx, k, images[i], tests, &results[i])
			}
		})
	}
	wg.Wait()
	return results, errors.Join(errs...)
}

func (r *run) one(ctx context.Context, k kernel, img image, tests []suiteOfTests) (kernelResult, error) {
	b, err := r.boot(k, img, tests)
	if err != nil {
		return kernelResult{}, err
	}
	said, failure := b.run(ctx, func(m message) {
		if r.verbose && len(m.Output) > 0 {
			r.out.Lock()
			defer r.out.Unlock()
			for line := range bytes.Lines(m.Output) {
				fmt.Printf("[%s] %s", k.name, bytes.TrimPrefix(line, []byte{0x16}))
			}
		}
	})
	if ctx.Err() != nil {
		return kernelResult{}, ctx.Err()
	}
	result := kernelResult{image: img, accel: b.accel, took: said.took, err: failure}
	var text bytes.Buffer
	fmt.Fprintf(&text, "=== kernel %s: %s (%s), %s %s\n", k.name, img.release, img.version, b.arch, b.accel)
	_, mine := r.job(k, tests)
	for _, s := range mine {
		name := modulePath + "/" + s.dir
		output := said.output[name]
		if output == nil {
			output = &bytes.Buffer{}
		}
		p, err := readResult(ctx, name, output.Bytes(), said.exit[name], r.run != "")
		if err != nil {
			return kernelResult{}, err
		}
		p.print(&text)
		result.packages = append(result.packages, p)
	}
	complaints, err := kernelComplaints(b.log)
	if err == nil && len(complaints) > 0 {
		result.err = errors.Join(result.err, fmt.Errorf("the kernel complains: %s", strings.Join(complaints, "; ")))
	}
	if result.err != nil {
		fmt.Fprintf(&text, "--- FAIL: kernel %s after %.0f s of %s: %v\n", k.name, said.took.Seconds(), b.timeout, result.err)
		tail(&text, b.log, 25)
	}
	if result.failed() {
		fmt.Fprintf(&text, "    console: %s\n    a shell in it: go run ./test/vm -shell -kernel %s -arch %s\n", b.log, k.name, b.arch)
	}
	r.out.Lock()
	defer r.out.Unlock()
	_, err = io.Copy(os.Stdout, &text)
	return result, err
}
