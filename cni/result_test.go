// SPDX-License-Identifier: MPL-2.0

package cni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// results are the same result in every version that a runtime may hand over.
func results() map[string]string {
	old := `{"cniVersion":%q,"interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"version":"4","interface":0,"address":"172.26.64.2/20","gateway":"172.26.64.1"},{"version":"6","interface":0,"address":"fd00::2/64"}],"routes":[{"dst":"0.0.0.0/0"}],"dns":{}}`
	current := `{"cniVersion":%q,"interfaces":[{"name":"eth0","sandbox":"/x"}],"ips":[{"interface":0,"address":"172.26.64.2/20","gateway":"172.26.64.1"},{"interface":0,"address":"fd00::2/64"}],"routes":[{"dst":"0.0.0.0/0"}]}`
	return map[string]string{
		"0.3.1": fmt.Sprintf(old, "0.3.1"), "0.4.0": fmt.Sprintf(old, "0.4.0"),
		"1.0.0": fmt.Sprintf(current, "1.0.0"), "1.1.0": fmt.Sprintf(current, "1.1.0"),
	}
}

func TestResultInEveryVersion(t *testing.T) {
	for from, text := range results() {
		for to, want := range results() {
			t.Run(from+" to "+to, func(t *testing.T) {
				parsed, err := parseResult(json.RawMessage(text), to)
				if err != nil {
					t.Fatal(err)
				}
				addrs, err := parsed.addresses()
				if err != nil {
					t.Fatal(err)
				}
				if !slices.Equal(addrs, []netip.Addr{netip.MustParseAddr("172.26.64.2"), netip.MustParseAddr("fd00::2")}) {
					t.Errorf("addresses %v", addrs)
				}
				var out bytes.Buffer
				if err := parsed.print(&out); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(decoded(t, []byte(want)), decoded(t, out.Bytes())); diff != "" {
					t.Errorf("printed (-want +got):\n%s", diff)
				}
			})
		}
	}
}

func TestResultKeepsWhatItDoesNotKnow(t *testing.T) {
	text := `{"cniVersion":"1.1.0", "ips":[{"address":"172.26.64.2/20","metric":12345678901234567890}],"later":true}`
	parsed, err := parseResult(json.RawMessage(text), "1.1.0")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := parsed.print(&out); err != nil {
		t.Fatal(err)
	}
	if out.String() != text+"\n" {
		t.Errorf("printed %s: want %s", out.String(), text)
	}
}

func TestResultWithoutAVersionHasTheConfigurations(t *testing.T) {
	for version := range results() {
		parsed, err := parseResult(json.RawMessage(`{"ips":[{"version":"4","address":"172.26.64.2/20"}]}`), version)
		if err != nil {
			t.Fatal(err)
		}
		var out bytes.Buffer
		if err := parsed.print(&out); err != nil {
			t.Fatal(err)
		}
		if got := decoded(t, out.Bytes()).(map[string]any)["cniVersion"]; got != version {
			t.Errorf("printed version %v: want %s", got, version)
		}
	}
}
