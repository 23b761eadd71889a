// SPDX-License-Identifier: MPL-2.0

package catalog

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"time"

	"github.com/weirmesh/weir/agent/bounded"
	"github.com/weirmesh/weir/agent/catalog/failure"
	"github.com/weirmesh/weir/agent/registration"
)

// Ignored takes what an answer says of a name, and keeps nothing of it.
type Ignored struct{}

// UnmarshalJSON is that of json.Unmarshaler.
func (*Ignored) UnmarshalJSON([]byte) error { return nil }

// A question is what is asked of one service.
type question struct {
	of     registration.Service
	index  uint64 // to wait from
	unseen bool   // of the index alone
	wait   time.Duration
}

// instances is what an answer tells of a service.
type instances struct {
	index  uint64
	count  int    // those that can be seen
	oldest uint64 // Consul's index when the oldest of these came
	unseen bool   // there are others
}

// watchService returns when the instances of a service may no longer be those of
// the index, or when the time is over all the same.
//
// Consul's local agent has the servers tell it what changes of a service that is
// asked for like this, once for all who ask, and answers by itself. Instances on
// nodes that the token may not read are in no such stream: the servers answer the
// question for the index alone, for which the token needs no more.
func (c *Client) watchService(ctx context.Context, q question) (instances, error) {
	timeouts := c.Read
	if q.index > 0 && c.Config.Watch { // else there is nothing to wait for
		timeouts += q.wait + q.wait/8
	}
	var seen Headers
	ctx, cancel := context.WithTimeout(seen.Watch(ctx), timeouts)
	defer cancel()
	options, err := c.Options(ctx)
	if err != nil {
		return instances{}, err
	}
	options.Namespace, options.Partition = q.of.Namespace, q.of.Partition
	if c.Config.Watch {
		options.WaitIndex, options.WaitTime = q.index, q.wait
	}
	path := "/v1/health/service/"
	if q.unseen {
		path, options.Filter = "/v1/catalog/service/", `ServiceID == ""`
	}
	var list []struct {
		Service struct{ CreateIndex uint64 }
	}
	_, err = c.Client.Raw().Query(path+url.PathEscape(q.of.Name), &list, options)
	tooMany := errors.Is(err, bounded.ErrTooLong)
	index, noIndex := strconv.ParseUint(seen.index, 10, 64)
	if err == nil && list == nil || (err == nil || tooMany) && (noIndex != nil || index == 0) {
		err, tooMany = errors.New("the answer is empty, or has no index"), false
	}
	if err != nil && !tooMany {
		return instances{}, fmt.Errorf("watch instances of %s in Consul: %w", q.of.Label(), failure.Brief(err))
	}
	answer := instances{index: index, count: len(list), unseen: seen.Filtered || tooMany || seen.HidesFromAnonymous(options.Token, len(list))}
	for i, instance := range list {
		if i == 0 || instance.Service.CreateIndex < answer.oldest {
			answer.oldest = instance.Service.CreateIndex
		}
	}
	return answer, nil
}
