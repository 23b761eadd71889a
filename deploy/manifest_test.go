// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"os"
	"path/filepath"
	"testing"
)

func TestReplaceFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(path, []byte("new"), 0o755); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if content, err := os.ReadFile(path); err != nil || string(content) != "new" || info.Mode() != 0o755 {
		t.Errorf("file = %q, %s, %v; want the new one, 0755", content, info.Mode(), err)
	}
	occupied := filepath.Join(dir, "directory")
	if err := os.Mkdir(occupied, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := replaceFile(occupied, []byte("new"), 0o644); err == nil {
		t.Error("a directory was replaced")
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("entries = %v, %v; want the file and the directory, nothing temporary", entries, err)
	}
}
