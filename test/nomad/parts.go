// SPDX-License-Identifier: MPL-2.0

package nomad

import (
	"archive/tar"
	"bytes"
	"cmp"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/weirmesh/weir/test"
	"github.com/weirmesh/weir/test/consul"
	"github.com/weirmesh/weir/test/envoy"
)

// parts are the programs a node is made of: files of this machine.
type parts struct {
	nomad, consul, envoy, app, weir, plugin string
	reference                               string // directory of the reference CNI plugins
}

func findParts(tb testing.TB) parts {
	tb.Helper()
	var p parts
	var err error
	if p.consul, err = consul.Find(); err != nil {
		test.Need(tb, test.Tool("consul")) // says so, and fails where a skip is a failure
	}
	if p.envoy, err = envoy.Find(); err != nil {
		test.Need(tb, test.Tool("envoy"))
	}
	root := moduleRoot(tb)
	p.nomad = cmp.Or(os.Getenv("WEIR_TEST_NOMAD"), filepath.Join(root, ".tools", "bin", "nomad"))
	p.reference = filepath.Join(root, ".tools", "cni")
	for _, file := range []string{p.nomad, filepath.Join(p.reference, "bridge")} {
		if _, err := os.Stat(file); err != nil {
			test.Need(tb, test.Tool(file)) // run test/tools/setup.sh nomad cni
		}
	}
	built := Build(tb, ".", "./test/nomad/app", "./cmd/weir", "./cmd/weir-cni")
	p.app, p.weir, p.plugin = filepath.Join(built, "app"), filepath.Join(built, "weir"), filepath.Join(built, "weir-cni")
	return p
}

// Build builds programs of this repository, static, and returns the directory that
// they are in. Their sources are given as seen from the directory of their module,
// that as seen from the repository's root.
func Build(tb testing.TB, module string, sources ...string) string {
	tb.Helper()
	return build(tb, "-s -w", module, sources...)
}

// BuildVersion builds Weir's two programs as a release of that version.
func BuildVersion(tb testing.TB, version string) string {
	tb.Helper()
	return build(tb, "-s -w -X main.version="+version, ".", "./cmd/weir", "./cmd/weir-cni")
}

func build(tb testing.TB, flags, module string, sources ...string) string {
	tb.Helper()
	dir := tb.TempDir()
	cmd := exec.Command("go", append([]string{"build", "-trimpath", "-ldflags", flags, "-o", dir + "/"}, sources...)...)
	cmd.Dir, cmd.Env = filepath.Join(moduleRoot(tb), module), append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		tb.Fatalf("build %q: %v: %s", sources, err, out)
	}
	return dir
}

// tools are what the node has in /opt/tools.
func (p parts) tools() []string {
	return []string{p.nomad, p.consul, p.envoy, p.app, p.weir, p.plugin}
}

func moduleRoot(tb testing.TB) string {
	tb.Helper()
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		tb.Fatalf("find the module: %v", err)
	}
	return filepath.Dir(strings.TrimSpace(string(out)))
}

// taskFiles are the root of a task, for images and for the chroot of the exec
// driver alike: a file here for each file there.
func (p parts) taskFiles(tb testing.TB) map[string]string {
	tb.Helper()
	files := map[string]string{"usr/local/bin/app": p.app, "usr/local/bin/envoy": p.envoy}
	out, err := exec.Command("ldd", p.envoy).Output()
	if err != nil {
		tb.Fatalf("find Envoy's libraries: %v", err)
	}
	for field := range strings.FieldsSeq(string(out)) {
		if filepath.IsAbs(field) {
			files[strings.TrimPrefix(field, "/")] = field
		}
	}
	return files
}

// The users of the node and of its images. Envoy has the UID that Nomad assumes.
// In 16 bits envoy32 would be envoy, and excluded32 app.
const (
	passwd = "root:x:0:0:root:/root:/bin/sh\nenvoy:x:101:101:envoy:/:/bin/false\napp:x:1000:1000:app:/:/bin/false\n" +
		"excluded:x:1234:1234:excluded:/:/bin/false\nenvoy32:x:65637:65637:envoy32:/:/bin/false\nexcluded32:x:66536:66536:excluded32:/:/bin/false\n" +
		"nobody:x:65534:65534:nobody:/:/bin/false\n"
	group = "root:x:0:\nenvoy:x:101:\napp:x:1000:\nexcluded:x:1234:\nenvoy32:x:65637:\nexcluded32:x:66536:\nnogroup:x:65534:\n"
)

// furnish puts the files of a new node in place.
func (n *Node) furnish(p parts) {
	n.tb.Helper()
	// What this machine may have there is none of the node's.
	for _, dir := range []string{"/opt/cni", "/etc/cni", "/var/lib/cni", "/etc/docker", "/etc/nomad.d", "/etc/consul.d", "/etc/weir.d", "/var/lib/weir", "/var/lib/nomad", "/var/lib/consul"} {
		if err := os.RemoveAll(n.Path(dir)); err != nil {
			n.tb.Fatalf("furnish the node: %v", err)
		}
	}
	for _, dir := range []string{"/opt/cni/bin", "/opt/cni/config", "/var/lib/nomad", "/var/lib/nomad-server", "/var/lib/consul", "/run/lock"} {
		if err := os.MkdirAll(n.Path(dir), 0o755); err != nil {
			n.tb.Fatalf("furnish the node: %v", err)
		}
	}
	if n.options.Package != "" { // before the users change: dpkg asks for those that it knows
		if err := copyFile(n.options.Package, n.Path("/tmp/weir.deb"), 0o644); err != nil {
			n.tb.Fatalf("furnish the node: %v", err)
		}
		n.Command("dpkg", "--install", "/tmp/weir.deb")
	}
	// Removed first: the machine's may be a link.
	if err := os.Remove(n.Path("/etc/resolv.conf")); err != nil && !os.IsNotExist(err) {
		n.tb.Fatalf("furnish the node: %v", err)
	}
	n.Write("/etc/resolv.conf", "nameserver "+n.machine.address+"\n", 0o644)
	n.Write("/etc/hosts", fmt.Sprintf("127.0.0.1 localhost\n%s %s\n", n.machine.address, n.machine.name), 0o644)
	for _, root := range []string{"/", "/opt/task"} {
		n.Write(filepath.Join(root, "etc/passwd"), passwd, 0o644)
		n.Write(filepath.Join(root, "etc/group"), group, 0o644)
	}
	for name, source := range p.taskFiles(n.tb) {
		target := n.Path(filepath.Join("/opt/task", name))
		err := os.MkdirAll(filepath.Dir(target), 0o755)
		if err == nil {
			err = copyFile(source, target, 0o755)
		}
		if err != nil {
			n.tb.Fatalf("furnish the node: %v", err)
		}
	}
	n.furnishPlugins(p.reference)
	for _, file := range n.options.Conflists {
		if err := copyFile(file, n.Path(filepath.Join("/opt/cni/config", filepath.Base(file))), 0o644); err != nil {
			n.tb.Fatalf("furnish the node: %v", err)
		}
	}
	n.writeConfigs()
}

// furnishPlugins installs the reference CNI plugins, and Weir's as an operator does.
func (n *Node) furnishPlugins(reference string) {
	n.tb.Helper()
	plugins, err := filepath.Glob(filepath.Join(reference, "*"))
	if err != nil || len(plugins) == 0 {
		n.tb.Fatalf("furnish the node: no reference CNI plugins: %v", err)
	}
	for _, file := range plugins {
		n.InstallPlugin(file, filepath.Base(file))
	}
	switch {
	case n.options.Plugin != "":
		n.InstallPlugin(n.options.Plugin, "consul-cni")
	case !n.options.NoWeir:
		n.Command(n.weir(), "install")
	}
}

// weir is the program that the node's administrator and its agent run.
func (n *Node) weir() string {
	if n.options.Package != "" {
		return "/usr/bin/weir"
	}
	return "weir"
}

// image is what a job names, and what starts in it.
type image struct {
	name, user string
	entry      string // JSON
	without    string // a file of the task's root that it does not need
}

func images() []image {
	return []image{
		{name: "envoy", user: "101", entry: `["/usr/local/bin/envoy"]`},
		{name: "app", entry: `["/usr/local/bin/app"]`, without: "usr/local/bin/envoy"},
		{name: "pause", entry: `["/usr/local/bin/app","pause"]`, without: "usr/local/bin/envoy"},
	}
}

// makeImages gives Docker the images envoy:node, app:node and pause:node.
func (n *Node) makeImages() {
	n.tb.Helper()
	var wait sync.WaitGroup
	list := images()
	problems := make([]error, len(list))
	for i, each := range list {
		wait.Go(func() { problems[i] = n.makeImage(each) })
	}
	wait.Wait()
	for i, err := range problems {
		if err != nil {
			n.tb.Fatalf("make image %s: %v", list[i].name, err)
		}
	}
}

func (n *Node) makeImage(each image) error {
	archive, out := io.Pipe()
	go func() { out.CloseWithError(writeArchive(out, n.Path("/opt/task"), each.without)) }()
	query := url.Values{"fromSrc": {"-"}, "repo": {each.name}, "tag": {"node"}, "changes": {"ENTRYPOINT " + each.entry}}
	if each.user != "" {
		query.Add("changes", "USER "+each.user)
	}
	response, err := n.api.docker.Post("http://docker/images/create?"+query.Encode(), "application/x-tar", archive)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err == nil && (response.StatusCode != http.StatusOK || bytes.Contains(text, []byte("errorDetail"))) {
		err = fmt.Errorf("%s: %s", response.Status, text)
	}
	return err
}

// writeArchive writes the tree below root, without one file, in a fixed order.
func writeArchive(out io.Writer, root, without string) error {
	archive := tar.NewWriter(out)
	var names []string
	err := filepath.WalkDir(root, func(name string, entry os.DirEntry, err error) error {
		if err == nil && entry.Type().IsRegular() {
			names = append(names, name)
		}
		return err
	})
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names {
		inside := path.Clean(strings.TrimPrefix(name, root+"/"))
		if inside == without {
			continue
		}
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if err := archive.WriteHeader(&tar.Header{Name: inside, Mode: 0o755, Size: int64(len(data))}); err != nil {
			return err
		}
		if _, err := archive.Write(data); err != nil {
			return err
		}
	}
	// Programs want a place for what they throw away.
	if err := archive.WriteHeader(&tar.Header{Name: "tmp/", Typeflag: tar.TypeDir, Mode: 0o1777}); err != nil {
		return err
	}
	return archive.Close()
}

func copyFile(source, target string, mode os.FileMode) error {
	in, err := os.Open(source)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(target, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}
