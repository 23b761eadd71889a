// SPDX-License-Identifier: MPL-2.0
/*
 * The least that could redirect: the hooks that a connection meets with Weir, but
 * one destination and one origin, both constants, and no table. It serves one
 * namespace and knows that by its cookie, so that it leaves everybody else's
 * sockets alone. No mesh could work with it; how far Weir is from it is what
 * Weir's rules cost.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define AF_INET 2
#define SOL_IP 0
#define SO_ORIGINAL_DST 80

struct sockaddr_in {
	__u16 sin_family;
	__u16 sin_port;
	__u32 sin_addr;
	__u8 sin_zero[8];
};

/* Set before the programs are loaded. Addresses are in network byte order. */
const volatile __u64 cookie;
const volatile __u32 remote;  /* what tasks dial */
const volatile __u32 service; /* what the outside dials */
const volatile __u32 encoded; /* what remote is rewritten to */
const volatile __u16 port;    /* of both */
const volatile __u32 outbound_port;
const volatile __u32 inbound_port;

/* The proxy's listeners, outbound first. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} listeners SEC(".maps");

SEC("cgroup/connect4")
int limit_connect4(struct bpf_sock_addr *ctx)
{
	if (bpf_get_netns_cookie(ctx) == cookie && ctx->user_ip4 == remote)
		ctx->user_ip4 = encoded;
	return 1;
}

SEC("sockops")
int limit_sockops(struct bpf_sock_ops *ctx)
{
	__u32 key;

	if (ctx->op != BPF_SOCK_OPS_TCP_LISTEN_CB || bpf_get_netns_cookie(ctx) != cookie)
		return 1;
	key = ctx->local_port == inbound_port;
	if (key || ctx->local_port == outbound_port)
		bpf_sock_map_update(ctx, &listeners, &key, BPF_ANY);
	return 1;
}

SEC("sk_lookup")
int limit_lookup(struct bpf_sk_lookup *ctx)
{
	__u32 key = ctx->local_ip4 != encoded;
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &key);

	if (!sk)
		return SK_PASS;
	bpf_sk_assign(ctx, sk, 0);
	bpf_sk_release(sk);
	return SK_PASS;
}

SEC("cgroup/getsockopt")
int limit_getsockopt(struct bpf_sockopt *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct sockaddr_in *answer = ctx->optval;

	if (ctx->level != SOL_IP || ctx->optname != SO_ORIGINAL_DST || !sk)
		return 1;
	if (bpf_get_netns_cookie(ctx) != cookie || (void *)(answer + 1) > ctx->optval_end)
		return 1;
	answer->sin_family = AF_INET;
	answer->sin_port = port;
	answer->sin_addr = sk->src_ip4 == encoded ? remote : service;
	ctx->optlen = sizeof(*answer);
	barrier(); /* clang would merge the two stores, which the verifier refuses */
	ctx->retval = 0;
	return 1;
}

char LICENSE[] SEC("license") = "Dual MPL/GPL";
