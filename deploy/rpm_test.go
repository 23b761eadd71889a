// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/cavaliergopher/cpio"
	"github.com/google/go-cmp/cmp"
)

// Tags of an rpm's header, from rpm's own rpmtag.h.
const (
	rpmVersion   = 1001
	rpmArch      = 1022
	rpmPostIn    = 1024
	rpmPreUn     = 1025
	rpmFlags     = 1037
	rpmDirIndex  = 1116
	rpmBaseNames = 1117
	rpmDirNames  = 1118
)

// rpm is what a package for rpm has.
type rpm struct {
	header  map[uint32][]byte // per tag, to the end of the store
	payload map[string]entry
}

// entry is a file as a package has it.
type entry struct {
	Mode    string
	Content string // digest of it, or where a link leads
}

func (r rpm) string(tag uint32) string {
	value, _, _ := bytes.Cut(r.header[tag], []byte{0})
	return string(value)
}

// configs lists the files that rpm keeps where an operator changed them.
func (r rpm) configs() []string {
	const config, noreplace = 1, 16
	var kept []string
	names := bytes.Split(r.header[rpmBaseNames], []byte{0})
	dirs := bytes.Split(r.header[rpmDirNames], []byte{0})
	for i := range len(r.payload) {
		if binary.BigEndian.Uint32(r.header[rpmFlags][4*i:])&(config|noreplace) == config|noreplace {
			kept = append(kept, string(dirs[binary.BigEndian.Uint32(r.header[rpmDirIndex][4*i:])])+string(names[i]))
		}
	}
	return kept
}

// rpmHeader reads a header: an introduction of 16 bytes, an index, the store.
func rpmHeader(t *testing.T, from io.Reader) (tags map[uint32][]byte, size int) {
	t.Helper()
	intro := make([]byte, 16)
	if _, err := io.ReadFull(from, intro); err != nil || !bytes.HasPrefix(intro, []byte{0x8e, 0xad, 0xe8, 1}) {
		t.Fatalf("not the header of an rpm: %x, %v", intro, err)
	}
	entries, store := int(binary.BigEndian.Uint32(intro[8:])), int(binary.BigEndian.Uint32(intro[12:]))
	rest := make([]byte, 16*entries+store)
	if _, err := io.ReadFull(from, rest); err != nil {
		t.Fatal(err)
	}
	tags = make(map[uint32][]byte)
	for i := range entries {
		index := rest[16*i:]
		tags[binary.BigEndian.Uint32(index)] = rest[16*entries+int(binary.BigEndian.Uint32(index[8:])):]
	}
	return tags, 16 + len(rest)
}

func readRPM(t *testing.T, path string) rpm {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	from := bytes.NewReader(content[96:])              // after the lead
	_, size := rpmHeader(t, from)                      // signatures
	_, err = from.Seek(int64(-size&7), io.SeekCurrent) // up to a multiple of 8
	if err != nil {
		t.Fatal(err)
	}
	r := rpm{payload: make(map[string]entry)}
	r.header, _ = rpmHeader(t, from)
	unzipped, err := gzip.NewReader(from)
	if err != nil {
		t.Fatal(err)
	}
	archive := cpio.NewReader(unzipped)
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return r
		}
		if err != nil {
			t.Fatal(err)
		}
		r.payload[strings.Trim(header.Name, "./")] = entry{header.FileInfo().Mode().String(), digest(t, archive, header.Linkname)}
	}
}

// readDeb is what dpkg unpacks.
func readDeb(t *testing.T, path string) map[string]entry {
	t.Helper()
	content, err := exec.Command("dpkg-deb", "--fsys-tarfile", path).Output()
	if err != nil {
		t.Fatal(err)
	}
	return readTar(t, content)
}

func readTar(t *testing.T, content []byte) map[string]entry {
	t.Helper()
	entries := make(map[string]entry)
	archive := tar.NewReader(bytes.NewReader(content))
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return entries
		}
		if err != nil {
			t.Fatal(err)
		}
		entries[strings.Trim(header.Name, "./")] = entry{header.FileInfo().Mode().String(), digest(t, archive, header.Linkname)}
	}
}

func fileDigest(t *testing.T, path string) string {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	return digest(t, file, "")
}

func digest(t *testing.T, from io.Reader, link string) string {
	t.Helper()
	if link != "" {
		return "link to " + link
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, from); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", hash.Sum(nil))
}

// rpmIsTheDeb finds the same in both packages, but for directories that on a node with
// rpm belong to the system: a package that claims one with another mode is refused.
func rpmIsTheDeb(t *testing.T, path, deb, arch string) {
	got, want := readRPM(t, path), readDeb(t, deb)
	for name, e := range want {
		if strings.HasPrefix(e.Mode, "d") && !strings.Contains("/"+name+"/", "/weir/") &&
			name != "etc/weir.d" && name != "usr/share/zsh/vendor-completions" { // which no system with rpm has
			delete(want, name)
		}
	}
	if len(want) < 20 {
		t.Fatalf("the deb has %d files only: %v", len(want), want)
	}
	if diff := cmp.Diff(want, got.payload); diff != "" {
		t.Errorf("the rpm (+) has not what the deb (-) has:\n%s", diff)
	}
	if diff := cmp.Diff([]string{"/etc/weir.d/weir.hcl"}, got.configs()); diff != "" {
		t.Errorf("files that an upgrade keeps as they are (-want +got):\n%s", diff)
	}
	for tag, want := range map[uint32]string{rpmVersion: "1.2.3~dev", rpmArch: arch} {
		if got.string(tag) != want {
			t.Errorf("tag %d of the rpm is %q: want %q", tag, got.string(tag), want)
		}
	}
	for tag, script := range map[uint32]string{rpmPostIn: "postinst.sh", rpmPreUn: "prerm.sh"} {
		text, err := os.ReadFile(script)
		if err != nil {
			t.Fatal(err)
		}
		if strings.TrimSpace(got.string(tag)) != strings.TrimSpace(string(text)) {
			t.Errorf("tag %d of the rpm is not %s:\n%s", tag, script, got.string(tag))
		}
	}
}
