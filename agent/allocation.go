// SPDX-License-Identifier: MPL-2.0

package agent

import (
	"path/filepath"
	"slices"
	"strings"

	"github.com/weirmesh/weir/redirect"
)

// allocation is everything that is known of one attachment when its desired state
// is worked out.
type allocation struct {
	attachment
	Cached  bool             // libcni knows it
	Live    bool             // Nomad or Docker have its namespace
	Record  *redirect.Record // nil: not on record
	Proxies []proxy          // of the allocation, sorted by ID

	Withdrawn bool // what counted so far is seen to be no proxy of the allocation's, and there is no other
}

// proxyUID is that under which the allocation's proxies run.
func (s allocation) proxyUID(standard uint32) uint32 {
	if s.Record != nil {
		return s.Record.Request.ProxyUID
	}
	return standard
}

// over reports an attachment that libcni alone knows: nothing can run in it any
// more.
func (s allocation) over() bool {
	return s.Record == nil && s.Cached && !s.Live && s.NetNS != "" && isGone(s.NetNS)
}

// mostDirectories bounds how many directories of namespaces are watched; a node
// has one or two.
const mostDirectories = 16

// directoriesOf are the directories in which the subjects' namespaces come and go.
func directoriesOf(allocations []allocation) (dirs []string) {
	for _, s := range allocations {
		dir := filepath.Dir(s.NetNS)
		if s.NetNS != "" && !strings.HasPrefix(dir, "/proc") && !slices.Contains(dirs, dir) && len(dirs) < mostDirectories {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}
