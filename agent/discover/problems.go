// SPDX-License-Identifier: MPL-2.0

package discover

import "github.com/weirmesh/weir/redirect/health"

// Problems are what is wrong with how a node's allocations are found: why none can be,
// why Docker did not answer, each empty where that is well, and what could not be read.
func Problems(blind, docker string, unreadable []string) (list []health.Problem) {
	if blind != "" {
		list = append(list, health.NewProblem(health.ProblemDiscovery,
			"see whether the agent can read cni { cache_dir } and its records in state_dir; until then nothing new is found or changed", blind))
	}
	if docker != "" {
		list = append(list, health.NewProblem(health.ProblemDocker,
			`see whether Docker runs and answers at docker { socket }; socket = "" where it is not to be asked`,
			"Docker's containers may be other ones by now: "+docker))
	}
	for _, what := range unreadable {
		list = append(list, health.NewProblem(health.ProblemStateUnreadable,
			"what was last known of it stays in force: remove it, and 'nomad alloc stop' the allocation that it is of", what))
	}
	return list
}

// LeftBehind says what became of an allocation for which Nomad made no DEL: one
// that it found ended when its client started, as after a power cut.
func LeftBehind() health.Problem {
	return health.NewProblem(health.ProblemLeftBehind, "'weir gc' takes away what is left", "it has ended and its namespace is gone, but nobody ended its network")
}

// WithoutResult says what is missing of an allocation that lives and that libcni does not know.
func WithoutResult() health.Problem {
	return health.NewProblem(health.ProblemResultMissing,
		"'nomad alloc stop' it: the one in its place has a result", "libcni has no result of it: the ports that its job maps are not known, those that were last known stay open")
}
