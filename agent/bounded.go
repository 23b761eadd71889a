// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"errors"
	"fmt"
	"io"
)

var errTooLong = errors.New("the answer is too long")

// boundedBody ends after so many bytes.
type boundedBody struct {
	body  io.ReadCloser
	limit int
	read  int // of them
}

// Read is that of io.Reader.
func (b *boundedBody) Read(buffer []byte) (int, error) {
	left := b.limit - b.read
	if left <= 0 {
		return 0, fmt.Errorf("%w: it has more than %d bytes", errTooLong, b.limit)
	}
	n, err := b.body.Read(buffer[:min(len(buffer), left)])
	b.read += n
	return n, err
}

// Close is that of io.Closer.
func (b *boundedBody) Close() error { return b.body.Close() }
