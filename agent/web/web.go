// SPDX-License-Identifier: MPL-2.0

// Package web is the map: a page that shows a node's allocations and what they talk to.
// It reads and changes nothing, and has all that it needs in itself. Names in it are
// chosen by whoever runs tasks, so they reach the page as JSON and are only ever set as
// text there; the policy that its headers state holds the page to that.
package web

import (
	"bytes"
	"embed"
	"encoding/json"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"
)

// Source is the agent as the page sees it.
type Source interface {
	Graph() Graph
	Allocation(id string) (a Allocation, known bool)
}

// Clients says who may see the page.
type Clients string

// Whom the page is for.
const (
	ClientsOff      Clients = "off"      // nobody
	ClientsLoopback Clients = "loopback" // who comes by the node's own loopback
	ClientsAny      Clients = "any"      // whoever reaches the address
)

// Valid reports whether it is one of them.
func (c Clients) Valid() bool { return c == ClientsOff || c == ClientsLoopback || c == ClientsAny }

//go:embed page
var files embed.FS

// contentTypes are the files of the page. What is not among them is not served.
func contentTypes() map[string]string {
	return map[string]string{
		"map.html": "text/html; charset=utf-8", "map.css": "text/css; charset=utf-8", "map.js": "text/javascript; charset=utf-8", "map.svg": "image/svg+xml",
	}
}

// page answers for one agent.
type page struct {
	source  Source
	clients Clients
	node    string // its host name

	mu    sync.Mutex // one answer at a time: many readers cost what one does
	graph []byte
	made  time.Time
}

// graphAge is how long an answer is good for the next reader.
const graphAge = time.Second

// Register adds the page of a node to mux, below /map/.
func Register(mux *http.ServeMux, source Source, clients Clients, node string) {
	if clients == ClientsOff {
		return
	}
	p := &page{source: source, clients: clients, node: node}
	mux.Handle("GET /map", p.guarded(http.RedirectHandler("/map/", http.StatusFound), true))
	mux.Handle("GET /map/{$}", p.guarded(file("map.html"), true))
	for name := range contentTypes() {
		mux.Handle("GET /map/"+name, p.guarded(file(name), false))
	}
	mux.Handle("GET /map/graph", p.guarded(http.HandlerFunc(p.serveGraph), false))
	mux.Handle("GET /map/allocations/{id}", p.guarded(http.HandlerFunc(p.serveAllocation), false))
}

func file(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		content, err := files.ReadFile("page/" + name)
		if err != nil {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", contentTypes()[name])
		http.ServeContent(w, r, name, time.Time{}, bytes.NewReader(content))
	})
}

// policy is what a browser may do for the page: run its script, use its style, draw its
// picture and ask its own server. Nothing in it can turn text into a part of the page.
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// guarded lets in whom the page is for. Another site, open in the browser of somebody
// who may see the page, gets nothing: not by a request of its own, and not by a name
// that it has resolve to this node. entry is where a link from elsewhere may lead.
func (p *page) guarded(next http.Handler, entry bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("Content-Security-Policy", policy)
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("Referrer-Policy", "no-referrer")
		header.Set("Cross-Origin-Resource-Policy", "same-origin")
		header.Set("Cross-Origin-Opener-Policy", "same-origin")
		header.Set("Cache-Control", "no-store")
		switch site := r.Header.Get("Sec-Fetch-Site"); {
		case p.clients == ClientsLoopback && !fromLoopback(r.RemoteAddr):
			http.Error(w, `the map is for this node's loopback: come by "ssh -L", or set telemetry { map = "any" }`, http.StatusForbidden)
		case !p.known(r.Host):
			http.Error(w, "the map is under an address, localhost, or the node's own name", http.StatusMisdirectedRequest)
		case site != "" && site != "none" && site != "same-origin" && (!entry || r.Header.Get("Sec-Fetch-Mode") != "navigate"):
			http.Error(w, "the map is for no other site", http.StatusForbidden)
		default:
			next.ServeHTTP(w, r)
		}
	})
}

func fromLoopback(remote string) bool {
	addr, err := netip.ParseAddrPort(remote)
	return err == nil && addr.Addr().Unmap().IsLoopback()
}

// known reports whether a request is for this node by a name that nobody else can give it.
func (p *page) known(host string) bool {
	if name, _, err := net.SplitHostPort(host); err == nil {
		host = name
	}
	host = strings.ToLower(strings.Trim(host, "[]"))
	if _, err := netip.ParseAddr(host); err == nil || host == "localhost" {
		return true
	}
	node := strings.ToLower(p.node)
	return node != "" && (host == node || strings.HasPrefix(host, node+"."))
}

func (p *page) serveGraph(w http.ResponseWriter, _ *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if time.Since(p.made) > graphAge {
		text, err := json.Marshal(p.source.Graph())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		p.graph, p.made = text, time.Now()
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(p.graph) // the reader is gone
}

func (p *page) serveAllocation(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	found, known := p.source.Allocation(r.PathValue("id"))
	p.mu.Unlock()
	if !known {
		http.Error(w, "no such allocation", http.StatusNotFound)
		return
	}
	text, err := json.Marshal(found)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(text) // the reader is gone
}
