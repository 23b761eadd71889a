// SPDX-License-Identifier: MPL-2.0

package test

import (
	"os"
	"strconv"
	"testing"
	"time"
)

// patience is how long [Eventually] waits. It is only spent by a test that fails.
const patience = 30 * time.Second

// Eventually polls check until it returns nil, and fails the test with the last
// error when that does not happen in half a minute. What names the state that is
// waited for. The check runs on the caller's goroutine.
func Eventually(tb testing.TB, check func() error, what string) {
	tb.Helper()
	EventuallyIn(tb, patience, check, what)
}

// EventuallyIn is [Eventually] for what may take longer, as where much waits in line.
func EventuallyIn(tb testing.TB, patience time.Duration, check func() error, what string) {
	tb.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.Now().Add(patience)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("wait for %s: %v", what, err)
		}
		<-tick.C
	}
}

// Scale returns n multiplied by WEIR_TEST_SCALE, which is 1 where it is not set;
// never less than 1. It sizes the loops of heavy tests.
func Scale(n int) int {
	scale, err := strconv.ParseFloat(os.Getenv("WEIR_TEST_SCALE"), 64)
	if err != nil || scale <= 0 {
		return n
	}
	return max(1, int(float64(n)*scale))
}
