// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Nomad splits a plugin's output at blanks and takes the first word that reads
// as a version; "2" does.
func TestVersionLineAsNomadReadsIt(t *testing.T) {
	semver := regexp.MustCompile(`^v?([0-9]+)(?:\.([0-9]+))?(?:\.([0-9]+))?(?:-[0-9A-Za-z.-]+)?(?:\+[0-9A-Za-z.-]+)?$`)
	for _, tt := range []struct {
		name, module string
		want         []int
	}{
		{"consul-cni", "v0.2.7", []int{1, 9, 4}},
		{"consul-cni", "(devel)", []int{1, 9, 4}},
		{"weir", "v0.2.7", []int{0, 2, 7}},
		{"weir-cni", "v0.0.0-20261123160526-fe4db4f00000+dirty", []int{0, 0, 0}},
		{"weir", "(devel)", []int{0, 0, 0}},
		{"weir", "", []int{0, 0, 0}},
	} {
		line := VersionLine(tt.name, tt.module)
		words := strings.Fields(line)
		first := slices.IndexFunc(words, semver.MatchString)
		if first < 0 {
			t.Errorf("%q: no version", line)
			continue
		}
		var got []int
		for _, part := range semver.FindStringSubmatch(words[first])[1:] {
			n, err := strconv.Atoi(part)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, n)
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%q: version %v: want %v", line, got, tt.want)
		}
		if tt.name == ConsulName && slices.Compare(got, []int{1, 4, 2}) < 0 {
			t.Errorf("%q: Nomad wants 1.4.2 or newer", line)
		}
	}
}

func TestVersions(t *testing.T) {
	want := []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"}
	if diff := cmp.Diff(want, Versions().SupportedVersions()); diff != "" {
		t.Errorf("versions (-want +got):\n%s", diff)
	}
}
