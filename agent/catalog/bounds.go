// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"

	"github.com/weirmesh/weir/agent/bounded"
)

// Headers are what the library does not hand on of an answer without the
// usual ones.
type Headers struct {
	Filtered bool
	policy   string // on what no rule of a token names
	Date     string // of the answer, by Consul's clock
	index    string // of the answer, as it came

	whole bool   // the answer is wanted as it came, and is not handed on
	size  int    // ... which is about what it has
	body  []byte // ... and this is it
}

// HidesFromAnonymous reports whether an answer with nothing in it may only look so:
// Consul tells no anonymous token that it left something out.
func (h *Headers) HidesFromAnonymous(token string, found int) bool {
	return token == "" && h.policy == "deny" && found == 0
}

type headersKey struct{}

func (h *Headers) Watch(ctx context.Context) context.Context {
	return context.WithValue(ctx, headersKey{}, h)
}

// boundedTransport ends an answer that is longer than any that is right.
type boundedTransport struct{ next http.RoundTripper }

// RoundTrip is that of http.RoundTripper.
func (b *boundedTransport) RoundTrip(request *http.Request) (*http.Response, error) {
	response, err := b.next.RoundTrip(request)
	if err != nil {
		return nil, err
	}
	seen, _ := request.Context().Value(headersKey{}).(*Headers)
	if seen != nil {
		seen.Filtered = response.Header.Get("X-Consul-Results-Filtered-By-ACLs") == "true"
		seen.index = response.Header.Get("X-Consul-Index")
		seen.Date = response.Header.Get("Date")
		seen.policy = response.Header.Get("X-Consul-Default-Acl-Policy")
	}
	response.Body = &bounded.Reader{From: response.Body, Limit: answerLimit}
	if seen == nil || !seen.whole || response.StatusCode != http.StatusOK {
		return response, nil
	}
	// The library would look through all of it twice, and copy it as often, before
	// anybody knows whether it is another one than before.
	seen.body, err = bounded.ReadAll(response.Body, seen.size, answerLimit)
	if err := errors.Join(err, response.Body.Close()); err != nil {
		return nil, err
	}
	response.Body = io.NopCloser(strings.NewReader("null"))
	return response, nil
}
