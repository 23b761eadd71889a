// SPDX-License-Identifier: MPL-2.0

package request

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Names and what applies them stand in two lists, and no name is without the other.
func TestEveryJobArgumentIsApplied(t *testing.T) {
	var applied []string
	for _, arg := range jobArgs() {
		applied = append(applied, arg.name)
	}
	if diff := cmp.Diff(JobArgs(), applied); diff != "" {
		t.Errorf("arguments (-named +applied):\n%s", diff)
	}
}
