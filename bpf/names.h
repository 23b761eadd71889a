/* SPDX-License-Identifier: MPL-2.0 */
/* The names of a socket as its application should see them. */
#ifndef WEIR_NAMES_H
#define WEIR_NAMES_H

#include "kernel.h"
#include "maps.h"
#include "origin.h"

/* The name that an application should see for `seen`: what it dialled. Only
 * the dialling socket has a row or an encoded peer; an accepted one has the
 * workload's own address there. */
static __always_inline bool restore_peer(struct bpf_sock_addr *ctx, struct addr *seen, __u16 *port,
					 bool encoded)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);
	struct dialled *dialled;
	struct addr *origin;

	if (!ctx->sk)
		return false;
	origin = encoded ? origin_resolve(cookie, seen) : NULL;
	if (origin) {
		*seen = *origin;
		return true;
	}
	if (!bpf_map_lookup_elem(&workloads, &cookie))
		return false;
	dialled = bpf_sk_storage_get(&dials, ctx->sk, NULL, 0);
	if (!dialled || dialled->actual_port != *port || !addr_equal(&dialled->actual, seen))
		return false;
	*seen = dialled->addr;
	*port = dialled->port;
	return true;
}

static __always_inline int restore_peer4(struct bpf_sock_addr *ctx, bool encoded)
{
	struct addr seen = addr_of_ip4(ctx->user_ip4);
	__u16 port = bpf_ntohs(ctx->user_port);

	if (restore_peer(ctx, &seen, &port, encoded) && addr_is_mapped(&seen)) {
		ctx->user_ip4 = seen.word[3];
		ctx->user_port = bpf_htons(port);
	}
	return 1;
}

static __always_inline int restore_peer6(struct bpf_sock_addr *ctx, bool encoded)
{
	struct addr seen = ADDR_OF_CTX(ctx->user_ip6);
	__u16 port = bpf_ntohs(ctx->user_port);

	if (restore_peer(ctx, &seen, &port, encoded)) {
		ctx->user_ip6[0] = seen.word[0];
		ctx->user_ip6[1] = seen.word[1];
		ctx->user_ip6[2] = seen.word[2];
		ctx->user_ip6[3] = seen.word[3];
		ctx->user_port = bpf_htons(port);
	}
	return 1;
}

/* A native IPv6 connection that went to a proxy on IPv4 has the workload's IPv4
 * address for its own; the application sees the IPv6 one beside its peer. */
static __always_inline int restore_own6(struct bpf_sock_addr *ctx)
{
	struct addr local = ADDR_OF_CTX(ctx->user_ip6);
	struct bpf_sock *sk = ctx->sk;
	struct addr peer, *origin;
	struct address *own;
	struct snapshot snapshot;
	__u32 index;

	if (!addr_is_mapped(&local) || !sk)
		return 1;
	if (!snapshot_open(&snapshot, bpf_get_netns_cookie(ctx)) || !snapshot.config)
		return 1;
	peer = ADDR_OF_CTX(sk->dst_ip6);
	origin = origin_resolve(snapshot.cookie, &peer);
	if (!origin || addr_is_mapped(origin) || !addr_decode(&peer, &index))
		return 1;
	peer = addr_encode6(snapshot.config->flags & CONFIG_SOURCES ? index & ~SLICE_MASK : 0);
	own = snapshot_address(&snapshot, &peer);
	if (!own || own->kind != ADDRESS_SOURCE)
		return 1;
	ctx->user_ip6[0] = own->listener.word[0];
	ctx->user_ip6[1] = own->listener.word[1];
	ctx->user_ip6[2] = own->listener.word[2];
	ctx->user_ip6[3] = own->listener.word[3];
	return 1;
}

#endif
