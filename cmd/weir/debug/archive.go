// SPDX-License-Identifier: MPL-2.0

// Package debug makes an archive for whoever is to help with a node, without what is
// nobody else's.
package debug

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"time"
)

// Archive is a tar.gz with one directory.
type Archive struct {
	pack    *gzip.Writer
	tar     *tar.Writer
	dir     string
	at      time.Time
	secrets *Secrets
}

// NewArchive begins an archive. None of the secrets gets into it.
func NewArchive(out io.Writer, dir string, at time.Time, secrets *Secrets) *Archive {
	pack := gzip.NewWriter(out)
	return &Archive{pack: pack, tar: tar.NewWriter(pack), dir: plain(dir), at: at, secrets: secrets}
}

// Add puts a file into the archive.
func (a *Archive) Add(name, content string) error {
	text := a.secrets.Remove(content)
	header := &tar.Header{
		Typeflag: tar.TypeReg, Name: path.Join(a.dir, plain(a.secrets.Remove(name))), Size: int64(len(text)), Mode: 0o600, ModTime: a.at, Format: tar.FormatPAX,
	}
	if err := a.tar.WriteHeader(header); err != nil {
		return fmt.Errorf("add %s: %w", name, err)
	}
	if _, err := io.WriteString(a.tar, text); err != nil {
		return fmt.Errorf("add %s: %w", name, err)
	}
	return nil
}

// Close ends the archive; what it is written to is the caller's to close.
func (a *Archive) Close() error { return errors.Join(a.tar.Close(), a.pack.Close()) }

// plain keeps a name within the archive: an ID in it may be anybody's.
func plain(name string) string {
	clean := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./", r) {
			return r
		}
		return '_'
	}, name)
	return strings.TrimPrefix(path.Clean("/"+clean), "/")
}
