// SPDX-License-Identifier: MPL-2.0

package soak

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"time"

	"github.com/weirmesh/weir/test"
)

// transferFunc names the process that sends much over one open connection.
const transferFunc = "soak.transfer"

// transferRequest opens a connection to Target, where that is set, and keeps it; then
// it sends so many bytes over it and reads them back.
type transferRequest struct {
	Target string
	Bytes  int
	Seed   uint64
}

// transferred is what came back, and what the proxy sees of the connection now.
type transferred struct {
	Sent, Received string // sums
	Seen           test.Answer
}

// transferLimit bounds one round: a longer one is stuck.
const transferLimit = 20 * time.Second

func newTransfer() func(transferRequest) (transferred, error) {
	var open *net.TCPConn
	return func(request transferRequest) (got transferred, err error) {
		if request.Target != "" {
			if open, err = dial(request.Target); err != nil {
				return got, err
			}
		}
		if err := open.SetDeadline(time.Now().Add(transferLimit)); err != nil {
			return got, err
		}
		if got.Sent, got.Received, err = sendAndReadBack(open, request); err != nil {
			return got, err
		}
		got.Seen, err = test.AskAgain(open)
		return got, err
	}
}

// dial opens a connection and reads the greeting, which AskAgain asks for anew.
func dial(target string) (*net.TCPConn, error) {
	conn, err := (&net.Dialer{Timeout: transferLimit}).Dial("tcp", target)
	if err != nil {
		return nil, err
	}
	if _, err := bufio.NewReaderSize(conn, 4096).ReadString('\n'); err != nil {
		return nil, fmt.Errorf("read greeting: %w", err)
	}
	return conn.(*net.TCPConn), nil
}

func sendAndReadBack(conn net.Conn, request transferRequest) (sent, received string, err error) {
	data := make([]byte, request.Bytes)
	source := rand.NewChaCha8([32]byte{byte(request.Seed), byte(request.Seed >> 8), byte(request.Seed >> 16), byte(request.Seed >> 24)})
	_, _ = source.Read(data) // never an error
	written := make(chan error, 1)
	go func() {
		_, err := conn.Write(data)
		written <- err
	}()
	sum := sha256.New()
	if _, err := io.CopyN(sum, conn, int64(len(data))); err != nil {
		return "", "", fmt.Errorf("read back: %w", err)
	}
	if err := <-written; err != nil {
		return "", "", fmt.Errorf("send: %w", err)
	}
	want := sha256.Sum256(data)
	return hex.EncodeToString(want[:]), hex.EncodeToString(sum.Sum(nil)), nil
}
