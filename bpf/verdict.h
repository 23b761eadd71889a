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
	case VERDICT_REFUSED_NO_PROXY:
		return ECONNREFUSED;
	case VERDICT_REFUSED_EGRESS_SOCKET:
		return EPERM;
	default:
		return ENETUNREACH;
	}
}

static __always_inline struct verdict_counts *count(__u64 cookie, enum verdict verdict)
{
	struct verdict_counts *counts = bpf_map_lookup_elem(&verdicts, &cookie);

	if (counts && verdict < VERDICT_MAX)
		__sync_fetch_and_add(&counts->count[verdict], 1);
	return counts;
}

/* Whether a workload may have room in the ring. One that floods it takes none
 * from the others, however slow the reader is. Two CPUs at once may count one
 * event; a share is no limit to be kept to the last one. */
static __always_inline bool event_allowed(struct verdict_counts *counts, __u64 now)
{
	__u64 due = *(volatile __u64 *)&counts->event_due;

	if (due < now)
		due = now;
	if (due - now >= EVENT_BURST * EVENT_INTERVAL_NS)
		return bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) < EVENTS_FREE_FOR_ALL;
	*(volatile __u64 *)&counts->event_due = due + EVENT_INTERVAL_NS;
	return true;
}

/* A record to fill while somebody reads events, else NULL. The reader extends
 * the deadline; one that dies lets it pass, and events cost little again. What
 * finds no room, or no reader at the moment, is counted as lost: the event,
 * never the connection. */
static __always_inline struct event *event_reserve(struct verdict_counts *counts)
{
	__u32 zero = 0;
	struct control *node = bpf_map_lookup_elem(&control, &zero);
	struct event *event;
	__u64 now;

	if (!node || !node->events_until_ns || !counts)
		return NULL;
	now = bpf_ktime_get_ns();
	event = NULL;
	if (now < node->events_until_ns && event_allowed(counts, now))
		event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (!event) {
		__sync_fetch_and_add(&counts->events_lost, 1);
		return NULL;
	}
	__builtin_memset(event, 0, sizeof(*event));
	event->time_ns = now;
	return event;
}

/* Tells of a socket by what is kept of whose it is: one that may not bind, or gets no
 * connections of the proxy, by where it is; one that waited in the gate by where it
 * dials, encoded. Without `binder` it is older than the workload. */
static __always_inline void emit_socket(__u64 cookie, const struct binder *binder,
					const struct addr *at, __u16 port, enum verdict verdict)
{
	struct event *event = event_reserve(count(cookie, verdict));

	if (!event)
		return;
	event->cookie = cookie;
	event->origin = *at;
	event->origin_port = port;
	event->destination = *at;
	event->destination_port = port;
	event->verdict = verdict;
	if (binder) {
		event->cgroup = binder->cgroup;
		event->uid = binder->uid;
		event->pid = binder->pid;
		__builtin_memcpy(event->comm, binder->comm, sizeof(event->comm));
	}
	bpf_ringbuf_submit(event, 0);
}

#endif
