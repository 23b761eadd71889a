// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test"
)

// packages builds both programs and makes of them what `make package` makes.
func packages(t *testing.T) (deb, tarball string) {
	t.Helper()
	test.Need(t, test.Tool("go"), test.Tool("git"), test.Tool("dpkg-deb"))
	bin := t.TempDir()
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-X main.version=v1.2.3-dev", "-o", bin+"/", "../cmd/weir", "../cmd/weir-cni")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	var made [2]string
	for i := range made {
		dir := t.TempDir()
		out, err := exec.Command("./package.sh", bin, dir).CombinedOutput()
		if err != nil {
			t.Fatalf("package.sh: %v\n%s", err, out)
		}
		deb, tarball = one(t, dir+"/weir_*.deb"), one(t, dir+"/weir-1.2.3-dev-linux-*.tar.gz")
		for _, path := range []string{deb, tarball} {
			if !strings.Contains(string(out), "made "+path+", ") {
				t.Errorf("package.sh does not say that it made %s:\n%s", path, out)
			}
		}
		for _, path := range []string{deb, tarball} {
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			digest := sha256.Sum256(content)
			made[i] += string(digest[:])
		}
	}
	if made[0] != made[1] {
		t.Error("the same programs give packages that differ")
	}
	return deb, tarball
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
	mkdir -p /run/weir/networks
	printf "{\"key\":{\"container_id\":\"0b5d0c1e\",\"if_name\":\"eth0\"},\"netns\":\"/proc/self/ns/net\"}" >/run/weir/networks/0b5d0c1e-eth0.json
	! dpkg -r weir
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
	deb, tarball := packages(t)
	t.Run("on a node", func(t *testing.T) { packageOnANode(t, deb) })
	t.Run("contents", func(t *testing.T) { packageContents(t, deb, tarball) })
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
	for _, part := range []string{"Copyright: The Weir authors", "MPL-2.0", "Go go1.", "The Go Authors", "github.com/cilium/ebpf v", "github.com/hashicorp/consul/api v"} {
		if !strings.Contains(string(copyright), part) {
			t.Errorf("the package's copyright does not name %q", part)
		}
	}
	for line := range strings.Lines(output(t, "go", "version", "-m", tree+"/usr/bin/weir", tree+"/usr/lib/weir/weir-cni")) {
		if fields := strings.Fields(line); fields[0] == "dep" && !strings.Contains(string(copyright), fields[1]+" "+fields[2]) {
			t.Errorf("the package's copyright does not name %s %s", fields[1], fields[2])
		}
	}
	unpacked := t.TempDir()
	output(t, "tar", "-xzf", tarball, "-C", unpacked)
	if got := output(t, unpacked+"/weir/weir", "install", "-root", t.TempDir(), "-dry-run"); !strings.Contains(got, "would create /opt/cni/bin/weir\n") {
		t.Errorf("weir install from the tarball: %s", got)
	}
}
