// SPDX-License-Identifier: MPL-2.0

package cluster

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/weirmesh/weir/test/nomad"
	"github.com/weirmesh/weir/test/nomad/wire"
)

// client asks from the allocation of a group.
type client struct {
	group     string // or how it asks, where one group asks in several ways
	target    netip.AddrPort
	host      string // that it asks for; the target where empty
	alloc     *nomad.Alloc
	job       string // of the instances
	caller    string // the client's service
	loop      *nomad.Loop
	instances map[string]bool // that have answered
}

// tally is what came of a client's requests.
type tally struct {
	asked       int
	lost        int          // not answered
	wrong       int          // answered by another, past a proxy, or from another address than was dialled
	first, last wire.Outcome // of those
}

func (t tally) String() string {
	switch {
	case t.asked == 0:
		return "-"
	case t.wrong > 0:
		return fmt.Sprintf("%d, %d, %d WRONG", t.asked, t.lost, t.wrong)
	}
	return fmt.Sprintf("%d, %d", t.asked, t.lost)
}

func groups() []string { return []string{"transparent", "plain"} }

// startClients has the transparent client ask for the service's virtual IP, which needs
// no DNS, and the plain one for its upstream's listener.
func startClients(t *testing.T, job *nomad.Job) (list []*client) {
	t.Helper()
	got := job.Alloc("transparent").App("client", "lookup", "cluster-server.virtual.consul")
	if len(got.Addresses) != 1 {
		t.Fatalf("look up the server: %s", got)
	}
	targets := map[string]netip.AddrPort{
		"transparent": netip.AddrPortFrom(netip.MustParseAddr(got.Addresses[0]), 80),
		"plain":       netip.MustParseAddrPort("127.0.0.1:9400"),
	}
	for _, group := range groups() {
		c := &client{group: group, target: targets[group], alloc: job.Alloc(group), job: "cluster", caller: "cluster-" + group}
		c.start()
		list = append(list, c)
	}
	return list
}

// start asks until an instance answers, and then on and on.
func (c *client) start() {
	c.instances = make(map[string]bool)
	c.alloc.EventuallyGet("client", c.url(), func(got wire.Outcome) error {
		if !c.right(got) {
			return fmt.Errorf("got %s", got)
		}
		return nil
	})
	c.loop = c.alloc.Loop("client", c.url())
}

func (c *client) url() string { return "http://" + cmp.Or(c.host, c.target.String()) + "/" }

// right tells an answer of an instance, through both proxies, to who has dialled
// and still sees the target.
func (c *client) right(got wire.Outcome) bool {
	if !got.OK() || got.Reply == nil || got.Reply.Job != c.job || got.Reply.Task != "server" {
		return false
	}
	c.instances[got.Reply.Alloc] = true
	return got.To == c.target.String() && strings.HasPrefix(got.Reply.Remote, "127.0.0.1:") &&
		strings.Contains(got.Reply.ClientCert, "/svc/"+c.caller)
}

// wrong tells an answer of somebody else, and a peer that is not the one dialled even
// where nobody has answered.
func (c *client) wrong(got wire.Outcome) bool {
	return got.OK() && !c.right(got) || got.To != "" && got.To != c.target.String()
}

// tally counts what came of the requests after the first so many.
func (c *client) tally(before int) (told tally) {
	for _, got := range c.loop.Outcomes()[before:] {
		told.asked++
		switch {
		case c.right(got):
			continue
		case c.wrong(got):
			told.wrong++
		default:
			told.lost++
		}
		if told.lost+told.wrong == 1 {
			told.first = got
		}
		told.last = got
	}
	return told
}

// answered waits until each client is answered again.
func (c *cluster) answered() {
	for _, each := range c.clients {
		each.loop.Await(20, each.group+" is answered", each.right)
	}
}

func (c *cluster) counts() (list []int) {
	for _, each := range c.clients {
		list = append(list, len(each.loop.Outcomes()))
	}
	return list
}
