// SPDX-License-Identifier: MPL-2.0

package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
)

// userspace is the suite the guest's programs come from, one for all kernels.
const userspace = "trixie"

// programs are the packages the guest has; their dependencies come with them. The reference CNI
// plugins and the tests call nft, iptables and ip, unshare, nsenter and flock.
var programs = []string{"busybox-static", "nftables", "iptables", "iproute2", "util-linux"}

// unwanted dependencies serve the installation of a package, not its programs.
var unwanted = []string{"debconf", "dpkg", "netbase", "perl", "gcc-14-base", "libdb5.3t64", "libcap2-bin"}

// image is one kernel of the archive, unpacked.
type image struct {
	release string // as uname -r says
	version string // the package's
	vmlinuz string
	modules string // the directory named as the release
}

// kernel resolves, downloads and unpacks the newest cloud kernel of a suite.
func (a *archive) kernel(ctx context.Context, suite string) (image, error) {
	all, err := a.packages(ctx, suite)
	if err != nil {
		return image{}, err
	}
	meta, err := all.newest(ctx, "linux-image-cloud-"+a.arch)
	if err != nil {
		return image{}, fmt.Errorf("resolve kernel of %s: %w", suite, err)
	}
	// The meta package names the release; from Linux 7 on the release is several packages.
	prefixes := []string{"linux-image-", "linux-binary-", "linux-modules-", "linux-base-"}
	wanted := func(name string) bool {
		return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, p) })
	}
	parts, err := closure(ctx, all, meta.depends, wanted)
	if err != nil {
		return image{}, fmt.Errorf("resolve kernel of %s: %w", suite, err)
	}
	root, err := a.unpack(ctx, suite, meta.version, parts)
	if err != nil {
		return image{}, fmt.Errorf("unpack kernel of %s: %w", suite, err)
	}
	return findImage(root, meta.version)
}

// guestRoot unpacks the guest's programs into one directory.
func (a *archive) guestRoot(ctx context.Context) (string, error) {
	all, err := a.packages(ctx, userspace)
	if err != nil {
		return "", err
	}
	parts, err := closure(ctx, all, programs, func(name string) bool { return !slices.Contains(unwanted, name) })
	if err != nil {
		return "", fmt.Errorf("resolve programs of the guest: %w", err)
	}
	var versions []string
	for _, p := range parts {
		versions = append(versions, p.name+"="+p.version)
	}
	return a.unpack(ctx, "programs", fingerprint(versions), parts)
}

// fingerprint is a short name for a list of texts.
func fingerprint(texts []string) string {
	sum := sha256.Sum256([]byte(strings.Join(texts, "\n")))
	return hex.EncodeToString(sum[:6])
}

// closure follows dependencies as far as wanted lets it.
func closure(ctx context.Context, all catalog, names []string, wanted func(string) bool) ([]pkg, error) {
	var parts []pkg
	seen := map[string]bool{}
	for queue := slices.Clone(names); len(queue) > 0; queue = queue[1:] {
		name := queue[0]
		if seen[name] || !wanted(name) {
			continue
		}
		seen[name] = true
		p, err := all.newest(ctx, name)
		if err != nil {
			return nil, err
		}
		parts = append(parts, p)
		queue = append(queue, p.depends...)
	}
	return parts, nil
}

// unpack downloads packages and unpacks them together into <cache>/<name>/<version>, once; what an
// older version left beside it goes.
func (a *archive) unpack(ctx context.Context, name, version string, parts []pkg) (string, error) {
	parent := filepath.Join(a.dir, a.arch, name)
	root := filepath.Join(parent, version)
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	if err := os.RemoveAll(parent); err != nil {
		return "", err
	}
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(parent, ".unpack-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return "", err
	}
	a.note("fetching %s %s (%d packages)", name, version, len(parts))
	debs := make([]string, len(parts))
	errs := make([]error, len(parts))
	var wg sync.WaitGroup
	for i, p := range parts {
		debs[i] = filepath.Join(parent, p.name+".deb")
		wg.Go(func() { errs[i] = fetch(ctx, p.mirror+"/"+p.filename, debs[i], p.sha256) })
	}
	wg.Wait()
	for i, deb := range debs {
		if errs[i] != nil {
			return "", errs[i]
		}
		if out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", deb, tmp).CombinedOutput(); err != nil {
			return "", fmt.Errorf("unpack %s: %w\n%s", deb, err, out)
		}
		if err := os.Remove(deb); err != nil {
			return "", err
		}
	}
	return root, os.Rename(tmp, root)
}

// findImage finds the kernel below root: in /boot, or since Linux 7 beside its modules.
func findImage(root, version string) (image, error) {
	for _, lib := range []string{"lib/modules", "usr/lib/modules"} {
		dirs, err := filepath.Glob(filepath.Join(root, lib, "*"))
		if err != nil {
			return image{}, err
		}
		for _, dir := range dirs {
			release := filepath.Base(dir)
			for _, file := range []string{filepath.Join(root, "boot", "vmlinuz-"+release), filepath.Join(dir, "vmlinuz")} {
				if _, err := os.Stat(file); err == nil {
					return image{release: release, version: version, vmlinuz: file, modules: dir}, nil
				}
			}
		}
	}
	return image{}, fmt.Errorf("find kernel below %s: no vmlinuz with modules", root)
}
