// SPDX-License-Identifier: MPL-2.0

// Package deploy puts Weir on a node and takes it away again: the plugin and
// its name of Consul's, the CLI, the conflists, the systemd unit, the default
// configuration. Each file is replaced in one step, so that Nomad never sees
// half of one, and every call may be made again after one that stopped half way.
//
// It knows files alone. What is in the kernel is package redirect's.
package deploy

import (
	"bytes"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

// The files of this directory that a node gets. The embed directive wants a
// variable of the package; nothing writes it.
//
//go:embed weir.conflist weir-chained.conflist weir-agent.service weir.d/weir.hcl
var files embed.FS

// Layout says where on a node the parts go. A part whose directory is empty is
// left out.
type Layout struct {
	CNIPath   string `json:"cni_path"`       // one directory of Nomad's cni_path
	CNIConfig string `json:"cni_config_dir"` // Nomad's cni_config_dir
	Bin       string `json:"bin_dir"`
	Units     string `json:"unit_dir"`
	Config    string `json:"config_dir"`
}

// DefaultLayout is where Nomad looks by default, and where an administrator's
// own programs and units go.
func DefaultLayout() Layout {
	return Layout{
		CNIPath:   "/opt/cni/bin",
		CNIConfig: "/opt/cni/config",
		Bin:       "/usr/local/bin",
		Units:     "/etc/systemd/system",
		Config:    "/etc/weir.d",
	}
}

// Unless it is told otherwise, a part of the unit names these.
const (
	unitCLI    = "/usr/local/bin/weir"
	unitConfig = "/etc/weir.d"
)

// unit is the systemd unit for a layout.
func unit(l Layout) ([]byte, error) {
	text, err := files.ReadFile("weir-agent.service")
	if err != nil {
		return nil, err
	}
	if l.Bin != "" {
		text = bytes.ReplaceAll(text, []byte(unitCLI), []byte(filepath.Join(l.Bin, "weir")))
	}
	if l.Config != "" {
		text = bytes.ReplaceAll(text, []byte(unitConfig), []byte(l.Config))
	}
	return text, nil
}

// Validate reports what cannot be right in a layout.
func (l Layout) Validate() error {
	for _, dir := range []string{l.CNIPath, l.CNIConfig, l.Bin, l.Units, l.Config} {
		if dir != "" && !filepath.IsAbs(dir) {
			return fmt.Errorf("use directory %s: it is not an absolute path", dir)
		}
		if len(filepath.SplitList(dir)) > 1 {
			return fmt.Errorf("use directory %s: name one directory of the list", dir)
		}
	}
	if l.CNIPath != "" && filepath.Clean(l.CNIPath) == filepath.Clean(l.Bin) {
		return fmt.Errorf("use directory %s: the plugin and the CLI are both named weir and cannot share it", l.Bin)
	}
	return nil
}

// Node is the file system of a node and what is where on it.
type Node struct {
	Root   string // "" is the machine's own; what is above it is never touched
	Layout Layout
	// ManifestDir is where it remembers its installation; DefaultManifestDir
	// where it is empty.
	ManifestDir string
}

// on is where a path of the node lies in the caller's file system.
func (n Node) on(path string) string { return filepath.Join("/", n.Root, path) }

// Action is what a step does to a path.
type Action string

// The actions of steps.
const (
	Create   Action = "create"
	Replace  Action = "replace"
	Link     Action = "link"
	SetAside Action = "set aside"
	Restore  Action = "restore"
	Remove   Action = "remove"
	Keep     Action = "keep"
)

// Step is one thing that an installation or its removal does.
type Step struct {
	Do   Action `json:"do"`
	Path string `json:"path"`
	Why  string `json:"why,omitempty"`

	run func() error
}

func (s Step) String() string {
	text := fmt.Sprintf("%s %s", s.Do, s.Path)
	if s.Why != "" {
		text += ": " + s.Why
	}
	return text
}

// errNotEmpty: a directory has files of others and stays.
var errNotEmpty = errors.New("it is not empty")

// Steps are done in their order.
type Steps []Step

// Run does the steps and returns those that it did. It stops at the first that
// fails; what it did stays, and planning anew finds what is left to do.
func (s Steps) Run() (done Steps, err error) {
	for _, step := range s {
		if step.run != nil {
			err := step.run()
			if errors.Is(err, errNotEmpty) {
				step.Do, step.Why = Keep, errNotEmpty.Error()
			} else if err != nil {
				return done, fmt.Errorf("%s %s: %w", step.Do, step.Path, err)
			}
		}
		done = append(done, step)
	}
	return done, nil
}

// Changes reports whether any step changes anything.
func (s Steps) Changes() bool {
	for _, step := range s {
		if step.Do != Keep {
			return true
		}
	}
	return false
}

// file is something that a node gets.
type file struct {
	path    string
	mode    fs.FileMode
	content []byte
	binary  string // the import path of its main package; "" for what is no program
	once    bool   // the operator's from the moment it is there
}

// texts are the files of a layout that are no programs, those first that
// others refer to.
func texts(l Layout) ([]file, error) {
	var list []file
	add := func(dir, name, source string, mode fs.FileMode, once bool) error {
		if dir == "" {
			return nil
		}
		content, err := files.ReadFile(source)
		if err != nil {
			return err
		}
		list = append(list, file{path: filepath.Join(dir, name), mode: mode, content: content, once: once})
		return nil
	}
	if err := add(l.Config, "weir.hcl", "weir.d/weir.hcl", 0o600, true); err != nil {
		return nil, err
	}
	if l.Units != "" {
		content, err := unit(l)
		if err != nil {
			return nil, err
		}
		list = append(list, file{path: filepath.Join(l.Units, unitName), mode: 0o644, content: content})
	}
	for _, name := range []string{"weir.conflist", "weir-chained.conflist"} {
		if err := add(l.CNIConfig, name, name, 0o644, false); err != nil {
			return nil, err
		}
	}
	return list, nil
}

const (
	unitName   = "weir-agent.service"
	pluginName = "weir"
	consulName = "consul-cni"
	savedName  = "consul-cni.weir-saved"

	pluginPackage = "github.com/weirmesh/weir/cmd/weir-cni"
	cliPackage    = "github.com/weirmesh/weir/cmd/weir"
)
