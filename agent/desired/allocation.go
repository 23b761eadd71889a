// SPDX-License-Identifier: MPL-2.0

package desired

import (
	"cmp"
	"path/filepath"
	"slices"
	"strings"

	"github.com/weirmesh/weir/agent/discover"
	"github.com/weirmesh/weir/agent/registration"
	"github.com/weirmesh/weir/redirect/inspect"
	"github.com/weirmesh/weir/redirect/workload"
)

// Allocation is everything that is known of one attachment when its desired state
// is worked out.
type Allocation struct {
	discover.Attachment
	Cached  bool                 // libcni knows it
	Live    bool                 // Nomad or Docker have its namespace
	Record  *inspect.Record      // nil: not on record
	Proxies []registration.Proxy // of the allocation, sorted by ID

	Withdrawn bool // what counted so far is seen to be no proxy of the allocation's, and there is no other
}

// ProxyUID is that under which the allocation's proxies run.
func (s Allocation) ProxyUID(standard uint32) uint32 {
	if s.Record != nil {
		return s.Record.Request.ProxyUID
	}
	return standard
}

// Over reports an attachment that libcni alone knows: nothing can run in it any
// more.
func (s Allocation) Over() bool {
	return s.Record == nil && s.Cached && !s.Live && s.NetNS != "" && discover.IsGone(s.NetNS)
}

// Urgency is the lower the sooner its turn should be: what is not under Weir or not
// configured yet comes first, what went wrong before last.
func (s Allocation) Urgency(failing bool) int {
	switch {
	case failing:
		return 3
	case s.Record == nil:
		return 0
	case !s.Configured():
		return 1
	}
	return 2
}

// SortByUrgency puts the most urgent first, and keeps the order of those that are as urgent.
func SortByUrgency(allocations []Allocation, failing func(workload.AttachmentID) bool) {
	slices.SortStableFunc(allocations, func(s, t Allocation) int {
		return cmp.Compare(s.Urgency(failing(s.Key)), t.Urgency(failing(t.Key)))
	})
}

// Configured reports whether a mesh configuration was ever in force.
func (s Allocation) Configured() bool { return s.Record != nil && s.Record.MeshConfig.Guard != "" }

// mostDirectories bounds how many directories of namespaces are watched; a node
// has one or two.
const mostDirectories = 16

// DirectoriesOf are the directories in which the subjects' namespaces come and go.
func DirectoriesOf(allocations []Allocation) (dirs []string) {
	for _, s := range allocations {
		dir := filepath.Dir(s.NetNS)
		if s.NetNS != "" && !strings.HasPrefix(dir, "/proc") && !slices.Contains(dirs, dir) && len(dirs) < mostDirectories {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}
