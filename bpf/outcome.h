/* SPDX-License-Identifier: MPL-2.0 */
/* One connection, one outcome: it is counted where it is dialled, but for one that waits
 * in the gate. That one is counted when it leaves SYN_SENT. */
#ifndef WEIR_OUTCOME_H
#define WEIR_OUTCOME_H

#include "emit.h"
#include "kernel.h"
#include "maps.h"
#include "rules.h"
#include "verdict.h"

/* Keeps who dials, for sockops to tell when the connection leaves the gate. False
 * where there is no memory for it. */
static __always_inline bool save_dialler(struct bpf_sock *sk, const struct dial *dial)
{
	struct binder *dialler;

	dialler = bpf_sk_storage_get(&binders, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!dialler)
		return false;
	dialler->cgroup = dial->cgroup;
	dialler->uid = dial->uid;
	dialler->pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(dialler->comm, sizeof(dialler->comm));
	dialler->flags |= BINDER_WAITS;
	return true;
}

/* Where a socket dials. */
static __always_inline struct addr remote_of(struct bpf_sock_ops *ctx)
{
	struct addr remote;

	if (ctx->family == AF_INET6) {
		remote = ADDR_OF_CTX(ctx->remote_ip6);
		barrier(); /* keeps clang from merging the branches' reads */
	} else {
		remote = addr_of_ip4(*(volatile __u32 *)&ctx->remote_ip4);
	}
	return remote;
}

/* A connection that waits in the gate asks to be told of its end. Those of foreign
 * namespaces leave by their address. */
static __always_inline void on_connect(struct bpf_sock_ops *ctx)
{
	struct addr remote = remote_of(ctx);
	struct bpf_sock *sk = ctx->sk;
	struct binder *dialler;
	__u32 index;

	if (!sk || !addr_decode(&remote, &index))
		return;
	dialler = bpf_sk_storage_get(&binders, sk, NULL, 0);
	if (dialler && dialler->flags & BINDER_WAITS)
		bpf_sock_ops_cb_flags_set(ctx,
					  ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
}

/* What became of a connection that waited in the gate. */
static __always_inline void on_outcome(struct bpf_sock_ops *ctx, enum verdict verdict)
{
	struct addr remote = remote_of(ctx);
	struct bpf_sock *sk = ctx->sk;
	struct binder *dialler;

	if (!sk)
		return;
	dialler = bpf_sk_storage_get(&binders, sk, NULL, 0);
	if (!dialler || !(dialler->flags & BINDER_WAITS))
		return;
	dialler->flags &= ~BINDER_WAITS;
	emit_socket(bpf_get_netns_cookie(ctx), dialler, &remote, bpf_ntohl(ctx->remote_port),
		    verdict);
}

#endif
