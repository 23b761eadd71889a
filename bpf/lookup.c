// SPDX-License-Identifier: MPL-2.0
/*
 * The sk_lookup program of the node. It runs for every SYN that reaches a
 * workload, once, and for nothing afterwards. The program type cannot ask for
 * the namespace's cookie, so each workload has a small program of its own that
 * knows it and makes a tail call to this one.
 */
#include "guard.h"
#include "kernel.h"
#include "maps.h"
#include "origin.h"
#include "verdict.h"

/* The note of a namespace's program, nineteen instructions that user space writes:
 * see redirect/program/calls.go. It calls in the same run. */
struct lookup_caller {
	__u64 context;
	__u64 cookie;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct lookup_caller);
} lookup_callers SEC(".maps");

/* The cookie of the namespace whose program made the tail call; 0 where nobody
 * can say. A lookup that the kernel makes in a process, for sock_diag, can be
 * interrupted between note and call by that of a packet. The context is on the
 * stack of the run that noted it, so that no other run has it. */
static __always_inline __u64 caller_cookie(struct bpf_sk_lookup *ctx)
{
	__u32 only = 0;
	struct lookup_caller *caller = bpf_map_lookup_elem(&lookup_callers, &only);

	if (!caller || caller->context != (__u64)(unsigned long)ctx)
		return 0;
	return caller->cookie;
}

/* The reader finds the origin of an encoded destination itself: each lookup
 * and each field of the context costs the load of this program, and so an ADD. */
static __always_inline void emit(struct bpf_sk_lookup *ctx, __u64 cookie, const struct addr *local,
				 const struct addr *remote, enum verdict verdict)
{
	struct event *event = event_reserve(count(cookie, verdict));

	if (!event)
		return;
	event->cookie = cookie;
	event->source = *remote;
	event->source_port = bpf_ntohs(ctx->remote_port);
	event->destination = *local;
	event->destination_port = ctx->local_port;
	event->verdict = verdict;
	bpf_ringbuf_submit(event, 0);
}

/* 1 for AF_INET6, which is 10, and 0 for AF_INET, which is 2, without a branch
 * that the verifier would follow twice. */
static __always_inline __u32 is_ipv6(struct bpf_sk_lookup *ctx)
{
	return ctx->family >> 3 & 1;
}
/* 1 for what came in by lo, likewise: only 0 - 1 has the top bit. */
static __always_inline __u32 is_outbound(struct bpf_sk_lookup *ctx)
{
	return ((*(volatile __u32 *)&ctx->ingress_ifindex ^ LO_IFINDEX) - 1) >> 31;
}

_Static_assert((AF_INET >> 3 & 1) == 0 && (AF_INET6 >> 3 & 1) == 1, "families");

/* Both families' fields in one: those of the other family read as 0. */
#define ADDR_OF_LOOKUP(ctx, side)                                                                  \
	((struct addr){ {                                                                          \
		(ctx)->side##_ip6[0],                                                              \
		(ctx)->side##_ip6[1],                                                              \
		(ctx)->side##_ip6[2] | (bpf_htonl(0xffff) & (is_ipv6(ctx) - 1)),                   \
		(ctx)->side##_ip6[3] | (ctx)->side##_ip4,                                          \
	} })

_Static_assert(LISTENER_OUTBOUND6 == LISTENER_OUTBOUND4 + 1, "roles");
_Static_assert(LISTENER_INBOUND6 == LISTENER_INBOUND4 + 1, "roles");
_Static_assert(LISTENER_OUTBOUND4 == LISTENER_INBOUND4 - 2, "roles");

/* Hands the connection to the first listener of the role. All of a role's
 * listeners take its family, so one that cannot be assigned has just closed,
 * and would have reset the connection a moment later. Behind them is the gate,
 * which holds what comes before the proxy has listened. */
static __always_inline bool assign(struct bpf_sk_lookup *ctx, __u64 cookie, __u32 role, __u16 port)
{
	struct listener_key key = { .cookie = cookie, .role = role, .port = port };
	struct bpf_sock *sk = NULL;
	long err;

	for (__u32 slot = 0; slot <= GATE_SLOT; slot++) {
		barrier_var(slot); /* a counter on the stack is unbounded to the verifier */
		key.slot = slot;
		sk = bpf_map_lookup_elem(&listeners, &key);
		if (sk)
			break;
	}
	if (!sk)
		return false;
	err = bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return !err;
}

/* What dials an upstream's port on which nobody has listened yet waits in the gate.
 * Such a row goes with the first listener there, see on_listen. */
static __always_inline void hold(struct bpf_sk_lookup *ctx, __u64 cookie)
{
	struct listener_key key = {
		.cookie = cookie,
		.role = LISTENER_UPSTREAM,
		.port = ctx->local_port,
		.slot = GATE_SLOT,
	};
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &key);

	if (!sk)
		return;
	bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
}

/* Who dials is at home here: a connection to an own address comes by lo, but
 * with the device of that address as its ingress. From outside such a source is
 * a forgery, whose answers stay in the namespace. */
static __always_inline bool from_inside(const struct snapshot *snapshot, const struct addr *local,
					const struct addr *remote)
{
	return addr_equal(local, remote) || addr_is_local(remote) || is_own(snapshot, remote);
}

/* The outbound port of the proxy that owns the origin of an index, or 0 for the
 * first. The rows in force say so, not what was interned: an owner may change,
 * an index stays. */
static __always_inline __u16 owner(const struct snapshot *snapshot, __u32 index)
{
	struct index_key key = { .cookie = snapshot->cookie, .index = index };
	struct addr *origin = bpf_map_lookup_elem(&indexes, &key);
	struct address *address = origin ? snapshot_address(snapshot, origin) : NULL;

	return address && address->kind == ADDRESS_PROXY ? address->port : 0;
}

/* What may come in beside the proxy's listeners and the excluded ports. */
static __always_inline enum verdict guard(struct bpf_sk_lookup *ctx,
					  const struct snapshot *snapshot,
					  const struct addr *remote, __u16 inbound_port)
{
	if (ctx->protocol != IPPROTO_TCP)
		return guard_datagram(snapshot, ctx->local_port, remote,
				      bpf_ntohs(ctx->remote_port));
	return ctx->local_port == inbound_port ? VERDICT_DIRECT : guard_refusal(snapshot->config);
}

/* The rules of a new connection to this namespace; the first that matches
 * decides. VERDICT_LOCAL and VERDICT_REDIRECTED are counted where they were
 * dialled, and so is a redirect without a proxy: who finds none here counted as
 * redirected a moment before, waits in the gate, or is a late packet. There is one search for a
 * listener, not one a direction: the verifier walks every slot of each, and that is most of what an
 * ADD costs. */
static __always_inline enum verdict decide(struct bpf_sk_lookup *ctx,
					   const struct snapshot *snapshot,
					   const struct addr *local, const struct addr *remote)
{
	/* Read twice: a branch on one tells the verifier nothing of the other. */
	__u32 outbound = is_outbound(ctx), hidden_outbound = is_outbound(ctx);
	const struct config *config = snapshot->config;
	bool tcp = ctx->protocol == IPPROTO_TCP;
	__u16 port = ctx->local_port;
	bool encoded, assigned;
	__u16 inbound_port;
	__u32 index;

	barrier_var(hidden_outbound); /* nor clang */
	encoded = tcp && addr_decode(local, &index);
	if (outbound) {
		/* What stays in the namespace is not the mesh's business. */
		if (!encoded) {
			if (tcp)
				hold(ctx, snapshot->cookie);
			return VERDICT_LOCAL;
		}
		if (!config)
			return VERDICT_REFUSED_TABLE;
		port = config->outbound_port;
		if (config->flags & CONFIG_PROXIES)
			port = owner(snapshot, index) ?: port;
	} else {
		/* It would bring the proxy another connection's origin. */
		if (encoded)
			return VERDICT_REFUSED_ENCODED;
		/* Rows that are lost, or on their way out behind this program, must
		 * not open what they closed. */
		if (!config)
			return VERDICT_REFUSED_TABLE;
		tcp = tcp && (config->flags & CONFIG_TRANSPARENT);
		if (!tcp && !(config->flags & (CONFIG_AUDIT | CONFIG_ENFORCE)))
			return VERDICT_DIRECT;
		if (from_inside(snapshot, local, remote))
			return VERDICT_LOCAL;
		inbound_port = config->inbound_port;
		if ((config->flags & CONFIG_PORTS_IN) &&
		    snapshot_excludes_port(snapshot, EXCLUSION_PORT_IN, port))
			return VERDICT_INBOUND_EXCLUDED;
		if (config->flags & (CONFIG_PROXIES | CONFIG_LISTENERS)) {
			__u32 *row = snapshot_row(snapshot, EXCLUSION_SERVICE, port);

			if (row)
				inbound_port = *row;
			/* An exposed port is for the proxy's listener there, or
			 * for nobody. Of plain workloads no other one is looked for. */
			if (row && *row & PROXY_LISTENS_HERE)
				tcp = ctx->protocol == IPPROTO_TCP;
		}
		if (!tcp)
			return guard(ctx, snapshot, remote, inbound_port);
		if (!inbound_port)
			return VERDICT_REFUSED_INBOUND_UNKNOWN;
		port = inbound_port;
	}
	assigned = assign(ctx, snapshot->cookie,
			  LISTENER_INBOUND4 - 2 * hidden_outbound + is_ipv6(ctx), port);
	if (!hidden_outbound && !(config->flags & CONFIG_TRANSPARENT))
		return assigned ? VERDICT_INBOUND_EXCLUDED : guard_refusal(config);
	if (assigned)
		return VERDICT_INBOUND - hidden_outbound * (VERDICT_INBOUND - VERDICT_REDIRECTED);
	/* Never the application itself, nor whatever task listens on the port
	 * that was dialled: that would be plain text past the mesh. */
	return VERDICT_REFUSED_INBOUND_NO_PROXY -
	       hidden_outbound * (VERDICT_REFUSED_INBOUND_NO_PROXY - VERDICT_LISTENER_GONE);
}

/* The same verdict, but any verdict to the verifier: it would otherwise walk
 * what follows once for each. No address family has the bits that are mixed in. */
static __always_inline enum verdict hide_from_verifier(struct bpf_sk_lookup *ctx,
						       enum verdict verdict)
{
	return (verdict ^ (*(volatile __u32 *)&ctx->family >> 8)) & 63;
}
_Static_assert(VERDICT_MAX <= 64, "verdicts");

SEC("sk_lookup")
int weir_lookup(struct bpf_sk_lookup *ctx)
{
	struct addr local = ADDR_OF_LOOKUP(ctx, local);
	struct addr remote = ADDR_OF_LOOKUP(ctx, remote);
	__u64 cookie = caller_cookie(ctx);
	enum verdict verdict;
	struct snapshot snapshot;

	if (!cookie)
		return SK_DROP;
	snapshot_open(&snapshot, cookie);
	verdict = hide_from_verifier(ctx, decide(ctx, &snapshot, &local, &remote));
	if (ctx->protocol == IPPROTO_UDP && snapshot.config &&
	    (snapshot.config->flags & CONFIG_EGRESS) &&
	    (verdict == VERDICT_DIRECT || verdict == VERDICT_INBOUND_EXCLUDED) &&
	    snapshot_excludes_port(&snapshot, EXCLUSION_PORT_IN, ctx->local_port))
		inbound_remember(&snapshot, ctx->local_port, &remote, bpf_ntohs(ctx->remote_port));
	if (verdict == VERDICT_LOCAL || verdict == VERDICT_REDIRECTED || verdict == VERDICT_DIRECT)
		return SK_PASS;
	emit(ctx, snapshot.cookie, &local, &remote, verdict);
	return verdict >= VERDICT_LISTENER_GONE ? SK_DROP : SK_PASS;
}

char LICENSE[] SEC("license") = "Dual MPL/GPL";
