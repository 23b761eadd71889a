// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bytes"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	spdxjson "github.com/spdx/tools-golang/json"
)

// The test's own program is made of modules, too.
func TestSBOM(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	made := func() string {
		var out bytes.Buffer
		if err := writeSBOM(&out, "1.2.3", []string{program}); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	text := made()
	if again := made(); again != text {
		t.Error("the same program gives another SBOM")
	}
	doc, err := spdxjson.Read(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	if doc.CreationInfo.Created != "2023-11-14T22:13:20Z" || doc.DataLicense != "CC0-1.0" || !strings.HasPrefix(doc.DocumentNamespace, "https://github.com/weirmesh/weir/spdx/weir-1.2.3-linux-") {
		t.Errorf("document = %+v, %+v", doc, doc.CreationInfo)
	}
	info, ok := debug.ReadBuildInfo()
	if !ok || len(info.Deps) == 0 {
		t.Fatal("the test does not know what it is made of")
	}
	got, known := make(map[string]string), map[string]bool{"DOCUMENT": true}
	for _, p := range doc.Packages {
		got[p.PackageName], known[string(p.PackageSPDXIdentifier)] = p.PackageVersion, true
		if p.PackageName != "weir" && p.PackageExternalReferences[0].Locator != fmt.Sprintf("pkg:golang/%s@%s", strings.ToLower(p.PackageName), p.PackageVersion) {
			t.Errorf("%s is %s", p.PackageName, p.PackageExternalReferences[0].Locator)
		}
	}
	want := map[string]string{"weir": "1.2.3", "std": strings.TrimPrefix(info.GoVersion, "go")}
	for _, module := range info.Deps {
		want[module.Path] = module.Version
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("packages (-want +got):\n%s", diff)
	}
	known[string(doc.Files[0].FileSPDXIdentifier)] = true
	for _, r := range doc.Relationships {
		if !known[string(r.RefA.ElementRefID)] || !known[string(r.RefB.ElementRefID)] {
			t.Errorf("%+v is of something that is not there", r)
		}
	}
}
