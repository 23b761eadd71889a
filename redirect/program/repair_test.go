// SPDX-License-Identifier: MPL-2.0

package program

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

// Each kind has a sentence of its own, which logs, JSON and people read alike.
func TestRepairReadsAsASentence(t *testing.T) {
	seen := make(map[string]RepairKind)
	for kind := range repairKinds {
		r := Repair{Kind: kind}
		if strings.Contains(kind.text(), "%s") {
			r.Object = "it"
		}
		text := r.String()
		if other, found := seen[text]; found || text == "" || strings.Contains(text, "%") {
			t.Errorf("kind %d reads %q, as kind %d", kind, text, other)
		}
		seen[text] = kind
	}
	r := Repair{ListenerRegistered, "127.0.0.1:15001"}
	const want = "listener 127.0.0.1:15001 registered"
	text, err := json.Marshal([]Repair{r})
	if err != nil || string(text) != `["`+want+`"]` || fmt.Sprintf("%v", r) != want {
		t.Errorf("as JSON %s, %v; as text %v; want %q", text, err, r, want)
	}
}
