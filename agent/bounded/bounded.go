// SPDX-License-Identifier: MPL-2.0

// Package bounded ends what others answer where it is longer than any answer that
// is right.
package bounded

import (
	"errors"
	"fmt"
	"io"
	"slices"
)

var ErrTooLong = errors.New("the answer is too long")

// Reader ends after so many bytes.
type Reader struct {
	From  io.ReadCloser
	Limit int
	Count int // of them
}

// Read is that of io.Reader.
func (b *Reader) Read(buffer []byte) (int, error) {
	left := b.Limit - b.Count
	if left <= 0 {
		return 0, fmt.Errorf("%w: it has more than %d bytes", ErrTooLong, b.Limit)
	}
	n, err := b.From.Read(buffer[:min(len(buffer), left)])
	b.Count += n
	return n, err
}

// Close is that of io.Closer.
func (b *Reader) Close() error { return b.From.Close() }

// ReadAll reads an answer that has about so many bytes, which are more than none, and limit
// at most. One that is much longer takes less than twice the limit until it has come to its
// end.
func ReadAll(from io.Reader, size, limit int) ([]byte, error) {
	body := make([]byte, 0, size)
	for {
		if len(body) == cap(body) {
			body = slices.Grow(body, max(1, min(3*len(body), limit-len(body))))
		}
		n, err := from.Read(body[len(body):cap(body)])
		body = body[:len(body)+n]
		if errors.Is(err, io.EOF) {
			return body, nil
		}
		if err != nil {
			return nil, err
		}
	}
}
