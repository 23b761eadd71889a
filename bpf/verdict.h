/* SPDX-License-Identifier: MPL-2.0 */
/* Every outcome has a name and a count. Go has the same list; a test fails
 * where the two differ. */
#ifndef WEIR_VERDICT_H
#define WEIR_VERDICT_H

#include <stdbool.h>
#include "kernel.h"
#include "maps.h"

/* Whether the verdict ends the connection, as one does that nobody thought of. */
static __always_inline bool is_refusal(enum verdict verdict)
{
	return verdict >= VERDICT_FIRST_REFUSED;
}

/* What the application is told of a refusal. */
static __always_inline int errno_of(enum verdict verdict)
{
	switch (verdict) {
	case VERDICT_REFUSED_ENCODED:
		return ECONNREFUSED;
	default:
		return ENETUNREACH;
	}
}

static __always_inline void count(__u64 cookie, enum verdict verdict)
{
	struct verdict_counts *counts = bpf_map_lookup_elem(&verdicts, &cookie);

	if (counts && verdict < VERDICT_MAX)
		__sync_fetch_and_add(&counts->count[verdict], 1);
}

/* A record to fill while somebody reads events, else NULL. The reader extends
 * the deadline; one that dies lets it pass, and events cost nothing again. A
 * full ring loses the event, never the connection. */
static __always_inline struct event *event_reserve(void)
{
	__u32 zero = 0;
	struct control *node = bpf_map_lookup_elem(&control, &zero);
	struct event *event;
	__u64 now;

	if (!node || !node->events_until_ns)
		return NULL;
	now = bpf_ktime_get_ns();
	if (now >= node->events_until_ns)
		return NULL;
	event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event)
		return NULL;
	__builtin_memset(event, 0, sizeof(*event));
	event->time_ns = now;
	return event;
}

#endif
