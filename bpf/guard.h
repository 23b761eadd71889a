/* SPDX-License-Identifier: MPL-2.0 */
/* The guard's rule for datagrams that come in, and the flows that began inside:
 * their answers are no requests. */
#ifndef WEIR_GUARD_H
#define WEIR_GUARD_H

#include "maps.h"
#include "origin.h"

/* How long an answer may take, as conntrack lets a stream of datagrams rest. */
#define FLOW_TIMEOUT_NS (120ull * 1000 * 1000 * 1000)

/* Where a workload keeps a flow: one slot of its own few, so that no workload
 * can take another's. Of two flows in one slot the later is remembered. */
static __always_inline struct flow_key flow_key(__u64 cookie, const struct addr *remote,
						__u16 remote_port, __u16 local_port)
{
	__u32 hash = remote->word[0] ^ remote->word[1] ^ remote->word[2] ^ remote->word[3] ^
		     ((__u32)local_port << 16 | remote_port);

	return (struct flow_key){ .cookie = cookie, .slot = hash * 0x9e3779b1u >> FLOW_SHIFT };
}

static __always_inline bool flow_is(const struct flow *flow, const struct addr *remote,
				    __u16 remote_port, __u16 local_port)
{
	return flow->remote_port == remote_port && flow->local_port == local_port &&
	       addr_equal(&flow->remote, remote);
}

static __always_inline bool is_ephemeral(const struct config *config, __u16 port)
{
	return port >= config->ephemeral_first && port <= config->ephemeral_last;
}

/* Remembers a datagram of an unconnected socket. The kernel finds a connected
 * socket by itself, and the guard lets ephemeral ports be. */
static __always_inline void flow_remember(const struct snapshot *snapshot, __u16 local_port,
					  const struct addr *remote, __u16 remote_port)
{
	struct flow fresh = {
		.remote = *remote,
		.remote_port = remote_port,
		.local_port = local_port,
	};
	struct flow_key key;
	struct flow *flow;

	if (!(snapshot->config->flags & (CONFIG_AUDIT | CONFIG_ENFORCE)) || addr_is_local(remote) ||
	    is_ephemeral(snapshot->config, local_port))
		return;
	fresh.sent_ns = bpf_ktime_get_coarse_ns();
	key = flow_key(snapshot->cookie, remote, remote_port, local_port);
	flow = bpf_map_lookup_elem(&flows, &key);
	if (flow && flow_is(flow, remote, remote_port, local_port))
		flow->sent_ns = fresh.sent_ns;
	else
		bpf_map_update_elem(&flows, &key, &fresh, BPF_ANY);
}

/* Whether the workload sent a datagram the other way a short while ago. */
static __always_inline bool flow_answers(const struct snapshot *snapshot, __u16 local_port,
					 const struct addr *remote, __u16 remote_port)
{
	struct flow_key key = flow_key(snapshot->cookie, remote, remote_port, local_port);
	struct flow *flow = bpf_map_lookup_elem(&flows, &key);

	return flow && flow_is(flow, remote, remote_port, local_port) &&
	       bpf_ktime_get_coarse_ns() - flow->sent_ns < FLOW_TIMEOUT_NS;
}

/* The slot of a flow that began outside. */
static __always_inline struct flow_key inbound_flow_key(__u64 cookie, const struct addr *remote,
							__u16 remote_port, __u16 local_port)
{
	struct flow_key key = flow_key(cookie, remote, remote_port, local_port);

	key.slot += FLOW_SLOTS;
	return key;
}

/* Remembers a datagram that came in to a port which the job opens: the egress
 * guard lets its answer out. */
static __always_inline void inbound_remember(const struct snapshot *snapshot, __u16 local_port,
					     const struct addr *remote, __u16 remote_port)
{
	struct flow_key key = inbound_flow_key(snapshot->cookie, remote, remote_port, local_port);
	struct flow fresh = {
		.sent_ns = bpf_ktime_get_coarse_ns(),
		.remote = *remote,
		.remote_port = remote_port,
		.local_port = local_port,
	};

	bpf_map_update_elem(&flows, &key, &fresh, BPF_ANY);
}

/* Whether such a datagram came a short while ago from where this one goes. */
static __always_inline bool is_answer(const struct snapshot *snapshot, __u16 local_port,
				      const struct addr *remote, __u16 remote_port)
{
	struct flow_key key = inbound_flow_key(snapshot->cookie, remote, remote_port, local_port);
	struct flow *flow = bpf_map_lookup_elem(&flows, &key);

	return flow && flow_is(flow, remote, remote_port, local_port) &&
	       bpf_ktime_get_coarse_ns() - flow->sent_ns < FLOW_TIMEOUT_NS;
}

static __always_inline enum verdict guard_refusal(const struct config *config)
{
	return config->flags & CONFIG_ENFORCE ? VERDICT_REFUSED_GUARD : VERDICT_GUARD_AUDIT;
}

/* What comes in to no excluded port. A datagram to an ephemeral port may be the
 * answer to one from here, of which nothing is kept: it is let in, and counted. */
static __always_inline enum verdict guard_datagram(const struct snapshot *snapshot,
						   __u16 local_port, const struct addr *remote,
						   __u16 remote_port)
{
	if (is_ephemeral(snapshot->config, local_port))
		return VERDICT_GUARD_EPHEMERAL;
	if (flow_answers(snapshot, local_port, remote, remote_port))
		return VERDICT_DIRECT;
	return guard_refusal(snapshot->config);
}

/* The source is one of the workload's own addresses. From outside it is forged. */
static __always_inline bool is_own(const struct snapshot *snapshot, const struct addr *addr)
{
	struct address *address = snapshot_address(snapshot, addr);

	return address && address->kind == ADDRESS_OWN;
}

#endif
