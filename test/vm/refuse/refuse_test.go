// SPDX-License-Identifier: MPL-2.0

//go:build refuse

package refuse_test

import (
	"os"
	"strings"
	"testing"
)

func TestKernelIsOld(t *testing.T) {
	text, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(text), "5.") {
		t.Errorf("kernel is %s, want one that Weir refuses", text)
	}
}
