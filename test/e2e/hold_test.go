// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/weirmesh/weir/test"
)

// holdFunc names the process that holds connections open: see hold.
const holdFunc = "e2e.hold"

// holdRequest dials Target and keeps the connection under that name, or, where
// it has it already, sends a word over it. After the Last one it is closed. A host
// name in Target is asked of Resolver.
type holdRequest struct {
	Name, Target string
	Resolver     resolver
	Last         bool
}

// resolver is a DNS server and how it is asked: "udp" or "tcp".
type resolver struct{ Network, Addr string }

// lookup is the resolver as an application without libc has it.
func (r resolver) lookup() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, r.Network, r.Addr)
	}}
}

// newHold is what a process does that holds connections: the answer is what
// the other side echoed.
func newHold() func(holdRequest) (string, error) {
	open := make(map[string]net.Conn)
	return func(request holdRequest) (string, error) {
		conn := open[request.Name]
		if conn == nil {
			dialer := net.Dialer{Timeout: 5 * time.Second, Resolver: request.Resolver.lookup()}
			var err error
			if conn, err = dialer.Dial("tcp", request.Target); err != nil {
				return "", err
			}
			open[request.Name] = conn
			line, err := bufio.NewReaderSize(conn, 4096).ReadString('\n')
			return strings.TrimSpace(line), err
		}
		if request.Last {
			delete(open, request.Name)
			defer conn.Close()
		}
		if err := conn.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			return "", err
		}
		if _, err := fmt.Fprintln(conn, "still here"); err != nil {
			return "", err
		}
		line, err := bufio.NewReader(conn).ReadString('\n')
		return strings.TrimSpace(line), err
	}
}

// held is a task that keeps connections open.
type held struct {
	*test.Process
	resolver resolver
}

func (a *meshAlloc) newHeld() held {
	a.node.t.Helper()
	return held{Process: test.Helper(a.node.t, a.spec(1000), holdFunc)}
}

// asking is the task with another resolver.
func (h held) asking(network string, server netip.AddrPort) held {
	h.resolver = resolver{network, server.String()}
	return h
}

func (h held) say(name, target string) (reply string, err error) {
	err = h.Call(holdRequest{Name: name, Target: target, Resolver: h.resolver}, &reply)
	return reply, err
}

// exchange dials anew, sends a word, which the server returns, and closes: Envoy's RBAC
// filter judges the first bytes of a client, and these servers speak first. More than
// 1,024 open connections to a cluster it refuses.
func (h held) exchange(target string) (server string, err error) {
	name := time.Now().String()
	greeting, err := h.say(name, target)
	if err == nil {
		err = h.Call(holdRequest{Name: name, Last: true}, new(string))
	}
	return servedBy(greeting), err
}

// wantServed waits until a dial is answered by the server; a mesh takes a moment to
// follow a change.
func wantServed(t *testing.T, task held, target, server string) {
	t.Helper()
	test.Eventually(t, func() error {
		got, err := task.exchange(target)
		if err == nil && got != server {
			err = fmt.Errorf("answered by %q", got)
		}
		return err
	}, fmt.Sprintf("%s to be answered by %q", target, server))
}

// wantRefused waits until a dial fails, but for a name that is not found.
func wantRefused(t *testing.T, task held, target string) {
	t.Helper()
	test.Eventually(t, func() error {
		server, err := task.exchange(target)
		if err == nil {
			return fmt.Errorf("answered by %q", server)
		}
		if strings.Contains(err.Error(), "lookup ") {
			return err
		}
		return nil
	}, target+" to be refused")
}

// servedBy reads the name of the echo server in its greeting.
func servedBy(greeting string) string {
	var reply test.Reply
	if json.Unmarshal([]byte(greeting), &reply) != nil {
		return greeting
	}
	return reply.Server
}
