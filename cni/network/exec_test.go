// SPDX-License-Identifier: MPL-2.0

package network

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/weirmesh/weir/cni/network/attachment"
	"github.com/weirmesh/weir/cni/network/delegate"
	"github.com/weirmesh/weir/redirect/workload"
	"github.com/weirmesh/weir/test"

	current "github.com/containernetworking/cni/pkg/types/100"
)

// script is another plugin, as a shell script in a CNI_PATH of its own.
func script(t *testing.T, body string) *attachment.Record {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "script"), []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return &attachment.Record{Attachment: attachment.Attachment{
		Key: workload.AttachmentID{ContainerID: "alloc", IfName: "eth7"}, NetNS: "/run/netns/alloc", Path: "/nowhere:" + dir,
		Args: "NOMAD_ALLOC_ID=alloc;CONSUL_IPTABLES_CONFIG={}",
	}}
}

func TestPluginGetsItsRequest(t *testing.T) {
	t.Setenv("CNI_COMMAND", "GC")
	t.Setenv("CNI_ARGS", "of=another")
	r := script(t, `[ "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME $CNI_NETNS" = "DEL alloc eth7 /run/netns/alloc" ] || exit 3
[ "$CNI_ARGS" = "IgnoreUnknown=true;NOMAD_ALLOC_ID=alloc" ] || exit 4
[ "$CNI_PATH" = "`+"$(dirname $0 | sed s,^,/nowhere:,)"+`" ] || exit 5
[ "$(cat)" = '{"name":"weir"}' ] || exit 6`)
	if _, err := delegate.Call(t.Context(), r, "DEL", "script", []byte(`{"name":"weir"}`)); err != nil {
		t.Error(err)
	}
}

func TestPluginsResult(t *testing.T) {
	const config = `{"cniVersion":"0.4.0","name":"weir"}`
	for name, tt := range map[string]struct{ prints, part string }{
		"of another version":       {`{"cniVersion":"1.0.0","ips":[{"address":"10.0.0.2/24"}]}`, ""},
		"of an early version":      {`{"cniVersion":"0.2.0","ip4":{"ip":"10.0.0.2/24"}}`, ""},
		"of the request's version": {`{"ips":[{"version":"4","address":"10.0.0.2/24"}]}`, ""},
		"nothing":                  {``, "result"},
		"null":                     {`null`, "there is none"},
		"of no known version":      {`{"cniVersion":"9.0.0"}`, "9.0.0"},
	} {
		t.Run(name, func(t *testing.T) {
			leased, err := delegate.Call(t.Context(), script(t, "cat >/dev/null; echo '"+tt.prints+"'"), "ADD", "script", []byte(config))
			if tt.part != "" {
				if err == nil || !strings.Contains(err.Error(), tt.part) {
					t.Errorf("%v: want %q", err, tt.part)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			result, err := current.NewResultFromResult(leased)
			if err != nil || len(result.IPs) != 1 || result.IPs[0].Address.String() != "10.0.0.2/24" {
				t.Errorf("%v, %v: want 10.0.0.2/24", result, err)
			}
		})
	}
}

func TestPluginsErrorComesThrough(t *testing.T) {
	_, err := delegate.Call(t.Context(), script(t, `echo '{"code":11,"msg":"no room"}'; exit 1`), "ADD", "script", nil)
	var said *types.Error
	if !errors.As(err, &said) || said.Code != 11 || !strings.Contains(err.Error(), "script ADD: no room") {
		t.Errorf("%v: want the plugin's own error", err)
	}
	_, err = delegate.Call(t.Context(), script(t, `echo gone wrong >&2; exit 1`), "ADD", "script", nil)
	if err == nil || !strings.Contains(err.Error(), "gone wrong") {
		t.Errorf("%v: want what it wrote on stderr", err)
	}
}

func TestPluginIsFoundByName(t *testing.T) {
	r := script(t, "exit 0")
	for _, name := range []string{"", "other", "../" + filepath.Base(strings.TrimPrefix(r.Path, "/nowhere:")) + "/script", "."} {
		if program, err := delegate.Find(name, r.Path); !errors.Is(err, attachment.ErrMissing) {
			t.Errorf("%q: found %q, %v: want ErrMissing", name, program, err)
		}
	}
}

// Another plugin that hangs ends with the call that waits for it, and what the call made
// is taken back.
func TestPluginThatHangsEndsWithItsCall(t *testing.T) {
	n := newNode(t)
	dir := t.TempDir()
	body := "#!/bin/sh\n>" + dir + "/$CNI_COMMAND; [ $CNI_COMMAND != ADD ] || exec sleep 1000\n"
	if err := os.WriteFile(filepath.Join(dir, "hangs"), []byte(body), 0o755); err != nil {
		t.Fatal(err)
	}
	n.path = dir + ":" + n.path
	n.ipam(map[string]any{"type": "hangs"})
	a := n.allocation(t, "a")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		n.ns.Do(func() {
			_, _, err := n.network().Until(ctx).Add(a.Attachment)
			done <- err
		})
	}()
	test.Eventually(t, func() error { _, err := os.Stat(filepath.Join(dir, "ADD")); return err }, "the plugin to run")
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "hangs ADD") {
		t.Errorf("error %v: want that of the context, and the plugin's name", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "DEL")); err != nil {
		t.Errorf("its address is not given back: %v", err)
	}
	n.wantNothingLeft(t)
}
