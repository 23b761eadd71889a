// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// Removal is what an uninstallation does with files, in two parts: what Nomad
// calls goes first, then the kernel's state is removed by the caller, then the
// rest goes. Nomad finds consul-cni at every moment where one was set aside.
type Removal struct {
	Called Steps // conflists and plugin
	Rest   Steps
}

// PlanRemoval says what has to be done to take Weir's files off the node, also
// those of older versions and such as were put there by hand. What somebody
// changed since stays, and the plan says so.
func (n Node) PlanRemoval() (Removal, error) {
	if err := n.Layout.Validate(); err != nil {
		return Removal{}, err
	}
	manifest, err := n.ReadManifest()
	if err != nil {
		return Removal{}, err
	}
	var r Removal
	ours, paths, err := n.installed(manifest)
	if err != nil {
		return Removal{}, err
	}
	plugin := ""
	if n.Layout.CNIPath != "" {
		plugin = filepath.Join(n.Layout.CNIPath, pluginName)
	}
	var last Steps
	for _, path := range paths {
		steps, err := n.remove(path, ours[path])
		if err != nil {
			return Removal{}, err
		}
		switch {
		case path == plugin:
			last = steps // the link to it goes first
		case n.Layout.CNIConfig != "" && filepath.Dir(path) == filepath.Clean(n.Layout.CNIConfig):
			r.Called = append(r.Called, steps...)
		default:
			r.Rest = append(r.Rest, steps...)
		}
	}
	if plugin != "" {
		steps, err := n.unlinkConsul()
		if err != nil {
			return Removal{}, err
		}
		r.Called = append(r.Called, steps...)
	}
	r.Called = append(r.Called, last...)
	if n.Layout.Units != "" {
		enabled := filepath.Join(n.Layout.Units, "multi-user.target.wants", unitName)
		if _, err := os.Lstat(n.on(enabled)); err == nil {
			r.Rest = append(r.Rest, n.removal(enabled, "the unit was enabled"))
		}
	}
	made := []string{n.manifestDir()}
	if manifest != nil {
		r.Rest = append(r.Rest, n.removal(n.manifestPath(), ""))
		made = append(made, manifest.Directories...)
	}
	r.Rest = append(r.Rest, n.removeDirectories(made)...)
	return r, nil
}

// installed are the digests that files of ours may have, by path: those of the
// manifest, and where a file of this version would be. A program is told by
// itself.
func (n Node) installed(manifest *Manifest) (digests map[string][]string, paths []string, err error) {
	digests = map[string][]string{}
	if manifest != nil {
		digests = maps.Clone(manifest.Files)
	}
	list, err := texts(n.Layout)
	if err != nil {
		return nil, nil, err
	}
	for _, f := range list {
		digests[f.path] = append(slices.Clone(digests[f.path]), digestOf(f.content))
	}
	for dir, name := range map[string]string{n.Layout.CNIPath: pluginName, n.Layout.Bin: "weir"} {
		if dir != "" {
			path := filepath.Join(dir, name)
			digests[path] = slices.Clone(digests[path])
		}
	}
	return digests, slices.Sorted(maps.Keys(digests)), nil
}

// remove plans the removal of one file, or the return of what it had put aside.
func (n Node) remove(path string, digests []string) (Steps, error) {
	onDisk := n.on(path)
	var steps Steps
	digest, err := digestOfFile(onDisk)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return nil, fmt.Errorf("look at %s: %w", onDisk, err)
	case slices.Contains(digests, digest) || isOurs(onDisk):
		steps = append(steps, n.removal(path, ""))
	default:
		return Steps{{Do: Keep, Path: path, Why: "it is not as it was installed: remove it yourself if nobody needs it"}}, nil
	}
	if saved := path + ".weir-saved"; exists(n.on(saved)) {
		steps = Steps{n.restoration(path, saved)}
	}
	return steps, nil
}

func (n Node) removal(path, why string) Step {
	return Step{Do: Remove, Path: path, Why: why, run: func() error {
		if err := os.Remove(n.on(path)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}}
}

func (n Node) restoration(path, saved string) Step {
	return Step{Do: Restore, Path: path, Why: "from " + saved, run: func() error { return os.Rename(n.on(saved), n.on(path)) }}
}

// unlinkConsul gives consul-cni back what it was.
func (n Node) unlinkConsul() (Steps, error) {
	path, saved := filepath.Join(n.Layout.CNIPath, consulName), filepath.Join(n.Layout.CNIPath, savedName)
	owner, err := n.ownerOf(path)
	if err != nil {
		return nil, err
	}
	switch {
	case owner == foreign && sameFile(n.on(path), n.on(saved)): // an installation stopped half way
		return Steps{n.removal(saved, "it is a second name of "+path)}, nil
	case owner == foreign && exists(n.on(saved)):
		return Steps{{Do: Keep, Path: path, Why: "it is not Weir's; " + saved + " was set aside before it and stays"}}, nil
	case owner == foreign:
		return Steps{{Do: Keep, Path: path, Why: "it is not Weir's"}}, nil
	case exists(n.on(saved)):
		return Steps{n.restoration(path, saved)}, nil
	case owner == nobody:
		return nil, nil
	}
	return Steps{n.removal(path, "")}, nil
}

// removeDirectories removes those that the installation made and that are
// empty by then, the inner ones first.
func (n Node) removeDirectories(dirs []string) (steps Steps) {
	dirs = slices.Clone(dirs)
	slices.Sort(dirs)
	slices.Reverse(dirs)
	for _, dir := range dirs {
		if exists(n.on(dir)) {
			steps = append(steps, Step{Do: Remove, Path: dir, Why: "if it is empty", run: func() error {
				err := os.Remove(n.on(dir))
				switch {
				case errors.Is(err, unix.ENOTEMPTY):
					return errNotEmpty
				case errors.Is(err, fs.ErrNotExist):
					return nil
				}
				return err
			}})
		}
	}
	return steps
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func sameFile(a, b string) bool {
	first, err := os.Lstat(a)
	if err != nil {
		return false
	}
	second, err := os.Lstat(b)
	return err == nil && os.SameFile(first, second)
}
