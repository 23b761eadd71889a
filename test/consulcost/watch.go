// SPDX-License-Identifier: MPL-2.0

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/weirmesh/weir/agent/catalog"
	"github.com/weirmesh/weir/agent/configfile"
)

// A node is the Consul part of one agent, and what stands between it and its Consul:
// a fake local agent which knows the node's own proxies, and hands on every other
// question and counts it. The real local agents, which many nodes share, know nothing
// of any proxy.
type node struct {
	number  int
	own     []string // services of its upstreams
	watcher *catalog.Watcher
	proxy   *httputil.ReverseProxy
	counts  *counts
}

// counts are those of all nodes of a process.
type counts struct{ questions, bytes atomic.Int64 }

// told is what a process of nodes answers to each line that it reads.
type told struct {
	Ready            int // nodes that know the virtual IPs of all their upstreams
	Questions, Bytes int64
}

// watch runs so many nodes until stdin ends.
func watch(addresses []string, nodes, services, own int) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var running sync.WaitGroup
	defer running.Wait()
	defer cancel()
	all, sum := make([]*node, nodes), new(counts)
	transport := &http.Transport{MaxIdleConnsPerHost: 10_000, DialContext: new(net.Dialer).DialContext}
	for i := range all {
		n := &node{number: i, counts: sum}
		for k := range own { // of no other node, as far as there are enough
			n.own = append(n.own, serviceName((i*own+k)%services))
		}
		n.proxy = httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: addresses[i%len(addresses)]})
		n.proxy.Transport = transport
		n.proxy.ErrorHandler = func(http.ResponseWriter, *http.Request, error) { panic(http.ErrAbortHandler) }
		n.proxy.ErrorLog = nil
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		server := &http.Server{Handler: n, ErrorLog: nil}
		running.Go(func() { _ = server.Serve(listener) })
		running.Go(func() { <-ctx.Done(); _ = server.Close() })
		config := *configfile.DefaultConfig().Consul
		config.Address = listener.Addr().String()
		client, err := catalog.NewClient(config, catalog.DefaultTimeouts())
		if err != nil {
			return err
		}
		n.watcher = catalog.NewWatcher(client, func() {})
		running.Go(func() { n.watcher.Run(ctx) })
		all[i] = n
	}
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		answer := told{Questions: sum.questions.Load(), Bytes: sum.bytes.Load()}
		for _, n := range all {
			if n.ready() {
				answer.Ready++
			}
		}
		if err := json.NewEncoder(os.Stdout).Encode(answer); err != nil {
			return err
		}
	}
	return lines.Err()
}

func (n *node) ready() bool {
	known := n.watcher.Current()
	found := 0
	for _, addresses := range known.Facts.VirtualIPs {
		if len(addresses) > 0 {
			found++
		}
	}
	return known.InSync && found == len(n.own)
}

// ServeHTTP is that of http.Handler.
func (n *node) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/v1/agent/self":
		fmt.Fprintf(w, `{"Config":{"NodeName":%q,"BindAddr":"127.0.0.1"}}`, nodeName(n.number))
	case "/v1/agent/services":
		var list []string
		for i, service := range n.own {
			list = append(list, fmt.Sprintf(`"_nomad-task-b412a0b1-e285-703a-01ba-%012d-group-g-%d-80-sidecar-proxy": {"Kind": "connect-proxy",
				"Service": "own-sidecar-proxy", "Port": %d, "Proxy": {"Upstreams": [{"DestinationName": %q, "LocalBindPort": 9191}]}}`, i, i, 20000+i, service))
		}
		fmt.Fprintf(w, "{%s}", strings.Join(list, ","))
	default:
		n.counts.questions.Add(1)
		n.proxy.ServeHTTP(counting{w, n.counts}, r)
	}
}

// counting counts the bytes of answers, without their headers.
type counting struct {
	http.ResponseWriter
	counts *counts
}

// Write is that of io.Writer.
func (c counting) Write(data []byte) (int, error) {
	n, err := c.ResponseWriter.Write(data)
	c.counts.bytes.Add(int64(n))
	return n, err
}

// Unwrap lets http.ResponseController flush.
func (c counting) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func serviceName(number int) string { return fmt.Sprintf("service-%d", number) }

func nodeName(number int) string { return fmt.Sprintf("node-%d", number) }

// address is that of a service's instance.
func address(number int) string {
	return netip.AddrFrom4([4]byte{10, 8, byte(number >> 8), byte(number)}).String()
}

// ask has a process of nodes count.
func ask(to io.Writer, from *bufio.Reader) (answer told, err error) {
	if _, err := io.WriteString(to, "count\n"); err != nil {
		return answer, err
	}
	line, err := from.ReadBytes('\n')
	if err != nil {
		return answer, fmt.Errorf("read counts of nodes: %w", err)
	}
	return answer, json.Unmarshal(line, &answer)
}

// until asks again until there is no error, or the time is over.
func until(ctx context.Context, patience time.Duration, check func() error) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	ticker := time.NewTicker(200 * time.Millisecond)
	defer ticker.Stop()
	for {
		err := check()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-ticker.C:
		}
	}
}
