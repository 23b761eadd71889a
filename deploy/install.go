// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Source is what an installation copies from.
type Source struct {
	Plugin  string // weir-cni
	CLI     string // weir
	Version string
}

// ErrForeign says that somebody else's file is where one of ours should go.
var ErrForeign = errors.New("another program's file is in the way")

// PlanInstall says what has to be done to a node, and changes nothing. It
// refuses a node where a foreign file is in the way, naming each, unless it
// may replace them; then they are kept aside.
func (n Node) PlanInstall(source Source, replace bool) (Steps, error) {
	if err := n.Layout.Validate(); err != nil {
		return nil, err
	}
	manifest, err := n.ReadManifest()
	if err != nil {
		return nil, err
	}
	wanted, err := n.wanted(source)
	if err != nil {
		return nil, err
	}
	p := &planner{node: n, manifest: manifest, replace: replace, next: nextManifest(n, manifest, source.Version)}
	p.record()
	for _, f := range wanted {
		if err := p.place(f); err != nil {
			return nil, err
		}
	}
	if n.Layout.CNIPath != "" {
		if err := p.linkConsul(); err != nil {
			return nil, err
		}
	}
	if len(p.foreign) > 0 {
		return nil, errors.Join(p.foreign...)
	}
	p.finish()
	return p.steps, nil
}

// wanted are the files that the node should have, in the order in which they
// are needed: what calls comes after what is called.
func (n Node) wanted(source Source) ([]file, error) {
	var list []file
	for _, program := range []struct{ dir, name, from, main string }{
		{n.Layout.CNIPath, pluginName, source.Plugin, pluginPackage},
		{n.Layout.Bin, "weir", source.CLI, cliPackage},
	} {
		if program.dir == "" {
			continue
		}
		content, err := os.ReadFile(program.from)
		if err != nil {
			return nil, fmt.Errorf("read program: %w", err)
		}
		if main := mainPackage(program.from); main != program.main {
			return nil, fmt.Errorf("read program %s: it is not %s", program.from, filepath.Base(program.main))
		}
		list = append(list, file{
			path: filepath.Join(program.dir, program.name), mode: 0o755, content: content, binary: program.main,
		})
	}
	others, err := texts(n.Layout)
	return append(list, others...), err
}

func nextManifest(n Node, current *Manifest, version string) *Manifest {
	next := &Manifest{Version: version, Layout: n.Layout, Files: map[string][]string{}}
	if current != nil {
		next.Files = maps.Clone(current.Files)
		next.Directories = slices.Clone(current.Directories)
	}
	return next
}

// planner collects the steps of an installation.
type planner struct {
	node     Node
	manifest *Manifest // nil: nothing on record
	next     *Manifest
	replace  bool
	steps    Steps
	foreign  []error
	written  []file
}

func (p *planner) add(do Action, path, why string, run func() error) {
	p.steps = append(p.steps, Step{Do: do, Path: path, Why: why, run: run})
}

// record writes, before anything is changed, what the node will have. The
// step is filled in last, when all that is known.
func (p *planner) record() {
	p.add(Create, p.node.manifestPath(), "remembers what was installed", func() error {
		for _, f := range p.written {
			digest := digestOf(f.content)
			if !slices.Contains(p.next.Files[f.path], digest) {
				p.next.Files[f.path] = append(p.next.Files[f.path], digest)
			}
		}
		return p.node.writeManifest(p.next)
	})
}

// finish drops the step that records where nothing is changed, or adds the one
// that ends the installation.
func (p *planner) finish() {
	for i, step := range p.steps {
		if step.Path != p.node.manifestPath() {
			continue
		}
		rest := slices.Concat(p.steps[:i], p.steps[i+1:])
		if p.manifest != nil && p.manifest.Layout == p.next.Layout && p.manifest.Version == p.next.Version && !rest.Changes() {
			p.steps = rest
			return
		}
		if p.manifest != nil {
			p.steps[i].Do = Replace
		}
		break
	}
	p.steps = append(p.steps, Step{Do: Replace, Path: p.node.manifestPath(), Why: "the installation is complete", run: func() error {
		for _, f := range p.written {
			p.next.Files[f.path] = []string{digestOf(f.content)}
		}
		return p.node.writeManifest(p.next)
	}})
}

// directory makes a directory and its parents where they are missing.
func (p *planner) directory(dir string) {
	if _, err := os.Stat(p.node.on(dir)); err == nil || slices.ContainsFunc(p.steps, func(s Step) bool { return s.Path == dir }) {
		return
	}
	if parent := filepath.Dir(dir); parent != dir {
		p.directory(parent)
	}
	if !slices.Contains(p.next.Directories, dir) {
		p.next.Directories = append(p.next.Directories, dir)
	}
	p.add(Create, dir, "", func() error {
		err := os.Mkdir(p.node.on(dir), 0o755)
		if errors.Is(err, fs.ErrExist) {
			return nil
		}
		return err
	})
}

// place plans one file.
func (p *planner) place(f file) error {
	path := p.node.on(f.path)
	write := func(do Action, why string) {
		p.directory(filepath.Dir(f.path))
		p.written = append(p.written, f)
		p.add(do, f.path, why, func() error { return replaceFile(path, f.content, f.mode) })
	}
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		write(Create, "")
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at %s: %w", path, err)
	}
	if f.once {
		p.add(Keep, f.path, "it is yours: an installation never changes it", nil)
		return nil
	}
	if !info.Mode().IsRegular() && info.Mode()&fs.ModeSymlink == 0 {
		return fmt.Errorf("look at %s: it is no file", path)
	}
	digest, err := digestOfFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a link that leads nowhere
		return fmt.Errorf("look at %s: %w", path, err)
	}
	switch {
	case err == nil && digest == digestOf(f.content) && info.Mode().Perm() == f.mode:
		p.written = append(p.written, f)
		p.add(Keep, f.path, "it is in place", nil)
	case err == nil && (digest == digestOf(f.content) || p.manifest.has(f.path, digest) || f.binary != "" && isOurs(path)):
		write(Replace, "")
	case p.replace:
		saved := f.path + ".weir-saved"
		p.add(SetAside, f.path, "kept as "+saved, func() error { return setAside(path, p.node.on(saved)) })
		write(Replace, "")
	case f.binary == "" && p.manifest.knows(f.path):
		p.add(Keep, f.path, "it was changed since it was installed; -replace sets it aside", nil)
	default:
		p.refuse(f.path, filepath.Base(f.path)+".weir-saved")
	}
	return nil
}

func (p *planner) refuse(path, saved string) {
	p.foreign = append(p.foreign, fmt.Errorf("install %s: %w: -replace keeps it as %s", path, ErrForeign, saved))
}

// linkConsul plans the name under which Nomad calls the plugin.
func (p *planner) linkConsul() error {
	path := filepath.Join(p.node.Layout.CNIPath, consulName)
	saved := filepath.Join(p.node.Layout.CNIPath, savedName)
	link := func(do Action, why string) {
		p.add(do, path, why, func() error { return replaceLink(pluginName, p.node.on(path)) })
	}
	owner, err := p.node.ownerOf(path)
	switch {
	case err != nil:
		return err
	case owner == nobody:
		link(Link, "to "+pluginName)
	case owner == linked:
		p.add(Keep, path, "it is in place", nil)
	case owner == ours:
		link(Link, "to "+pluginName)
	case p.replace:
		p.add(SetAside, path, "kept as "+saved, func() error { return setAside(p.node.on(path), p.node.on(saved)) })
		link(Link, "to "+pluginName+"; new allocations use Weir")
	default:
		p.refuse(path, savedName)
	}
	return nil
}

// owner says whose a plugin's file is.
type owner int

const (
	nobody  owner = iota // there is none
	linked               // a link to our plugin of the same directory
	ours                 // our plugin in another way
	foreign              // somebody else's
)

func (n Node) ownerOf(path string) (owner, error) {
	onDisk := n.on(path)
	info, err := os.Lstat(onDisk)
	if errors.Is(err, fs.ErrNotExist) {
		return nobody, nil
	}
	if err != nil {
		return foreign, fmt.Errorf("look at %s: %w", onDisk, err)
	}
	if info.IsDir() {
		return foreign, fmt.Errorf("look at %s: it is a directory", onDisk)
	}
	if info.Mode()&fs.ModeSymlink != 0 {
		target, err := os.Readlink(onDisk)
		if err != nil {
			return foreign, fmt.Errorf("look at %s: %w", onDisk, err)
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(path), target)
		}
		if target == filepath.Join(filepath.Dir(path), pluginName) {
			return linked, nil
		}
		onDisk = n.on(target)
	}
	if isOurs(onDisk) {
		return ours, nil
	}
	return foreign, nil
}

// isOurs reports whether a program is one of Weir's, of any version.
func isOurs(path string) bool {
	main := mainPackage(path)
	return main == pluginPackage || main == cliPackage
}

// mainPackage is the import path that a Go program was built from, as its
// build information says, or "". The program is not run: it may be anybody's.
func mainPackage(path string) string {
	info, err := buildinfo.ReadFile(path)
	if err != nil {
		return ""
	}
	return info.Path
}

// Remarks are what an operator should know about Nomad's cni_config_dir beside
// what is installed there: one file that cannot be read hides every network.
func (n Node) Remarks() (remarks []string) {
	entries, err := os.ReadDir(n.on(n.Layout.CNIConfig))
	if err != nil || n.Layout.CNIConfig == "" {
		return nil
	}
	for _, entry := range entries {
		path := filepath.Join(n.Layout.CNIConfig, entry.Name())
		if !slices.Contains([]string{".conflist", ".conf", ".json"}, filepath.Ext(path)) {
			continue
		}
		content, err := os.ReadFile(n.on(path))
		var network struct{ Name string }
		if err == nil {
			err = json.Unmarshal(content, &network)
		}
		switch {
		case err != nil:
			remarks = append(remarks, fmt.Sprintf("%s cannot be read, and with it no network of Nomad's: %v", path, err))
		case network.Name != strings.ToLower(network.Name):
			remarks = append(remarks, fmt.Sprintf("%s: Nomad looks for networks in lower case and does not find %q", path, network.Name))
		}
	}
	return remarks
}
