// SPDX-License-Identifier: MPL-2.0

package debug

import (
	"encoding/base64"
	"encoding/json"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/weirmesh/weir/agent/configfile"
)

// Removed stands where a secret stood.
const Removed = "[removed]"

// Secrets are texts that must not leave the node.
type Secrets struct {
	texts []string // the longest first: one may be a part of another
}

// least is how long a text is at least that counts as a secret: what is shorter protects
// nothing, and is a part of much else.
const least = 4

// Keep adds a secret, in all forms in which it may be written.
func (s *Secrets) Keep(secret string) {
	secret = strings.TrimSpace(secret)
	if len(secret) < least {
		return
	}
	quoted, err := json.Marshal(secret)
	if err != nil {
		quoted = []byte(strconv.Quote(secret))
	}
	encoded := base64.StdEncoding.EncodeToString([]byte(secret))
	for _, text := range []string{
		secret, string(quoted[1 : len(quoted)-1]), strings.Trim(strconv.Quote(secret), `"`), url.QueryEscape(secret), url.PathEscape(secret), encoded,
		strings.TrimRight(encoded, "="), base64.URLEncoding.EncodeToString([]byte(secret)),
	} {
		if !slices.Contains(s.texts, text) {
			s.texts = append(s.texts, text)
		}
	}
	slices.SortStableFunc(s.texts, func(a, b string) int { return len(b) - len(a) })
}

// Remove takes the secrets out of a text.
func (s *Secrets) Remove(text string) string {
	for _, secret := range s.texts {
		text = strings.ReplaceAll(text, secret, Removed)
	}
	return text
}

// Config keeps what is secret of a configuration.
func (s *Secrets) Config(config configfile.Config) {
	s.Keep(config.Consul.Token)
	if config.Consul.TokenFile != "" {
		if token, err := os.ReadFile(config.Consul.TokenFile); err == nil {
			s.Keep(string(token))
		}
	}
	_, rest, found := strings.Cut(config.Consul.Address, "://")
	if !found {
		rest = config.Consul.Address
	}
	if user, _, found := strings.Cut(rest, "@"); found {
		s.Keep(user)
		if _, password, found := strings.Cut(user, ":"); found {
			s.Keep(password)
		}
	}
}

// Files keeps the tokens that stand in configuration files, those that are commented
// out or do not parse too.
func (s *Secrets) Files(where string) {
	paths := []string{where}
	if info, err := os.Stat(where); err == nil && info.IsDir() {
		paths, _ = filepath.Glob(filepath.Join(where, "*")) // copies of editors too
	}
	token := regexp.MustCompile(`(?i)\b\w*(?:token|secret|password)"?\s*[=:]\s*"([^"]*)"`)
	for _, file := range paths {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		for _, found := range token.FindAllStringSubmatch(string(text), -1) {
			s.Keep(found[1])
		}
	}
}

// Environment keeps the values of variables whose names say that they are secret.
func (s *Secrets) Environment(variables []string) {
	secret := regexp.MustCompile(`(?i)token|secret|passw|credential|auth$|private|api_?key`)
	for _, variable := range variables {
		name, value, _ := strings.Cut(variable, "=")
		if !secret.MatchString(name) {
			continue
		}
		s.Keep(value)
		if _, password, found := strings.Cut(value, ":"); found { // as CONSUL_HTTP_AUTH
			s.Keep(password)
		}
	}
}
