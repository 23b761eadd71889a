// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/renameio/v2"
)

// DefaultManifestDir is where a node remembers what an installation put on it.
const DefaultManifestDir = "/var/lib/weir"

func (n Node) manifestDir() string  { return cmp.Or(n.ManifestDir, DefaultManifestDir) }
func (n Node) manifestPath() string { return filepath.Join(n.manifestDir(), "installed.json") }

// Manifest is what a node remembers of its installation. It is written before
// the first change and again after the last.
type Manifest struct {
	Version string `json:"version"`
	Layout  Layout `json:"layout"`
	// Files has the digests that a file may have and be ours: one, or two
	// while an installation runs or after one that stopped half way.
	Files map[string][]string `json:"files"`
	// Directories are those that the installation made.
	Directories []string `json:"directories"`
}

// ReadManifest returns nil where there is no installation on record.
func (n Node) ReadManifest() (*Manifest, error) {
	data, err := os.ReadFile(n.on(n.manifestPath()))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read manifest: %w", err)
	}
	m := new(Manifest)
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", n.on(n.manifestPath()), err)
	}
	return m, nil
}

func (n Node) writeManifest(m *Manifest) error {
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(n.on(n.manifestPath())), 0o755); err != nil {
		return err
	}
	return replaceFile(n.on(n.manifestPath()), append(data, '\n'), 0o644)
}

// has reports whether the installation on record put such a file there.
func (m *Manifest) has(path, digest string) bool {
	return m != nil && slices.Contains(m.Files[path], digest)
}

func (m *Manifest) knows(path string) bool { return m != nil && len(m.Files[path]) > 0 }

// digestOfFile holds nothing of the file: the system job's task has little memory, and
// an upgrade would have the old programs in it beside the new ones.
func digestOfFile(path string) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, file); err != nil {
		return "", err
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

func digestOf(content []byte) string {
	sum := sha256.Sum256(content)
	return hex.EncodeToString(sum[:])
}

// replaceFile writes a file in one step: a reader sees the old or the new one,
// and a power failure leaves no half of either. renameio.WriteFile would keep the mode
// of the old file, and would look first whether it can write by way of TMPDIR.
func replaceFile(path string, content []byte, mode fs.FileMode) (err error) {
	file, err := renameio.NewPendingFile(path, renameio.WithTempDir(filepath.Dir(path)), renameio.WithStaticPermissions(mode))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Cleanup()) }() // nothing is left to do once it is in place
	if _, err := file.Write(content); err != nil {
		return err
	}
	return file.CloseAtomicallyReplace()
}

// replaceLink puts a symbolic link in the place of whatever is at path, in one
// step.
func replaceLink(target, path string) error {
	temporary := path + ".weir-new"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, temporary); err != nil {
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	return nil
}

// setAside gives what is at path a second name, in the place of what had that
// name before. It never leaves path without a file.
func setAside(path, saved string) error {
	temporary := saved + ".weir-new"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Link(path, temporary); err != nil {
		return err
	}
	// Renaming one name of a file to another of the same does nothing.
	if err := os.Rename(temporary, saved); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
