// SPDX-License-Identifier: MPL-2.0

package discover

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
)

const (
	fuzzedAlloc     = "8fd4a55e-5c4e-4d2b-9b5e-0f6c1f1d7a10"
	fuzzedContainer = "abababababababababababababababababababababababababababababababab"
)

// oneContainer lists the pause container of an allocation, and answers anything else by
// the body that is fuzzed.
type oneContainer []byte

func (b oneContainer) RoundTrip(request *http.Request) (*http.Response, error) {
	body := []byte(b)
	if request.URL.Path == "/containers/json" {
		body = fmt.Appendf(nil, `[{"Id":%q,"Names":["/%s%s"],"State":"running","Labels":{%q:%q}}]`, fuzzedContainer, PausePrefix, fuzzedAlloc, AllocLabel, fuzzedAlloc)
	}
	return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(bytes.NewReader(body))}, nil
}

// FuzzDockerInspect holds what Docker says of a container: it is refused by the question
// that was asked, or its namespace is none or an absolute path.
func FuzzDockerInspect(f *testing.F) {
	for _, seed := range []string{
		"", "{}", "null", "[]", `{"NetworkSettings":{"SandboxKey":"/var/run/docker/netns/1234"}}`, `{"NetworkSettings":{"SandboxKey":7}}`,
		`{"NetworkSettings":null}`, `{"NetworkSettings":{"SandboxKey":"relative"}}`, `{"NetworkSettings":{"SandboxKey":"/a\u0000b"}} trailing`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		d := NewDocker("", func() {})
		d.Client = &http.Client{Transport: oneContainer(body)}
		if err := d.read(t.Context()); err != nil {
			if !strings.Contains(err.Error(), "/containers/"+fuzzedContainer+"/json") {
				t.Errorf("%q: the error does not say who was asked what: %v", body, err)
			}
			return
		}
		if netns, found := d.Current().NetNS[fuzzedAlloc]; found && !filepath.IsAbs(netns) {
			t.Errorf("%q: namespace %q", body, netns)
		}
	})
}

// FuzzDockerEvents holds the stream of Docker's events, in which names and labels of
// tasks stand: it ends with an error that says what was read, and hands on no more than
// one container for each line.
func FuzzDockerEvents(f *testing.F) {
	for _, seed := range []string{
		"", "\n\n", `{"Actor":{"ID":"` + fuzzedContainer + `"}}` + "\n", `{"Actor":{"ID":7}}`, `{"Actor":null}` + "\n" + `{}`, "[]\n", "{\"Actor\":{\"ID\":\"a\"}}\r\n{",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		lines := bytes.Count(stream, []byte("\n")) + 1
		events := make(chan string, lines)
		err := readEvents(t.Context(), bytes.NewReader(stream), events)
		if err == nil || !strings.Contains(err.Error(), "follow Docker") {
			t.Errorf("%q: the stream ended with %v", stream, err)
		}
		if len(events) > lines {
			t.Errorf("%q: %d events of %d lines", stream, len(events), lines)
		}
	})
}
