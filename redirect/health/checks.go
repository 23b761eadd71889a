// SPDX-License-Identifier: MPL-2.0

package health

import (
	"fmt"
	"strings"

	"golang.org/x/mod/semver"
)

// Result is the outcome of a check.
type Result string

// The results of checks.
const (
	ResultOK      Result = "ok"
	ResultWarning Result = "warning" // the node works; something may not be as it is meant
	ResultFault   Result = "fault"   // something does not work before it is put right
)

// Check is one thing that a node needs, and whether it has it. Code has a heading
// of its own in docs/runbook.md.
type Check struct {
	Group  string `json:"group"`
	Code   string `json:"code"`
	Result Result `json:"result"`
	What   string `json:"what"`
	Remedy string `json:"remedy"` // empty where the result is ok
}

// Checks collects the checks of one group.
type Checks struct {
	Group string
	List  []Check
}

// OK adds a check that found nothing wrong.
func (c *Checks) OK(code, what string, args ...any) {
	c.List = append(c.List, Check{c.Group, code, ResultOK, fmt.Sprintf(what, args...), ""})
}

// Warn adds a check that found something to look at.
func (c *Checks) Warn(code, remedy, what string, args ...any) {
	c.List = append(c.List, Check{c.Group, code, ResultWarning, fmt.Sprintf(what, args...), remedy})
}

// Fault adds a check that found what must be put right.
func (c *Checks) Fault(code, remedy, what string, args ...any) {
	c.List = append(c.List, Check{c.Group, code, ResultFault, fmt.Sprintf(what, args...), remedy})
}

// Version adds a check of a version beside the one that was tested and the least
// that works. Versions of the same minor release count as the same.
func (c *Checks) Version(code, name, version string, err error, tested, least string) {
	bare := func(version string) string { return strings.TrimPrefix(version, "v") }
	switch {
	case err != nil:
		c.Warn(code, "compare it with docs/compatibility.md", "the version of %s is not known: %v", name, err)
	case semver.Compare(version, least) < 0:
		c.Fault(code, "upgrade "+name, "%s is of version %s: transparent proxies need %s or newer", name, bare(version), bare(least))
	case semver.MajorMinor(version) == semver.MajorMinor(tested):
		c.OK(code, "%s is of version %s, Weir was tested with %s", name, bare(version), bare(tested))
	default:
		c.Warn(code, "try it on one node first; docs/compatibility.md has what was tested", "%s is of version %s, Weir was tested with %s", name, bare(version), bare(tested))
	}
}
