// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/weirmesh/weir/test"
)

// made are the packages of one architecture.
type made struct{ deb, rpm, tarball, sbom string }

// release makes into dir what `make release` makes, for the architectures of Go's name;
// each has programs of its own.
func release(t *testing.T, dir string, bins map[string]string) map[string]made {
	t.Helper()
	release := make(map[string]made)
	for _, arch := range slices.Sorted(maps.Keys(bins)) {
		pack := exec.Command("./package.sh", bins[arch], dir)
		pack.Env = append(os.Environ(), "GOARCH="+arch, "VERSION=v1.2.3-dev")
		out, err := pack.CombinedOutput()
		if err != nil {
			t.Fatalf("package.sh for %s: %v\n%s", arch, err, out)
		}
		m := made{one(t, dir+"/weir_*_"+arch+".deb"), one(t, dir+"/weir-1.2.3~dev-1."+rpmArchs[arch]+".rpm"),
			one(t, dir+"/weir-1.2.3-dev-linux-"+arch+".tar.gz"), one(t, dir+"/weir-1.2.3-dev-linux-"+arch+".spdx.json")}
		for _, path := range []string{m.deb, m.rpm, m.tarball, m.sbom} {
			if !strings.Contains(string(out), "made "+path+", ") {
				t.Errorf("package.sh does not say that it made %s:\n%s", path, out)
			}
		}
		release[arch] = m
	}
	return release
}

// rpmArchs are rpm's names for what Go and Debian name amd64 and arm64.
var rpmArchs = map[string]string{"amd64": "x86_64", "arm64": "aarch64"}

// programs builds both programs for an architecture, with the flags of the Makefile.
func programs(t *testing.T, arch string) string {
	t.Helper()
	bin := t.TempDir()
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=v1.2.3-dev", "-o", bin+"/", "../cmd/weir", "../cmd/weir-cni")
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH="+arch)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build for %s: %v\n%s", arch, err, out)
	}
	return bin
}

func one(t *testing.T, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil || len(found) != 1 {
		t.Fatalf("%s: found %q, %v: want one file", pattern, found, err)
	}
	return found[0]
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// onNode is what an operator does with the package, on a node whose disk is a
// layer over this machine's.
const onNode = `
set -eu
deb=$1 disk=$2
mount -t tmpfs tmpfs "$disk"
mkdir "$disk/upper" "$disk/work" "$disk/root"
mount -t overlay -o "lowerdir=/,upperdir=$disk/upper,workdir=$disk/work" overlay "$disk/root"
mount -t proc proc "$disk/root/proc"
mkdir -p "$disk/root/opt/cni/bin"
cp "$deb" "$disk/root/weir.deb"
cp postinst.sh prerm.sh "$disk/root/"
chroot "$disk/root" sh -euxc '
	exec 2>&1
	rm -rf /run/systemd/system /run/weir /etc/weir.d
	printf "#!/bin/sh\necho consul-cni v1.5.0\n" >/opt/cni/bin/consul-cni
	chmod 755 /opt/cni/bin/consul-cni
	dpkg -i /weir.deb
	test ! -e /opt/cni/bin/weir
	weir install -replace | grep "systemctl enable --now weir-agent"
	weir install | grep "systemctl enable --now weir-agent" # still the next step
	test "$(readlink /opt/cni/bin/consul-cni)" = weir
	test ! -e /etc/systemd/system/weir-agent.service # the package has the unit
	/opt/cni/bin/consul-cni | grep "^consul-cni v1"
	echo "# mine" >>/etc/weir.d/weir.hcl
	rm /opt/cni/bin/weir
	dpkg -i /weir.deb # an upgrade takes the plugin along
	test -x /opt/cni/bin/weir
	rm /opt/cni/bin/weir
	sh /postinst.sh 2 # as rpm calls it in an upgrade
	test -x /opt/cni/bin/weir
	sh /prerm.sh 1 # as rpm calls that of the version before
	test -x /opt/cni/bin/weir
	mkdir -p /run/weir/networks
	printf "{\"key\":{\"container_id\":\"0b5d0c1e\",\"if_name\":\"eth0\"},\"netns\":\"/proc/self/ns/net\"}" >/run/weir/networks/0b5d0c1e-eth0.json
	! dpkg -r weir
	! sh /prerm.sh 0 # as rpm calls it in a removal
	test -x /opt/cni/bin/weir -a -x /usr/bin/weir
	rm /run/weir/networks/*
	dpkg -r weir
	/opt/cni/bin/consul-cni | grep "v1.5.0"
	test ! -e /opt/cni/bin/weir -a ! -e /usr/bin/weir -a ! -e /var/lib/weir
	grep "^# mine" /etc/weir.d/weir.hcl
	dpkg -P weir
	test ! -e /etc/weir.d
'`

func TestPackages(t *testing.T) {
	test.Need(t, test.Tool("go"), test.Tool("git"), test.Tool("dpkg-deb"))
	bins := make(map[string]string)
	for arch := range rpmArchs {
		bins[arch] = programs(t, arch)
	}
	dir := t.TempDir()
	all := release(t, dir, bins)
	here := all[runtime.GOARCH]
	t.Run("sums", func(t *testing.T) { packageSums(t, dir, all) })
	for arch, m := range all {
		t.Run("rpm "+arch, func(t *testing.T) { rpmIsTheDeb(t, m.rpm, m.deb, rpmArchs[arch]) })
		t.Run("lintian "+arch, func(t *testing.T) { packageIsDebians(t, m.deb) })
		t.Run("architecture "+arch, func(t *testing.T) { packageArchitecture(t, m, bins[arch], arch) })
	}
	t.Run("same bytes again", func(t *testing.T) {
		again := t.TempDir()
		second := release(t, again, map[string]string{runtime.GOARCH: bins[runtime.GOARCH]})[runtime.GOARCH]
		for _, pair := range [][2]string{{here.deb, second.deb}, {here.rpm, second.rpm}, {here.tarball, second.tarball}, {here.sbom, second.sbom}} {
			if fileDigest(t, pair[0]) != fileDigest(t, pair[1]) {
				t.Errorf("the same programs give another %s", filepath.Base(pair[0]))
			}
		}
	})
	t.Run("version", func(t *testing.T) { packageVersion(t, bins) })
	t.Run("on a node", func(t *testing.T) { packageOnANode(t, here.deb) })
	t.Run("sbom", func(t *testing.T) { packageSBOM(t, here, bins[runtime.GOARCH]) })
	t.Run("contents", func(t *testing.T) { packageContents(t, here.deb, here.tarball) })
	t.Run("manual", func(t *testing.T) { packageManual(t, here.deb, here.tarball) })
	t.Run("completion", func(t *testing.T) { packageCompletion(t, here.deb) })
}

// packageSums finds a line for each package, and nothing else, in what `sha256sum` reads.
func packageSums(t *testing.T, dir string, all map[string]made) {
	sums, err := os.ReadFile(dir + "/SHA256SUMS")
	if err != nil {
		t.Fatal(err)
	}
	var got, want []string
	for line := range strings.Lines(string(sums)) {
		got = append(got, strings.TrimSpace(line))
	}
	for _, m := range all {
		for _, path := range []string{m.deb, m.rpm, m.tarball, m.sbom} {
			want = append(want, fileDigest(t, path)+"  "+filepath.Base(path))
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("SHA256SUMS (-want +got):\n%s", diff)
	}
}

// packageArchitecture finds the programs of the architecture in its packages, not those
// that laid out the tree.
func packageArchitecture(t *testing.T, m made, bin, arch string) {
	if got := strings.TrimSpace(output(t, "dpkg-deb", "-f", m.deb, "Architecture")); got != arch {
		t.Errorf("the deb is for %s: want %s", got, arch)
	}
	unzipped, err := exec.Command("gzip", "-dc", m.tarball).Output()
	if err != nil {
		t.Fatal(err)
	}
	deb, tarball := readDeb(t, m.deb), readTar(t, unzipped)
	for program, got := range map[string]entry{
		"weir": deb["usr/bin/weir"], "weir-cni": deb["usr/lib/weir/weir-cni"],
		"weir ": tarball["weir/weir"], "weir-cni ": tarball["weir/weir-cni"],
	} {
		if want := (entry{"-rwxr-xr-x", fileDigest(t, bin+"/"+strings.TrimSpace(program))}); got != want {
			t.Errorf("%s of %s: %v: want %v", program, arch, got, want)
		}
	}
}

// packageVersion has programs that cannot tell their version, and another one named.
func packageVersion(t *testing.T, bins map[string]string) {
	for arch, bin := range bins {
		if arch == runtime.GOARCH {
			continue
		}
		for version, want := range map[string]string{
			"":       "programs for " + arch + " do not run here; name their version by VERSION",
			"v9.9.9": "its weir is not of version v9.9.9",
		} {
			dir := t.TempDir()
			pack := exec.Command("./package.sh", bin, dir)
			pack.Env = append(os.Environ(), "VERSION="+version)
			out, err := pack.CombinedOutput()
			if left, _ := os.ReadDir(dir); err == nil || !strings.Contains(string(out), want) || len(left) != 0 {
				t.Errorf("VERSION=%q: %v, left %v:\n%s", version, err, left, out)
			}
		}
	}
}

func packageOnANode(t *testing.T, deb string) {
	test.Need(t, test.Root)
	out := output(t, "unshare", "--mount", "--pid", "--fork", "--net", "sh", "-c", onNode, "sh", deb, t.TempDir())
	for _, line := range []string{"weir: next: weir install -dry-run", "0b5d0c1e"} {
		if !strings.Contains(out, line) {
			t.Errorf("the package does not say %q:\n%s", line, out)
		}
	}
}

func packageContents(t *testing.T, deb, tarball string) {
	tree := t.TempDir()
	output(t, "dpkg-deb", "-x", deb, tree)
	if got := output(t, tree+"/usr/bin/weir", "version"); !strings.HasPrefix(got, "weir v1.2.3-dev ") {
		t.Errorf("weir version: %q", got)
	}
	unit, err := os.ReadFile(tree + "/usr/lib/systemd/system/" + unitName)
	if err != nil || !strings.Contains(string(unit), "ExecStart=/usr/bin/weir agent -config /etc/weir.d\n") {
		t.Errorf("the unit does not start the package's program: %v\n%s", err, unit)
	}
	for path, mode := range map[string]os.FileMode{
		"/usr/lib/weir/weir-cni": 0o755, "/etc/weir.d/weir.hcl": 0o600, "/usr/share/doc/weir/weir.nomad.hcl": 0o644,
		"/usr/share/doc/weir/prometheus/weir.rules.yml": 0o644, "/usr/share/doc/weir/grafana/weir.json": 0o644,
	} {
		if info, err := os.Stat(tree + path); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v: want mode %v", path, info, err, mode)
		}
	}
	// The terms of all that is linked into the programs, by the binaries' own word.
	copyright, err := os.ReadFile(tree + "/usr/share/doc/weir/copyright")
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []string{"Copyright: 2026 The Weir authors", "MPL-2.0", "Go go1.", "github.com/cilium/ebpf v", "github.com/hashicorp/consul/api v"} {
		if !strings.Contains(string(copyright), part) {
			t.Errorf("the package's copyright does not name %q", part)
		}
	}
	for line := range strings.Lines(output(t, "go", "version", "-m", tree+"/usr/bin/weir", tree+"/usr/lib/weir/weir-cni")) {
		if fields := strings.Fields(line); fields[0] == "dep" && !strings.Contains(string(copyright), fields[1]+" "+fields[2]) {
			t.Errorf("the package's copyright does not name %s %s", fields[1], fields[2])
		}
	}
	if terms := output(t, "gzip", "-dc", tree+"/usr/share/doc/weir/LICENSES-OF-MODULES.gz"); !strings.Contains(terms, "The Go Authors") || !strings.Contains(terms, "Apache License") {
		t.Error("the package has not the terms of what is linked into the programs")
	}
	unpacked := t.TempDir()
	output(t, "tar", "-xzf", tarball, "-C", unpacked)
	if got := output(t, unpacked+"/weir/weir", "install", "-root", t.TempDir(), "-dry-run"); !strings.Contains(got, "would create /opt/cni/bin/weir\n") {
		t.Errorf("weir install from the tarball: %s", got)
	}
}
