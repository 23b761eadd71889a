// SPDX-License-Identifier: MPL-2.0
/*
 * A connection meets these programs in this order. All are attached once per
 * node at the root of cgroup v2 and leave a socket of a foreign network
 * namespace as it is after one map lookup.
 *
 *   application                              proxy (Envoy)
 *   -----------                              -------------
 *                                            bind     weir_bind4/6    who binds
 *                                            listen   weir_sockops    register
 *   connect   weir_connect4/6   decide, rewrite
 *             weir_sockops      what became of one that waits for the proxy
 *   sendto    weir_sendmsg4/6   DNS, and the egress guard
 *             ~~~~~~~~ lo ~~~~~~~~>          SYN      weir_lookup     (lookup.c)
 *                                            accept
 *                                            SO_ORIGINAL_DST  weir_getsockopt
 *   getpeername  weir_peername4/6, getsockname  weir_sockname6
 *   recvfrom     weir_recvmsg4/6  DNS only
 *   setsockopt   weir_setsockopt  no option that chooses another way
 *   socket       weir_socket      the egress guard: no protocol that passes the rest
 */
#include "egress.h"
#include "emit.h"
#include "guard.h"
#include "kernel.h"
#include "maps.h"
#include "names.h"
#include "options.h"
#include "origin.h"
#include "outcome.h"
#include "rules.h"
#include "verdict.h"

static __always_inline int refuse(int errno)
{
	bpf_set_retval(-errno);
	return 0;
}

/* Keeps what was dialled where the new address does not say it. A socket that
 * connects again without a rewrite must not show the former peer. */
static __always_inline void save_original_peer(struct bpf_sock *sk, const struct dial *dial,
					       bool rewritten)
{
	void *owner = kernel_owner(sk);
	struct dialled *dialled;

	if (!rewritten) {
		bpf_sk_storage_delete(&dials, owner);
		return;
	}
	dialled = bpf_sk_storage_get(&dials, owner, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!dialled)
		return;
	dialled->addr = dial->origin;
	dialled->port = dial->port;
	dialled->actual = dial->destination;
	dialled->actual_port = dial->destination_port;
}

static __always_inline bool is_tcp(__u32 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP;
}

static __always_inline bool is_udp(__u32 protocol)
{
	return protocol == IPPROTO_UDP || protocol == IPPROTO_UDPLITE;
}

/* One body for connect and, with `datagram`, for an unconnected send. Returns
 * 1 to go on, 0 to refuse; *rewritten says that dial->destination counts. */
static __always_inline int redirect(struct bpf_sock_addr *ctx, struct dial *dial, bool datagram,
				    bool *rewritten)
{
	struct bpf_sock *sk = ctx->sk;
	enum verdict verdict;
	struct snapshot snapshot;

	*rewritten = false;
	if (!sk || !snapshot_open(&snapshot, bpf_get_netns_cookie(ctx)))
		return 1;
	dial->destination = dial->origin;
	dial->destination_port = dial->port;
	dial->cgroup = bpf_get_current_cgroup_id();
	dial->protocol = datagram ? IPPROTO_UDP : ctx->protocol;
	if (datagram || is_udp(ctx->protocol)) {
		dial->uid = (__u32)bpf_get_current_uid_gid(); /* for the event only */
		verdict = decide_udp(sk, &snapshot, dial, datagram);
		if (verdict == VERDICT_UDP && (snapshot.config->flags & CONFIG_EGRESS)) {
			dial->uid = kernel_uid_of_addr(ctx);
			verdict = decide_egress(sk, &snapshot, dial);
		}
	} else if (is_tcp(ctx->protocol)) {
		dial->uid = kernel_uid(sk);
		verdict = decide(sk, &snapshot, dial);
	} else {
		return 1;
	}
	verdict = check_reachable(sk, dial, datagram, verdict);
	if (datagram && snapshot.config && !is_refusal(verdict))
		flow_remember(&snapshot, sk->src_port, &dial->destination, dial->destination_port);
	/* A datagram that is left alone says nothing of the ones before it. */
	if (datagram && verdict == VERDICT_UDP)
		return 1;
	if (!dial->waits || !save_dialler(sk, dial))
		emit(&snapshot, dial, verdict);
	if (is_refusal(verdict))
		return refuse(errno_of(verdict));
	*rewritten = verdict == VERDICT_REDIRECTED || verdict == VERDICT_UPSTREAM ||
		     verdict == VERDICT_DNS;
	if (datagram && !*rewritten)
		return 1;
	/* An encoded destination says itself what was dialled, and is resolved before a row
	 * is looked at: what a former connect left need not go, and shows nothing. */
	if (verdict != VERDICT_REDIRECTED)
		save_original_peer(sk, dial, *rewritten);
	return 1;
}

static __always_inline int redirect4(struct bpf_sock_addr *ctx, bool datagram)
{
	struct dial dial = {
		.origin = addr_of_ip4(ctx->user_ip4),
		.port = bpf_ntohs(ctx->user_port),
		.family = AF_INET,
	};
	bool rewritten;
	int ret = redirect(ctx, &dial, datagram, &rewritten);

	if (rewritten) {
		ctx->user_ip4 = dial.destination.word[3];
		ctx->user_port = bpf_htons(dial.destination_port);
	}
	return ret;
}

static __always_inline int redirect6(struct bpf_sock_addr *ctx, bool datagram)
{
	struct dial dial = {
		.origin = ADDR_OF_CTX(ctx->user_ip6),
		.port = bpf_ntohs(ctx->user_port),
		.family = AF_INET6,
	};
	bool rewritten;
	int ret = redirect(ctx, &dial, datagram, &rewritten);

	if (rewritten) {
		ctx->user_ip6[0] = dial.destination.word[0];
		ctx->user_ip6[1] = dial.destination.word[1];
		ctx->user_ip6[2] = dial.destination.word[2];
		ctx->user_ip6[3] = dial.destination.word[3];
		ctx->user_port = bpf_htons(dial.destination_port);
	}
	return ret;
}

SEC("cgroup/connect4")
int weir_connect4(struct bpf_sock_addr *ctx)
{
	return redirect4(ctx, false);
}

SEC("cgroup/connect6")
int weir_connect6(struct bpf_sock_addr *ctx)
{
	return redirect6(ctx, false);
}

SEC("cgroup/sendmsg4")
int weir_sendmsg4(struct bpf_sock_addr *ctx)
{
	return redirect4(ctx, true);
}

SEC("cgroup/sendmsg6")
int weir_sendmsg6(struct bpf_sock_addr *ctx)
{
	return redirect6(ctx, true);
}

SEC("cgroup/getpeername4")
int weir_peername4(struct bpf_sock_addr *ctx)
{
	return restore_peer4(ctx, true);
}

SEC("cgroup/getpeername6")
int weir_peername6(struct bpf_sock_addr *ctx)
{
	return restore_peer6(ctx, true);
}

SEC("cgroup/getsockname6")
int weir_sockname6(struct bpf_sock_addr *ctx)
{
	return restore_own6(ctx);
}

SEC("cgroup/recvmsg4")
int weir_recvmsg4(struct bpf_sock_addr *ctx)
{
	return restore_peer4(ctx, false);
}

SEC("cgroup/recvmsg6")
int weir_recvmsg6(struct bpf_sock_addr *ctx)
{
	return restore_peer6(ctx, false);
}

/* Who binds: sockops, which registers listeners, runs without a process. */
static __always_inline int bind(struct bpf_sock *sk, const struct addr *local)
{
	struct binder who = {}, *binder;
	struct snapshot snapshot;
	__u32 index;

	if (!snapshot_open(&snapshot, bpf_get_netns_cookie(sk)) || !is_tcp(sk->protocol))
		return 1;
	who.uid = kernel_uid_read((struct sock *)sk); /* the context is the kernel's socket */
	if (who.uid == UID_NONE)
		who.uid = bpf_get_current_uid_gid(); /* a subflow of MPTCP, which has no file */
	who.cgroup = bpf_get_current_cgroup_id();
	who.pid = bpf_get_current_pid_tgid() >> 32;
	bpf_get_current_comm(who.comm, sizeof(who.comm));
	if (conflicts_with_proxy(&snapshot, sk->src_port, who.uid, who.cgroup)) {
		emit_socket(snapshot.cookie, &who, local, sk->src_port,
			    VERDICT_REFUSED_LISTENER_IDENTITY);
		return refuse(EADDRINUSE);
	}
	/* A source in the range would show a peer that nobody dialled. */
	if (addr_decode(local, &index)) {
		emit_socket(snapshot.cookie, &who, local, sk->src_port, VERDICT_REFUSED_ENCODED);
		return refuse(EADDRNOTAVAIL);
	}
	binder = bpf_sk_storage_get(&binders, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (binder)
		*binder = who;
	return 1;
}

SEC("cgroup/post_bind4")
int weir_bind4(struct bpf_sock *sk)
{
	struct addr local = addr_of_ip4(*(volatile __u32 *)&sk->src_ip4);

	return bind(sk, &local);
}

SEC("cgroup/post_bind6")
int weir_bind6(struct bpf_sock *sk)
{
	struct addr local = ADDR_OF_CTX(sk->src_ip6);

	return bind(sk, &local);
}

/* Puts a listener into the first free slot of a role. The slots hold workers
 * and both sides of a hot restart; an occupied one is never taken over. Global
 * for the verifier's sake. */
__noinline int register_listener(struct bpf_sock_ops *ctx, __u64 cookie, __u32 role)
{
	struct listener_key key = { .cookie = cookie, .role = role, .port = ctx->local_port };
	int err = -EEXIST;

	for (__u32 slot = 0; slot < LISTENER_SLOTS && err == -EEXIST; slot++) {
		barrier_var(slot);
		key.slot = slot;
		err = bpf_sock_hash_update(ctx, &listeners, &key, BPF_NOEXIST);
	}
	return err;
}

static __always_inline void on_listen(struct bpf_sock_ops *ctx, const struct snapshot *snapshot)
{
	struct addr local = addr_of_ip4(*(volatile __u32 *)&ctx->local_ip4);
	enum verdict refusal = VERDICT_REFUSED_LISTENER_IDENTITY;
	bool outbound, exposed, take4 = true, take6 = false;
	__u64 cookie = snapshot->cookie;
	struct bpf_sock *sk = ctx->sk;
	struct binder *binder;
	struct proxy *proxy;
	__u32 seat;
	int err = 0;

	if (!sk)
		return;
	if (!is_proxy_port(snapshot, ctx->local_port, &seat, &outbound, &exposed)) {
		struct listener_key held = {
			.cookie = cookie,
			.role = LISTENER_UPSTREAM,
			.port = ctx->local_port,
			.slot = GATE_SLOT,
		};

		bpf_map_delete_elem(&listeners, &held);
		return;
	}
	if (ctx->family == AF_INET6) {
		local = ADDR_OF_CTX(ctx->local_ip6);
		barrier(); /* keeps clang from merging the branches' reads */
		take4 = addr_is_mapped(&local) ||
			(addr_is_unspecified(&local) && !kernel_v6only(sk));
		take6 = !addr_is_mapped(&local);
	}
	binder = binder_of(sk);
	/* 127.0.0.2:15001 is no outbound listener of Consul's. */
	if (outbound && !addr_is_unspecified(&local) && !addr_is_first_loopback(&local)) {
		refusal = VERDICT_REFUSED_LISTENER_ADDRESS;
		goto refused;
	}
	/* What the proxy keeps to the namespace is not opened to others. */
	if (exposed && addr_is_local(&local) && !addr_is_unspecified(&local))
		return;
	proxy = proxy_at(cookie, seat);
	if (!proxy || !binder || binder->uid != snapshot->config->proxy_uid ||
	    !learn_proxy(proxy, binder))
		goto refused;
	if (take4)
		err = register_listener(ctx, cookie,
					outbound ? LISTENER_OUTBOUND4 : LISTENER_INBOUND4);
	if (take6 && !err)
		err = register_listener(ctx, cookie,
					outbound ? LISTENER_OUTBOUND6 : LISTENER_INBOUND6);
	if (err) {
		refusal = VERDICT_REFUSED_LISTENER_TABLE;
		goto refused;
	}
	if (outbound)
		__sync_fetch_and_or((__u32 *)&proxy->flags,
				    (take4 ? PROXY_LISTENS4 : 0) | (take6 ? PROXY_LISTENS6 : 0));
	binder->flags |= outbound ? BINDER_REGISTERED | BINDER_OUTBOUND : BINDER_REGISTERED;
	binder->seat = seat;
	__sync_fetch_and_add(&proxy->listeners, 1);
	if (outbound)
		__sync_fetch_and_add(&proxy->outbound, 1);
	bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	count(cookie, VERDICT_LISTENER);
	return;
refused:
	emit_socket(cookie, binder, &local, ctx->local_port, refusal);
}

static __always_inline void on_close(struct bpf_sock_ops *ctx, __u64 cookie)
{
	struct bpf_sock *sk = ctx->sk;
	struct binder *binder;
	struct proxy *proxy;
	bool outbound;

	if (!sk)
		return;
	binder = bpf_sk_storage_get(&binders, sk, NULL, 0);
	if (!binder || !(binder->flags & BINDER_REGISTERED))
		return;
	outbound = binder->flags & BINDER_OUTBOUND;
	binder->flags &= ~(BINDER_REGISTERED | BINDER_OUTBOUND);
	proxy = proxy_at(cookie, binder->seat);
	/* The seat may be another's by now. */
	if (!proxy || proxy->cgroup != binder->cgroup)
		return;
	if (outbound && proxy->outbound)
		__sync_fetch_and_add(&proxy->outbound, -1);
	if (proxy->listeners)
		__sync_fetch_and_add(&proxy->listeners, -1);
}

/* An accepted socket of a registered listener inherits the listener's flag and
 * has no use for it. The flag of anybody else's program stays. */
static __always_inline void on_accept(struct bpf_sock_ops *ctx)
{
	__u64 cookie = bpf_get_netns_cookie(ctx);

	if (bpf_map_lookup_elem(&workloads, &cookie))
		bpf_sock_ops_cb_flags_set(ctx,
					  ctx->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_STATE_CB_FLAG);
}

SEC("sockops")
int weir_sockops(struct bpf_sock_ops *ctx)
{
	struct snapshot snapshot;

	switch (ctx->op) {
	case BPF_SOCK_OPS_TCP_LISTEN_CB:
		if (snapshot_open(&snapshot, bpf_get_netns_cookie(ctx)) && snapshot.config)
			on_listen(ctx, &snapshot);
		break;
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		on_connect(ctx);
		break;
	case BPF_SOCK_OPS_STATE_CB:
		if (ctx->args[0] == BPF_TCP_LISTEN && ctx->args[1] == BPF_TCP_CLOSE)
			on_close(ctx, bpf_get_netns_cookie(ctx));
		else if (ctx->args[0] == BPF_TCP_SYN_SENT)
			on_outcome(ctx, ctx->args[1] == BPF_TCP_ESTABLISHED
						? VERDICT_REDIRECTED
						: VERDICT_REFUSED_NO_PROXY);
		break;
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		if (ctx->bpf_sock_ops_cb_flags & BPF_SOCK_OPS_STATE_CB_FLAG)
			on_accept(ctx);
		break;
	}
	return 1;
}

SEC("cgroup/getsockopt")
int weir_getsockopt(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct addr local, *origin;
	struct snapshot snapshot;

	if (ctx->optname != SO_ORIGINAL_DST || (ctx->level != SOL_IP && ctx->level != SOL_IPV6))
		goto foreign;
	if (!sk)
		goto foreign;
	if (sk->family == AF_INET6) {
		local = ADDR_OF_CTX(sk->src_ip6);
		barrier(); /* keeps clang from merging the branches' reads */
	} else {
		local = addr_of_ip4(*(volatile __u32 *)&sk->src_ip4);
	}
	/* An index is of one workload and one origin while a socket carries it, so that
	 * its row says all; the rows of what is in force are two look-ups. */
	origin = origin_resolve(bpf_get_netns_cookie(ctx), &local);
	if (origin && write_original_dst(ctx, origin, sk->src_port))
		return 1;
	if (!snapshot_open(&snapshot, bpf_get_netns_cookie(ctx)) || !snapshot.config)
		goto foreign;
	/* Inbound, sk_lookup left the local address as it was dialled. Only the
	 * proxy may be told so: for a task there was no redirect. */
	if (!origin && !addr_is_local(&local) && snapshot.config->inbound_port &&
	    kernel_uid_of_option(ctx) == snapshot.config->proxy_uid &&
	    write_original_dst(ctx, &local, sk->src_port))
		return 1;
foreign:
	/* The kernel hands over one page; a longer answer keeps its own buffer. */
	if (ctx->optlen > PAGE)
		ctx->optlen = 0;
	return 1;
}

SEC("cgroup/setsockopt")
int weir_setsockopt(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct dial dial = {};
	struct snapshot snapshot;

	if (!chooses_way(ctx))
		goto foreign;
	if (!sk || !snapshot_open(&snapshot, bpf_get_netns_cookie(ctx)))
		goto foreign;
	dial.uid = kernel_uid_of_option(ctx);
	dial.cgroup = bpf_get_current_cgroup_id();
	if (snapshot.config && !(snapshot.config->flags & CONFIG_TRANSPARENT))
		goto foreign;
	if (snapshot.config &&
	    (dials_as_proxy(&snapshot, proxy_at(snapshot.cookie, snapshot.config->seat), &dial) ||
	     is_excluded_uid(&snapshot, &dial)))
		goto foreign;
	emit(&snapshot, &dial, VERDICT_REFUSED_OPTION);
	return refuse(ENOPROTOOPT);
foreign:
	/* As in getsockopt. */
	if (ctx->optlen > PAGE)
		ctx->optlen = 0;
	return 1;
}

/* The hooks above see TCP and UDP. Whatever else sends is held where it is made. */
SEC("cgroup/sock_create")
int weir_socket(struct bpf_sock *sk)
{
	struct dial dial = {};
	struct snapshot snapshot;
	enum verdict verdict;

	if (has_hooks(sk->type, sk->protocol) ||
	    !snapshot_open(&snapshot, bpf_get_netns_cookie(sk)))
		return 1;
	dial.uid = (__u32)bpf_get_current_uid_gid();
	dial.cgroup = bpf_get_current_cgroup_id();
	dial.protocol = sk->protocol;
	dial.made_family = sk->family;
	dial.made_type = sk->type;
	verdict = decide_socket(&snapshot, &dial);
	if (verdict == VERDICT_DIRECT)
		return 1;
	emit(&snapshot, &dial, verdict);
	return is_refusal(verdict) ? refuse(errno_of(verdict)) : 1;
}

char LICENSE[] SEC("license") = "Dual MPL/GPL";
