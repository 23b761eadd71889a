// SPDX-License-Identifier: MPL-2.0

package deploy

import (
	"testing"

	"github.com/weirmesh/weir/test"
)

func TestMain(m *testing.M) { test.Main(m, nil) }
