/* SPDX-License-Identifier: MPL-2.0 */
/* Counts what a process asked for, and tells of it. */
#ifndef WEIR_EMIT_H
#define WEIR_EMIT_H

#include "rules.h"
#include "verdict.h"

static __always_inline void emit(const struct snapshot *snapshot, const struct dial *dial,
				 enum verdict verdict)
{
	struct event *event = event_reserve(count(snapshot->cookie, verdict));

	if (!event)
		return;
	event->cookie = snapshot->cookie;
	event->cgroup = dial->cgroup;
	event->uid = dial->uid;
	event->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(event->comm, sizeof(event->comm));
	event->origin = dial->origin;
	event->origin_port = dial->port;
	event->destination = dial->destination;
	event->destination_port = dial->destination_port;
	event->verdict = verdict;
	event->protocol = dial->protocol;
	event->family = dial->made_family;
	event->socket_type = dial->made_type;
	bpf_ringbuf_submit(event, 0);
}

#endif
