// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bufio"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// cpio writes an initramfs in the "newc" form. Directories appear before what is in them; a path
// written twice keeps the first.
type cpio struct {
	out   *bufio.Writer
	seen  map[string]bool
	inode uint32
	err   error
}

func newCpio(w io.Writer) *cpio {
	c := &cpio{out: bufio.NewWriterSize(w, 1<<20), seen: map[string]bool{}}
	c.entry(".", 0o040755, nil) // a root of any other mode locks out every user but root
	return c
}

func (c *cpio) entry(name string, mode uint32, data []byte) {
	name = strings.TrimPrefix(path.Clean(name), "/")
	if c.seen[name] || c.err != nil {
		return
	}
	c.seen[name] = true
	if dir := path.Dir(name); dir != name {
		c.entry(dir, 0o040755, nil)
	}
	c.inode++
	links := 1
	if mode&0o170000 == 0o040000 {
		links = 2
	}
	c.write(fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		c.inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(name)+1, 0))
	c.write(append([]byte(name), 0))
	c.pad(110 + len(name) + 1)
	c.write(data)
	c.pad(len(data))
}

func (c *cpio) write(data []byte) {
	if c.err == nil {
		_, c.err = c.out.Write(data)
	}
}

func (c *cpio) pad(n int) { c.write(make([]byte, (4-n%4)%4)) }

func (c *cpio) dir(name string, mode uint32)     { c.entry(name, 0o040000|mode, nil) }
func (c *cpio) symlink(name, target string)      { c.entry(name, 0o120777, []byte(target)) }
func (c *cpio) data(name string, b []byte)       { c.entry(name, 0o100644, b) }
func (c *cpio) executable(name string, b []byte) { c.entry(name, 0o100755, b) }

// tree adds what is below dir, as far as keep says, under the path below prefix.
func (c *cpio) tree(dir, prefix string, keep func(rel string) bool) error {
	return filepath.WalkDir(dir, func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		if rel != "." && !keep(rel) {
			if entry.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		return c.copy(path.Join(prefix, filepath.ToSlash(rel)), file, entry)
	})
}

// copy adds one directory, link or regular file under the name; what else there is it leaves out.
func (c *cpio) copy(name, file string, entry fs.DirEntry) error {
	switch {
	case entry.IsDir():
		c.dir(name, 0o755)
	case entry.Type()&fs.ModeSymlink != 0:
		target, err := os.Readlink(file)
		if err != nil {
			return err
		}
		c.symlink(name, target)
	case entry.Type().IsRegular():
		info, err := entry.Info()
		if err != nil {
			return err
		}
		data, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		c.entry(name, 0o100000|uint32(info.Mode().Perm()), data)
	}
	return c.err
}

func (c *cpio) close() error {
	c.entry("TRAILER!!!", 0, nil)
	if c.err != nil {
		return c.err
	}
	return c.out.Flush()
}
