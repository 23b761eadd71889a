// SPDX-License-Identifier: MPL-2.0

// Command app is what the tasks of the test jobs run: a server, a client, and a
// client that goes on asking. It is static, so that it runs in an image and in a
// chroot that hold nothing else.
//
//	app serve LISTEN...        answers HTTP (host:port) and datagrams (udp:host:port)
//	app get URL                asks once and prints an Outcome
//	app check URL              the same, and ends with 1 where no 200 came
//	app dial NETWORK ADDRESS   connects, or asks by datagram, and prints an Outcome
//	app lookup NAME            prints the addresses of a name
//	app loop URL FILE [EVERY]  asks until FILE is gone; a line of it for each Outcome
//	app first URL              asks once, at once, and ends with 1 where that fails; goes on as pause
//	app pause                  does nothing until it is told to end
//
// -uid N before the word changes the user first. A refusal is an Outcome, not a
// failure of the command.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/weirmesh/weir/test/nomad/wire"
)

const patience = 5 * time.Second

func main() {
	uid := flag.Int("uid", -1, "change to this user first")
	flag.Parse()
	if err := run(*uid, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(uid int, args []string) error {
	if uid >= 0 {
		if err := syscall.Setuid(uid); err != nil {
			return fmt.Errorf("change user: %w", err)
		}
	}
	switch {
	case len(args) >= 1 && args[0] == "serve":
		return serve(args[1:])
	case len(args) == 2 && args[0] == "get":
		return show(get(&http.Client{Timeout: patience}, args[1]))
	case len(args) == 2 && args[0] == "check":
		const gate = time.Minute // what waits for its proxy may wait so long
		got := get(&http.Client{Timeout: gate}, args[1])
		if err := show(got); err != nil || !got.OK() {
			return fmt.Errorf("the request failed: %s", got)
		}
		return nil
	case len(args) == 3 && args[0] == "dial":
		return show(dial(args[1], args[2]))
	case len(args) == 2 && args[0] == "lookup":
		return show(lookup(args[1]))
	case len(args) >= 3 && args[0] == "loop":
		return loop(args[1], args[2], args[3:])
	case len(args) == 2 && args[0] == "first":
		if err := run(-1, []string{"check", args[1]}); err != nil {
			return err
		}
		return run(-1, []string{"pause"})
	case len(args) == 1 && args[0] == "pause":
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
		defer stop()
		<-ctx.Done()
		return nil
	}
	return fmt.Errorf("what to do: %q", args)
}

func show(outcome wire.Outcome) error { return json.NewEncoder(os.Stdout).Encode(outcome) }

func reply(remote, local net.Addr) wire.Reply {
	return wire.Reply{
		Task: os.Getenv("NOMAD_TASK_NAME"), Alloc: os.Getenv("NOMAD_ALLOC_ID"), Job: os.Getenv("NOMAD_JOB_NAME"),
		Remote: remote.String(), Local: local.String(),
	}
}

// answer tells who answered, from where, and what Envoy says of the caller.
func answer(w http.ResponseWriter, r *http.Request) {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	remote, err := net.ResolveTCPAddr("tcp", r.RemoteAddr)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	told := reply(remote, local)
	told.Path, told.ClientCert = r.URL.Path, r.Header.Get("X-Forwarded-Client-Cert")
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(told) // the caller is gone, and knows
}

func serve(listens []string) error {
	failed := make(chan error)
	for _, where := range listens {
		if address, ok := strings.CutPrefix(where, "udp:"); ok {
			conn, err := net.ListenPacket("udp", address)
			if err != nil {
				return err
			}
			go func() { failed <- echo(conn) }()
			continue
		}
		listener, err := net.Listen("tcp", where)
		if err != nil {
			return err
		}
		go func() { failed <- http.Serve(listener, http.HandlerFunc(answer)) }()
	}
	return <-failed
}

func echo(conn net.PacketConn) error {
	buffer := make([]byte, 2048)
	for {
		_, from, err := conn.ReadFrom(buffer)
		if err != nil {
			return err
		}
		line, err := json.Marshal(reply(from, conn.LocalAddr()))
		if err != nil {
			return err
		}
		_, _ = conn.WriteTo(line, from) // as the network is: a datagram may be lost
	}
}

// get asks on a connection of its own, so that each request is a connection.
func get(client *http.Client, url string) (outcome wire.Outcome) {
	outcome.At = time.Now()
	defer func() { outcome.Took = time.Since(outcome.At) }()
	client.Transport = &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, network, address)
			if err == nil {
				outcome.From, outcome.To = conn.LocalAddr().String(), conn.RemoteAddr().String()
			}
			return conn, err
		},
	}
	response, err := client.Get(url)
	if err != nil {
		return outcome.Fail(err)
	}
	defer response.Body.Close()
	outcome.Status = response.StatusCode
	text, err := io.ReadAll(io.LimitReader(response.Body, 1<<16))
	if err != nil {
		return outcome.Fail(err)
	}
	return outcome.Told(text)
}

// dial connects and hangs up; a datagram it sends, and awaits the answer.
func dial(network, address string) (outcome wire.Outcome) {
	outcome.At = time.Now()
	defer func() { outcome.Took = time.Since(outcome.At) }()
	conn, err := net.DialTimeout(network, address, patience)
	if err != nil {
		return outcome.Fail(err)
	}
	defer conn.Close()
	outcome.From, outcome.To = conn.LocalAddr().String(), conn.RemoteAddr().String()
	if !strings.HasPrefix(network, "udp") {
		return outcome
	}
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return outcome.Fail(err)
	}
	if _, err := conn.Write([]byte("?")); err != nil {
		return outcome.Fail(err)
	}
	buffer := make([]byte, 2048)
	n, err := conn.Read(buffer)
	if err != nil {
		return outcome.Fail(err)
	}
	return outcome.Told(buffer[:n])
}

func lookup(name string) (outcome wire.Outcome) {
	outcome.At = time.Now()
	defer func() { outcome.Took = time.Since(outcome.At) }()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	addresses, err := net.DefaultResolver.LookupHost(ctx, name)
	if err != nil {
		return outcome.Fail(err)
	}
	outcome.Addresses = addresses
	return outcome
}

// loop writes each line at once: what reads it may kill this process at any time.
// It ends when the file has another name or none.
func loop(url, name string, more []string) error {
	every := 50 * time.Millisecond
	if len(more) > 0 {
		var err error
		if every, err = time.ParseDuration(more[0]); err != nil {
			return err
		}
	}
	file, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	lines := json.NewEncoder(file)
	client := &http.Client{Timeout: patience}
	for range time.Tick(every) {
		if _, err := os.Stat(name); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		if err := lines.Encode(get(client, url)); err != nil {
			return err
		}
	}
	return nil
}
