// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	spdx "github.com/spdx/tools-golang/json"
	"github.com/weirmesh/weir/test"
)

// packageIsDebians has nothing that Debian calls an error, but that programs are static:
// they run on any node, whatever libraries it has.
func packageIsDebians(t *testing.T, deb string) {
	test.Need(t, test.Tool("lintian"))
	out, err := exec.Command("lintian", "--fail-on", "error", "--suppress-tags", "statically-linked-binary", deb).CombinedOutput()
	if err != nil || strings.Contains(string(out), "E: ") {
		t.Errorf("lintian: %v\n%s", err, out)
	}
}

// packageSBOM finds each module that the programs tell of, with its version, and the
// programs by their digests.
func packageSBOM(t *testing.T, m made, bin string) {
	file, err := os.Open(m.sbom)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	doc, err := spdx.Read(file)
	if err != nil {
		t.Fatalf("read %s: %v", m.sbom, err)
	}
	got, want := make(map[string]string), map[string]string{"weir": "1.2.3-dev"}
	for _, p := range doc.Packages {
		got[p.PackageName] = p.PackageVersion
	}
	for line := range strings.Lines(output(t, "go", "version", "-m", bin+"/weir", bin+"/weir-cni")) {
		if fields := strings.Fields(line); fields[0] == "dep" {
			want[fields[1]] = fields[2]
		}
	}
	want["std"] = strings.TrimPrefix(strings.TrimSpace(output(t, "go", "env", "GOVERSION")), "go")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("packages (-want +got):\n%s", diff)
	}
	for _, program := range doc.Files {
		if digest := fileDigest(t, bin+"/"+filepath.Base(program.FileName)); len(program.Checksums) != 1 || program.Checksums[0].Value != digest {
			t.Errorf("%s has %+v, want %s", program.FileName, program.Checksums, digest)
		}
	}
	if len(doc.Files) != 2 {
		t.Errorf("%d files, want both programs", len(doc.Files))
	}
	if packed := "usr/share/doc/weir/" + filepath.Base(m.sbom); readDeb(t, m.deb)[packed].Content != fileDigest(t, m.sbom) {
		t.Errorf("the deb has another %s", packed)
	}
}
