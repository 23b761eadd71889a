// SPDX-License-Identifier: MPL-2.0

package discover

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"
)

// Watcher tells when something changes in a few directories. One that is not
// there yet is waited for in the nearest one above it.
type Watcher struct {
	dirs []string // always
	More []string // as long as they are of use
	fs   *fsnotify.Watcher
}

func NewWatcher(dirs ...string) (*Watcher, error) {
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, fmt.Errorf("watch directories: %w", err)
	}
	return &Watcher{dirs: dirs, fs: notify}, nil
}

// Ensure watches what exists now and reports whether a directory is watched
// that was not before, so that changes before may have been missed.
func (w *Watcher) Ensure() (fresh bool, err error) {
	watched := w.fs.WatchList()
	var wanted []string
	for _, dir := range w.More {
		if isDir(dir) {
			wanted = append(wanted, dir)
		}
	}
	for _, dir := range w.dirs {
		for !isDir(dir) && dir != filepath.Dir(dir) {
			dir = filepath.Dir(dir)
		}
		wanted = append(wanted, dir)
	}
	for _, dir := range wanted {
		if slices.Contains(watched, dir) {
			continue
		}
		if err := w.fs.Add(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fresh, fmt.Errorf("watch %s: %w", dir, err)
		}
		fresh = true
	}
	for _, dir := range watched {
		if !slices.Contains(wanted, dir) {
			// The kernel may have ended the watch already, with the directory.
			if err := w.fs.Remove(dir); err != nil && !errors.Is(err, fsnotify.ErrNonExistentWatch) && !errors.Is(err, unix.EINVAL) {
				return fresh, fmt.Errorf("stop watching %s: %w", dir, err)
			}
		}
	}
	return fresh, nil
}

func isDir(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.IsDir()
}

// Run tells of each change until Close; of a queue that ran over as well, with
// an empty name.
func (w *Watcher) Run(changed func(dir string)) {
	for {
		select {
		case event, ok := <-w.fs.Events:
			if !ok {
				return
			}
			if event.Has(fsnotify.Create) || event.Has(fsnotify.Write) || event.Has(fsnotify.Remove) || event.Has(fsnotify.Rename) {
				changed(filepath.Dir(event.Name))
			}
		case _, ok := <-w.fs.Errors:
			if !ok {
				return
			}
			changed("")
		}
	}
}

func (w *Watcher) Close() error { return w.fs.Close() }
