// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"github.com/weirmesh/weir/agent/api"
	"github.com/weirmesh/weir/test"
)

// A read of Consul that brings nothing new causes no pass of the loop, nor need
// the loop have time for one: what an operator reads is what is true when asked.
func TestStatusIsWhatIsTrueWhenAsked(t *testing.T) {
	n := newNode(t)
	ids := []string{numbered(1)}
	n.cached(ids[0], test.NewNetNS(t).Path, "")
	n.config.Docker.Socket = filepath.Join(t.TempDir(), "docker.sock")
	n.fake.answers(registered(ids...))
	var mu sync.Mutex
	halt := false
	stands, goOn := make(chan struct{}), make(chan struct{})
	release := sync.OnceFunc(func() { close(goOn) })
	defer release()
	stood := sync.OnceFunc(func() { close(stands) })
	n.run(func(a *Agent) {
		a.notify = func(string) {
			mu.Lock()
			stop := halt
			mu.Unlock()
			if stop {
				stood()
				<-goOn
			}
		}
	})
	n.allInSync(ids, 20001)
	mu.Lock()
	halt = true
	mu.Unlock()
	n.agent.trigger()
	<-stands // from here on there is no pass

	before := n.agent.Status().Consul.Counts.Reads
	n.agent.consul.Wake()
	test.Eventually(t, func() error {
		told, err := api.ReadStatus(context.Background(), n.config.StateDir)
		if err == nil && told.Consul.Counts.Reads == before {
			err = errors.New("no read since")
		}
		return err
	}, "the socket to tell of another read")
	if reads := n.agent.Status().Consul.Counts.Reads; reads == before {
		t.Errorf("the status has %d reads, want more", reads)
	}
	if _, text := get(t, "http://"+n.agent.Status().Telemetry+"/metrics"); strings.Contains(text, fmt.Sprintf("\nweir_consul_reads_total %d\n", before)) {
		t.Errorf("the metrics have %d reads, want more", before)
	}

	n.fake.answers(say(500, "no leader"))
	test.WriteFile(t, n.config.Docker.Socket, "nobody listens")
	n.agent.consul.Wake()
	test.Eventually(t, func() error {
		told, err := api.ReadStatus(context.Background(), n.config.StateDir)
		if err != nil {
			return err
		}
		problems := fmt.Sprint(told.Problems)
		if told.Consul.InSync || told.Workloads[0].InSync || !strings.Contains(problems, "no leader") || !strings.Contains(problems, "Docker") || told.Docker == "" {
			return fmt.Errorf("told is %+v", told)
		}
		return nil
	}, "what Consul and Docker do not answer to be told")
	address := n.agent.Status().Telemetry
	_, text := get(t, "http://"+address+"/metrics")
	for _, want := range []string{"weir_consul_in_sync 0", fmt.Sprintf(`weir_workload_in_sync{alloc_id=%q,interface="eth0",namespace="",nomad_job="",task_group=""} 0`, ids[0]),
		`weir_problems{code="consul-unreachable",severity="error"} 1`, `weir_problems{code="docker-unreachable",severity="warning"} 1`,
		`weir_problems{code="table-full",severity="warning"} 0`, fmt.Sprintf(`weir_build_info{goversion=%q,version=""} 1`, runtime.Version())} {
		if !strings.Contains(text, "\n"+want+"\n") {
			t.Errorf("metrics lack %s", want)
		}
	}
	if _, text := get(t, "http://"+address+"/health"); !strings.Contains(text, `"consul_in_sync":false`) {
		t.Errorf("health = %s, want that Consul is not in sync", text)
	}
}

func TestReadStatusWithoutAnAgent(t *testing.T) {
	if _, err := api.ReadStatus(context.Background(), t.TempDir()); !errors.Is(err, api.ErrNotRunning) {
		t.Errorf("status = %v, want %v", err, api.ErrNotRunning)
	}
}
