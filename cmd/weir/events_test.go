// SPDX-License-Identifier: MPL-2.0

package main

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/weirmesh/weir/redirect/bpfmap"
	"github.com/weirmesh/weir/redirect/monitor"
)

func threeEvents() *node {
	at := time.Date(2026, 11, 23, 12, 30, 0, 123456000, time.Local)
	n := twoWorkloads()
	n.events = []monitor.Event{
		{
			Time: at, Cookie: 4711, Verdict: bpfmap.Redirected, Name: "redirected", UID: 1000, PID: 815, Command: "curl",
			Origin:      netip.MustParseAddrPort("10.0.0.9:8080"),
			Destination: netip.MustParseAddrPort("127.128.0.0:8080"),
		},
		{
			Time: at, Cookie: 4712, Verdict: bpfmap.RefusedInboundNoProxy, Name: "refused_inbound_no_proxy",
			Source: netip.MustParseAddrPort("10.0.0.9:40000"),
			Origin: netip.MustParseAddrPort("10.0.0.8:8080"),
		},
		{
			Time: at, Cookie: 4713, Verdict: bpfmap.Local, Name: "local", UID: 0, PID: 816,
			Origin:      netip.MustParseAddrPort("[::1]:53"),
			Destination: netip.MustParseAddrPort("[::1]:53"),
		},
	}
	return n
}

// With nothing said the command listens for a moment; here a very short one.
func TestEvents(t *testing.T) {
	want(t, try(t, threeEvents(), nil, "events", "-duration", "1ms"), outcome{stdout: "" +
		"TIME             WORKLOAD                      VERDICT                      UID      PID  ORIGIN -> DESTINATION\n" +
		"12:30:00.123456  demo/web/0b5d0c1e             redirected                  1000      815  10.0.0.9:8080 -> 127.128.0.0:8080\n" +
		"12:30:00.123456  1c6e1d2f                      refused_inbound_no_proxy       -        -  10.0.0.9:40000 -> 10.0.0.8:8080\n" +
		"12:30:00.123456  netns 4713                    local                          0      816  [::1]:53\n"})
}

func TestEventsJSON(t *testing.T) {
	n := threeEvents()
	n.events = n.events[:1]
	n.events[0].Time = time.Date(2026, 11, 23, 12, 30, 0, 0, time.UTC)
	want(t, try(t, n, nil, "events", "-json", "-duration", "1ms"), outcome{stdout: `{"time":"2026-11-23T12:30:00Z","cookie":"4711","verdict":"redirected",` +
		`"origin":"10.0.0.9:8080","destination":"127.128.0.0:8080","uid":1000,"pid":815,"cgroup":0,"command":"curl"}` + "\n"})
}

func TestFollowedEventsEndWithTheirSource(t *testing.T) {
	n := &node{err: errors.New("events have another reader")}
	want(t, try(t, n, nil, "events", "-f", "-json"), outcome{code: 1, stderr: "weir events: events have another reader\n"})
}

// Losses are lines like any other, and the exit code is not that of a whole list.
func TestEventsTellTheirLosses(t *testing.T) {
	n := threeEvents()
	n.events = append(n.events[:1], monitor.Event{
		Time: n.events[0].Time, Cookie: 4711, Verdict: bpfmap.EventsLost, Name: bpfmap.EventsLost.String(), Lost: 12,
	})
	const told = "weir events: 12 events were lost: what reads them is slower than connections happen\n"
	want(t, try(t, n, nil, "events", "-duration", "1ms"), outcome{code: 1, stderr: told, stdout: "" +
		"TIME             WORKLOAD                      VERDICT                      UID      PID  ORIGIN -> DESTINATION\n" +
		"12:30:00.123456  demo/web/0b5d0c1e             redirected                  1000      815  10.0.0.9:8080 -> 127.128.0.0:8080\n" +
		"12:30:00.123456  demo/web/0b5d0c1e             lost                           -        -  12 events of this workload are not shown\n"})
	n.events = n.events[1:]
	n.events[0].Time = time.Date(2026, 11, 23, 12, 30, 0, 0, time.UTC)
	want(t, try(t, n, nil, "events", "-json", "-duration", "1ms"), outcome{code: 1, stderr: told, stdout: `{"time":"2026-11-23T12:30:00Z","cookie":"4711","verdict":"lost",` +
		`"origin":"","destination":"","uid":0,"pid":0,"cgroup":0,"command":"","lost":12}` + "\n"})
}

// Where the agent reads the kernel's ring it tells the command, in the same words.
func TestEventsByTheAgent(t *testing.T) {
	n := threeEvents()
	n.told, n.events = n.events[:1], nil
	n.recording = true
	want(t, try(t, n, nil, "events", "-duration", "1ms"), outcome{stdout: "" +
		"TIME             WORKLOAD                      VERDICT                      UID      PID  ORIGIN -> DESTINATION\n" +
		"12:30:00.123456  demo/web/0b5d0c1e             redirected                  1000      815  10.0.0.9:8080 -> 127.128.0.0:8080\n"})
}
