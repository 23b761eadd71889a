// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/hashicorp/consul/api"
	"github.com/weirmesh/weir/agent/wait"
)

// How soon another token is taken up, and one that Consul revoked is told: a
// blocking query that is under way does not end for it.
const (
	tokenFileInterval = time.Second
	tokenInterval     = 4 * time.Second
)

// Token is that of every request.
func (c *Client) Token() (string, error) {
	if c.Config.TokenFile == "" {
		return c.Config.Token, nil
	}
	data, err := os.ReadFile(c.Config.TokenFile)
	if err != nil {
		return "", fmt.Errorf("read Consul token: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

// Revoked reports whether Consul does not know the token any more. Without ACLs,
// or an answer, nothing is known.
func (c *Client) Revoked(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, c.Read)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return false
	}
	var ignored struct{}
	_, err = c.Client.Raw().Query("/v1/acl/token/self", &ignored, options)
	var status api.StatusError
	return errors.As(err, &status) && status.Code == http.StatusForbidden
}

// watchToken has Consul read as soon as the token is another one, or none that
// Consul knows, until ctx ends.
func (f *Watcher) watchToken(ctx context.Context) {
	before, _ := f.Client.Token()
	revoked, asked := false, time.Now()
	for {
		if _, alive := wait.Pause(ctx, tokenFileInterval, nil); !alive {
			return
		}
		token, _ := f.Client.Token() // what cannot be read is the read's to tell
		turned := token != before
		if turned {
			before, revoked = token, false
		}
		if token != "" && (turned || time.Since(asked) > tokenInterval) {
			gone := f.Client.Revoked(ctx)
			turned = turned || gone && !revoked
			revoked, asked = gone, time.Now()
		}
		if turned {
			select {
			case f.renewed <- struct{}{}:
			default:
			}
		}
	}
}
