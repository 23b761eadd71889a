// SPDX-License-Identifier: MPL-2.0

// Command sbom writes what programs are made of, as SPDX in JSON, on standard output.
//
//	sbom VERSION PROGRAM...
package main

import (
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	spdxjson "github.com/spdx/tools-golang/json"
	"github.com/spdx/tools-golang/spdx/v2/common"
	"github.com/spdx/tools-golang/spdx/v2/v2_3"
)

const noAssertion = "NOASSERTION"

func main() {
	if len(os.Args) < 3 {
		fmt.Fprintln(os.Stderr, "usage: sbom VERSION PROGRAM...")
		os.Exit(2)
	}
	if err := writeSBOM(os.Stdout, os.Args[1], os.Args[2:]); err != nil {
		fmt.Fprintln(os.Stderr, "sbom:", err)
		os.Exit(1)
	}
}

// writeSBOM tells what programs are made of, by what each says of itself.
func writeSBOM(out io.Writer, version string, programs []string) error {
	created, err := sourceDate()
	if err != nil {
		return err
	}
	doc := &v2_3.Document{
		SPDXVersion: v2_3.Version, DataLicense: v2_3.DataLicense, SPDXIdentifier: "DOCUMENT",
		CreationInfo: &v2_3.CreationInfo{
			Created:  created.UTC().Format(time.RFC3339),
			Creators: []common.Creator{{CreatorType: "Organization", Creator: "The Weir authors"}, {CreatorType: "Tool", Creator: "weir-sbom"}},
		},
	}
	weir := &v2_3.Package{
		PackageName: "weir", PackageSPDXIdentifier: "Package-weir", PackageVersion: version, PackageDownloadLocation: "https://github.com/weirmesh/weir",
		PackageLicenseConcluded: "MPL-2.0", PackageLicenseDeclared: "MPL-2.0", PackageCopyrightText: "Copyright: 2026 The Weir authors", PrimaryPackagePurpose: "APPLICATION",
	}
	doc.Packages = append(doc.Packages, weir)
	doc.Relationships = append(doc.Relationships, relation("DOCUMENT", "DESCRIBES", "Package-weir"))
	sums, platform := "", ""
	for _, program := range programs {
		content, err := os.ReadFile(program)
		if err != nil {
			return fmt.Errorf("read program: %w", err)
		}
		info, err := buildinfo.ReadFile(program)
		if err != nil {
			return fmt.Errorf("read what %s is made of: %w", program, err)
		}
		sum := sha256.Sum256(content)
		sums += hex.EncodeToString(sum[:])
		addProgram(doc, filepath.Base(program), hex.EncodeToString(sum[:]), info)
		for _, setting := range info.Settings {
			if setting.Key == "GOARCH" {
				platform = "linux-" + setting.Value
			}
		}
	}
	doc.DocumentName = "weir-" + version + "-" + platform
	id := sha256.Sum256([]byte(sums))
	doc.DocumentNamespace = "https://github.com/weirmesh/weir/spdx/" + doc.DocumentName + "-" + hex.EncodeToString(id[:8])
	if err := spdxjson.Write(doc, out, spdxjson.Indent(" ")); err != nil {
		return fmt.Errorf("write SBOM: %w", err)
	}
	return nil
}

// addProgram adds a program, and what it is linked with.
func addProgram(doc *v2_3.Document, name, sum string, info *buildinfo.BuildInfo) {
	file := &v2_3.File{
		FileName: "./" + name, FileSPDXIdentifier: identifier("File", name), FileTypes: []string{"BINARY"},
		Checksums:        []common.Checksum{{Algorithm: common.SHA256, Value: sum}},
		LicenseConcluded: noAssertion, FileCopyrightText: noAssertion,
	}
	doc.Files = append(doc.Files, file)
	doc.Relationships = append(doc.Relationships, relation("Package-weir", "CONTAINS", file.FileSPDXIdentifier))
	used := map[string]string{"std": strings.TrimPrefix(info.GoVersion, "go")}
	for _, module := range info.Deps {
		if module.Replace != nil {
			module = module.Replace
		}
		used[module.Path] = module.Version
	}
	for _, path := range slices.Sorted(maps.Keys(used)) {
		module := modulePackage(path, used[path])
		if !slices.ContainsFunc(doc.Packages, func(p *v2_3.Package) bool { return p.PackageName == path }) {
			doc.Packages = append(doc.Packages, module)
			doc.Relationships = append(doc.Relationships, relation("Package-weir", "DEPENDS_ON", module.PackageSPDXIdentifier))
		}
		doc.Relationships = append(doc.Relationships, relation(file.FileSPDXIdentifier, "STATIC_LINK", module.PackageSPDXIdentifier))
	}
}

// modulePackage is a module of Go, the standard library too.
func modulePackage(path, version string) *v2_3.Package {
	location := "https://" + path
	if path == "std" {
		location = "https://go.dev/dl"
	}
	return &v2_3.Package{
		PackageName: path, PackageSPDXIdentifier: identifier("Module", path), PackageVersion: version, PackageDownloadLocation: location,
		PackageLicenseConcluded: noAssertion, PackageLicenseDeclared: noAssertion, PackageCopyrightText: noAssertion, PrimaryPackagePurpose: "LIBRARY",
		PackageExternalReferences: []*v2_3.PackageExternalReference{{
			Category: common.CategoryPackageManager, RefType: common.TypePackageManagerPURL, Locator: "pkg:golang/" + strings.ToLower(path) + "@" + strings.ReplaceAll(version, "+", "%2B"),
		}},
	}
}

func relation(from common.ElementID, how string, to common.ElementID) *v2_3.Relationship {
	return &v2_3.Relationship{RefA: common.DocElementID{ElementRefID: from}, Relationship: how, RefB: common.DocElementID{ElementRefID: to}}
}

// identifier is a name as SPDX lets one be.
func identifier(kind, name string) common.ElementID {
	return common.ElementID(kind + "-" + regexp.MustCompile(`[^A-Za-z0-9.-]`).ReplaceAllString(name, "-"))
}

// sourceDate is that of reproducible builds.
func sourceDate() (time.Time, error) {
	text := os.Getenv("SOURCE_DATE_EPOCH")
	if text == "" {
		return time.Now(), nil
	}
	seconds, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("read SOURCE_DATE_EPOCH: %w", err)
	}
	return time.Unix(seconds, 0), nil
}
