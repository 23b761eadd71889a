// SPDX-License-Identifier: MPL-2.0

// Consulcost measures what the Consul part of many agents costs a real Consul, a
// server and a few clients, with a large catalog: questions, bytes and the server's
// processor time a node, when nothing changes and while services come and go that
// none of the nodes has to do with. run.sh starts it, with the revision before
// beside this one.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

type options struct {
	consul, before, after               string
	nodes, services, own, clients, secs int
}

func main() {
	var o options
	var addresses string
	flag.StringVar(&addresses, "watch", "", "run the nodes beside these local agents, separated by commas, and count at each line")
	flag.StringVar(&o.consul, "consul", "", "consul")
	flag.StringVar(&o.before, "before", "", "this program of the revision before; none: without")
	flag.StringVar(&o.after, "after", os.Args[0], "this program")
	flag.IntVar(&o.nodes, "nodes", 200, "nodes")
	flag.IntVar(&o.services, "services", 5000, "services in the catalog")
	flag.IntVar(&o.own, "own", 10, "upstreams of a node, each another service")
	flag.IntVar(&o.clients, "clients", 2, "local agents of Consul, which the nodes share")
	flag.IntVar(&o.secs, "seconds", 40, "length of each measurement")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := error(nil)
	if addresses != "" {
		err = watch(strings.Split(addresses, ","), o.nodes, o.services, o.own)
	} else {
		err = run(ctx, o)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "consulcost:", err)
		os.Exit(1)
	}
}

// A cluster is Consul with its catalog.
type cluster struct {
	options
	server  *consul
	clients []*consul
	churned int
}

func run(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp("", "weir-consulcost-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	c := &cluster{options: o}
	if c.server, err = startConsul(ctx, o.consul, dir, "server", nil); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.server.stop()) }()
	var addresses []string
	for i := range o.clients {
		client, err := startConsul(ctx, o.consul, dir, fmt.Sprintf("client-%d", i), c.server)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, client.stop()) }()
		c.clients, addresses = append(c.clients, client), append(addresses, client.http)
	}
	if err := c.fill(ctx); err != nil {
		return err
	}
	nobody, err := c.phases(ctx, nil)
	if err != nil {
		return err
	}
	var columns []column
	for _, v := range []struct{ name, program string }{{"before", o.before}, {"now", o.after}} {
		if v.program == "" {
			continue
		}
		measured, err := c.variant(ctx, v.program, strings.Join(addresses, ","))
		if err != nil {
			return fmt.Errorf("measure %s: %w", v.name, err)
		}
		columns = append(columns, column{v.name, measured})
	}
	report(os.Stdout, o, nobody, columns)
	return nil
}

// fill registers the catalog, with virtual IPs.
func (c *cluster) fill(ctx context.Context) error {
	makers, ctx := errgroup.WithContext(ctx)
	makers.SetLimit(16)
	for i := range c.services {
		makers.Go(func() error { return c.register(ctx, nodeName(i%c.nodes), i%c.nodes, serviceName(i)) })
	}
	return makers.Wait()
}

func (c *cluster) register(ctx context.Context, node string, number int, service string) error {
	return c.server.put(ctx, "/v1/catalog/register", object{
		"Node": node, "Address": address(number),
		"Service": object{"ID": service, "Service": service, "Port": 80, "Tags": []string{"a-tag"}, "Connect": object{"Native": true}},
	})
}

// change lets one service come or go that is nobody's upstream, on a node that is
// none of those that watch.
func (c *cluster) change(ctx context.Context) error {
	const node, number = "elsewhere", 65000
	name := fmt.Sprintf("short-lived-%d", c.churned/2)
	c.churned++
	if c.churned%2 == 1 {
		return c.register(ctx, node, number, name)
	}
	return c.server.put(ctx, "/v1/catalog/deregister", object{"Node": node, "ServiceID": name})
}

// variant starts the nodes of a revision and measures.
func (c *cluster) variant(ctx context.Context, program, addresses string) (measured [2]sample, err error) {
	cmd := exec.CommandContext(ctx, program, "-watch", addresses, "-nodes", fmt.Sprint(c.nodes), "-services", fmt.Sprint(c.services), "-own", fmt.Sprint(c.own))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	to, err := cmd.StdinPipe()
	if err != nil {
		return measured, err
	}
	from, err := cmd.StdoutPipe()
	if err != nil {
		return measured, err
	}
	if err := cmd.Start(); err != nil {
		return measured, err
	}
	defer func() { err = errors.Join(err, to.Close(), cmd.Wait()) }()
	answers := bufio.NewReader(from)
	count := func() (told, error) { return ask(to, answers) }
	err = until(ctx, 3*time.Minute, func() error {
		answer, err := count()
		if err == nil && answer.Ready < c.nodes {
			err = fmt.Errorf("%d of %d nodes know their virtual IPs", answer.Ready, c.nodes)
		}
		return err
	})
	if err != nil {
		return measured, err
	}
	// What they still have to do after their start is none of this.
	if err := c.pass(ctx, 15*time.Second, false); err != nil {
		return measured, err
	}
	return c.phases(ctx, count)
}

// pass waits, and changes the catalog each second if asked to.
func (c *cluster) pass(ctx context.Context, length time.Duration, changing bool) error {
	end := time.NewTimer(length)
	defer end.Stop()
	second := time.NewTicker(time.Second)
	defer second.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-end.C:
			return nil
		case <-second.C:
			if changing {
				if err := c.change(ctx); err != nil {
					return err
				}
			}
		}
	}
}
