// SPDX-License-Identifier: MPL-2.0

// Package wire is what the tasks of the test jobs tell the tests.
package wire

import (
	"encoding/json"
	"errors"
	"syscall"
	"time"
)

// Reply is what a task answers.
type Reply struct {
	Task   string `json:"task"`
	Alloc  string `json:"alloc"`
	Job    string `json:"job"`
	Remote string `json:"remote"` // who the task thinks has asked
	Local  string `json:"local"`
	Path   string `json:"path,omitempty"`
	// ClientCert is the header by which an HTTP proxy tells the caller's
	// certificate; empty where no proxy terminated mutual TLS.
	ClientCert string `json:"client_cert,omitempty"`
}

// Call is one run of a CNI plugin, as test/nomad/stopwatch timed it.
type Call struct {
	Plugin    string        `json:"plugin"`
	Command   string        `json:"command"`
	Container string        `json:"container"`
	Start     time.Time     `json:"start"`
	Took      time.Duration `json:"took"`
	Code      int           `json:"code"`
}

// Outcome is what came of one attempt of a client.
type Outcome struct {
	At   time.Time     `json:"at"`
	Took time.Duration `json:"took"`
	// From and To are the socket's own address and its peer's, as the client saw
	// them; empty where it was not connected.
	From string `json:"from,omitempty"`
	To   string `json:"to,omitempty"`
	// Status is HTTP's; zero where none came.
	Status int `json:"status,omitempty"`
	// Reply is what a task answered, Text what somebody else did.
	Reply     *Reply   `json:"reply,omitempty"`
	Text      string   `json:"text,omitempty"`
	Addresses []string `json:"addresses,omitempty"`
	Error     string   `json:"error,omitempty"`
	// Errno is the error's number; zero where it is not the kernel's.
	Errno syscall.Errno `json:"errno,omitempty"`
}

// Fail is the outcome with an error.
func (o Outcome) Fail(err error) Outcome {
	o.Error = err.Error()
	errors.As(err, &o.Errno)
	return o
}

// Told is the outcome with what came back.
func (o Outcome) Told(text []byte) Outcome {
	var reply Reply
	if json.Unmarshal(text, &reply) == nil && reply.Local != "" {
		o.Reply = &reply
	} else {
		o.Text = string(text)
	}
	return o
}

// OK tells that a task answered the request.
func (o Outcome) OK() bool { return o.Error == "" && (o.Status == 0 || o.Status == 200) }

// String is short, for messages of tests.
func (o Outcome) String() string {
	text, err := json.Marshal(o)
	if err != nil {
		return err.Error()
	}
	return string(text)
}
