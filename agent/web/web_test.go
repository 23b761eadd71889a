// SPDX-License-Identifier: MPL-2.0

package web

import (
	"encoding/json"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// get is an answer of a page for these clients to a request from that address.
func get(t *testing.T, clients Clients, path, remote, host string, header ...string) *httptest.ResponseRecorder {
	t.Helper()
	mux := http.NewServeMux()
	Register(mux, shopNode(), clients, "worker-12")
	request := httptest.NewRequest(http.MethodGet, path, nil)
	request.RemoteAddr, request.Host = remote, host
	for i := 0; i < len(header); i += 2 {
		request.Header.Set(header[i], header[i+1])
	}
	answer := httptest.NewRecorder()
	mux.ServeHTTP(answer, request)
	return answer
}

func TestWhoMaySeeThePage(t *testing.T) {
	const here, there = "127.0.0.1:40000", "192.0.2.7:40000"
	for _, c := range []struct {
		clients      Clients
		path         string
		remote, host string
		header       []string
		code         int
	}{
		{ClientsOff, "/map/", here, "localhost:9902", nil, 404},
		{ClientsLoopback, "/map/", here, "localhost:9902", nil, 200},
		{ClientsLoopback, "/map", here, "localhost:9902", nil, 302},
		{ClientsLoopback, "/map/graph", "[::1]:40000", "[::1]:9902", nil, 200},
		{ClientsLoopback, "/map/allocations/" + batchID, here, "127.0.0.1:9902", nil, 200},
		{ClientsLoopback, "/map/allocations/none", here, "127.0.0.1:9902", nil, 404},
		{ClientsLoopback, "/map/graph", there, "192.0.2.1:9902", nil, 403},
		{ClientsLoopback, "/map/", there, "localhost:9902", nil, 403},
		{ClientsAny, "/map/graph", there, "192.0.2.1:9902", nil, 200},
		{ClientsAny, "/map/graph", there, "worker-12:9902", nil, 200},
		{ClientsAny, "/map/graph", there, "WORKER-12.dc1.example:9902", nil, 200},
		// A name that somebody else has resolve to this node.
		{ClientsAny, "/map/graph", there, "attacker.example:9902", nil, 421},
		{ClientsLoopback, "/map/graph", here, "attacker.example:9902", nil, 421},
		{ClientsLoopback, "/map/graph", here, "worker-12-attacker.example", nil, 421},
		// Another site in the same browser: a link leads here, and nothing else does.
		{ClientsLoopback, "/map/", here, "localhost:9902", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate"}, 200},
		{ClientsLoopback, "/map/", here, "localhost:9902", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "no-cors"}, 403},
		{ClientsLoopback, "/map/graph", here, "localhost:9902", []string{"Sec-Fetch-Site", "cross-site", "Sec-Fetch-Mode", "navigate"}, 403},
		{ClientsLoopback, "/map/graph", here, "localhost:9902", []string{"Sec-Fetch-Site", "same-origin"}, 200},
		// Files that are not the page's.
		{ClientsLoopback, "/map/web.go", here, "localhost:9902", nil, 404},
		{ClientsLoopback, "/map/%2e%2e/web.go", here, "localhost:9902", nil, 404},
	} {
		if got := get(t, c.clients, c.path, c.remote, c.host, c.header...); got.Code != c.code {
			t.Errorf("%s for %s, from %s as %s %v: %d %s, want %d", c.path, c.clients, c.remote, c.host, c.header, got.Code, got.Body, c.code)
		}
	}
	mux := http.NewServeMux()
	Register(mux, shopNode(), ClientsAny, "")
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodDelete, http.MethodOptions} {
		answer := httptest.NewRecorder()
		mux.ServeHTTP(answer, httptest.NewRequest(method, "/map/graph", nil))
		if answer.Code != http.StatusMethodNotAllowed {
			t.Errorf("%s: %d, want %d", method, answer.Code, http.StatusMethodNotAllowed)
		}
	}
}

// Whatever is answered, refusals too, has the policy, and says what it is.
func TestHeaders(t *testing.T) {
	kinds := map[string]string{
		"/map/": "text/html; charset=utf-8", "/map/map.js": "text/javascript; charset=utf-8", "/map/map.css": "text/css; charset=utf-8",
		"/map/map.svg": "image/svg+xml", "/map/graph": "application/json", "/map/allocations/" + batchID: "application/json",
	}
	for path, kind := range kinds {
		for _, remote := range []string{"127.0.0.1:1", "192.0.2.7:1"} {
			header := get(t, ClientsLoopback, path, remote, "localhost").Header()
			policy := header.Get("Content-Security-Policy")
			for _, want := range []string{"default-src 'none'", "script-src 'self';", "frame-ancestors 'none'", "require-trusted-types-for 'script'"} {
				if !strings.Contains(policy, want) {
					t.Errorf("%s: policy %q has no %q", path, policy, want)
				}
			}
			if strings.Contains(policy, "unsafe") || header.Get("X-Content-Type-Options") != "nosniff" || header.Get("Cache-Control") != "no-store" ||
				header.Get("Access-Control-Allow-Origin") != "" || header.Get("Cross-Origin-Resource-Policy") != "same-origin" {
				t.Errorf("%s: headers %v", path, header)
			}
			if got := header.Get("Content-Type"); remote == "127.0.0.1:1" && got != kind {
				t.Errorf("%s is %s, want %s", path, got, kind)
			}
		}
	}
}

// The page is small, and has all that it needs in itself: nothing in it leads elsewhere,
// and nothing in it makes markup of text.
func TestAssets(t *testing.T) {
	total := 0
	err := fs.WalkDir(files, "page", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		content, err := files.ReadFile(path)
		if err != nil {
			return err
		}
		total += len(content)
		if contentTypes()[entry.Name()] == "" {
			t.Errorf("%s is not served", path)
		}
		links := regexp.MustCompile(`https?://[^"'\s]+`).FindAllString(string(content), -1)
		links = slices.DeleteFunc(links, func(link string) bool { return link == "http://www.w3.org/2000/svg" }) // a name
		markup := regexp.MustCompile(`innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc|style="|onclick="`).FindAllString(string(content), -1)
		if len(links)+len(markup) > 0 {
			t.Errorf("%s has %q %q", path, links, markup)
		}
		return nil
	})
	if most := 48 << 10; err != nil || total > most {
		t.Errorf("the page has %d bytes (%v), want at most %d", total, err, most)
	}
}

// However many look, the agent is asked once a second.
func TestGraphIsMadeOnceASecond(t *testing.T) {
	source := shopNode()
	mux := http.NewServeMux()
	Register(mux, source, ClientsAny, "")
	for range 50 {
		answer := httptest.NewRecorder()
		mux.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "http://127.0.0.1/map/graph", nil))
		var graph Graph
		if err := json.Unmarshal(answer.Body.Bytes(), &graph); err != nil || graph.Schema != 1 || len(graph.Edges) != 12 {
			t.Fatalf("graph = %s, %v", answer.Body, err)
		}
	}
	if source.asked > 2 {
		t.Errorf("the agent was asked %d times", source.asked)
	}
}
