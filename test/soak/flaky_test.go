// SPDX-License-Identifier: MPL-2.0

package soak

import (
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
)

// behaviour is what a flaky server does with who connects.
type behaviour int

const (
	passes  behaviour = iota // on to the real one
	hangs                    // takes the request and never answers
	refuses                  // hangs up at once
	babbles                  // answers what is not what was asked for
	breaks                   // ends in the middle of an answer
	fails                    // answers 500
)

var misbehaviours = []behaviour{hangs, refuses, babbles, breaks, fails}

func (b behaviour) String() string {
	return [...]string{"passes", "hangs", "refuses", "babbles", "breaks", "fails"}[b]
}

// flaky is a Unix socket before a server, which is made to misbehave in ways that a real
// one cannot be asked for.
type flaky struct {
	path  string
	dial  func() (net.Conn, error)
	mutex sync.Mutex
	now   behaviour
	open  map[net.Conn]bool
}

func newFlaky(t *testing.T, name string, dial func() (net.Conn, error)) *flaky {
	t.Helper()
	f := &flaky{path: filepath.Join(t.TempDir(), name), dial: dial, open: map[net.Conn]bool{}}
	listener, err := net.Listen("unix", f.path)
	if err != nil {
		t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go f.serve(conn)
		}
	})
	t.Cleanup(func() {
		listener.Close()
		f.become(refuses)
		serving.Wait()
	})
	return f
}

// become changes the behaviour, and ends what was open under the former one.
func (f *flaky) become(b behaviour) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.now = b
	for conn := range f.open {
		conn.Close()
	}
	clear(f.open)
}

// hold notes a connection that ends with the behaviour, which it returns.
func (f *flaky) hold(conn net.Conn) behaviour {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.open[conn] = true
	return f.now
}

func (f *flaky) serve(conn net.Conn) {
	defer conn.Close()
	now := f.hold(conn)
	if now == refuses {
		return
	}
	if now == passes {
		f.pass(conn)
		return
	}
	request := make([]byte, 64<<10)
	for { // until who asks gives up, or the behaviour changes
		if _, err := conn.Read(request); err != nil {
			return
		}
		answer := map[behaviour]string{
			babbles: "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 21\r\n\r\n{\"a\":[{\"Kind\":7},null",
			breaks:  "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 4096\r\n\r\n{\"web\":{\"ID\":\"web\",",
			fails:   "HTTP/1.1 500 Internal Server Error\r\nContent-Length: 9\r\n\r\nno leader",
		}[now]
		if _, err := io.WriteString(conn, answer); err != nil || now == breaks {
			return
		}
	}
}

func (f *flaky) pass(conn net.Conn) {
	server, err := f.dial()
	if err != nil {
		return
	}
	defer server.Close()
	if f.hold(server) != passes {
		return
	}
	go func() {
		_, _ = io.Copy(server, conn)
		server.Close()
	}()
	_, _ = io.Copy(conn, server)
}
