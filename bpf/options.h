/* SPDX-License-Identifier: MPL-2.0 */
/* Socket options: the one that is answered, and those that are refused. */
#ifndef WEIR_OPTIONS_H
#define WEIR_OPTIONS_H

#include "kernel.h"

#define PAGE 4096 /* as much of a value as the kernel hands to a program */
#define IP_OPTIONS_MAX 40
#define IPOPT_LSRR 131
#define IPOPT_SSRR 137

/* Writes what SO_ORIGINAL_DST answers: the origin's own family, whatever the
 * family of the socket. False where the caller's buffer is too short. */
static __always_inline bool write_original_dst(struct bpf_sockopt *ctx, const struct addr *addr,
					       __u16 port)
{
	struct sockaddr_in *in = ctx->optval;
	struct sockaddr_in6 *in6 = ctx->optval;

	if (addr_is_mapped(addr)) {
		if ((void *)(in + 1) > ctx->optval_end)
			return false;
		*in = (struct sockaddr_in){ .sin_family = AF_INET,
					    .sin_port = bpf_htons(port),
					    .sin_addr = addr->word[3] };
		ctx->optlen = sizeof(*in);
	} else {
		if ((void *)(in6 + 1) > ctx->optval_end)
			return false;
		*in6 = (struct sockaddr_in6){ .sin6_family = AF_INET6,
					      .sin6_port = bpf_htons(port),
					      .sin6_addr = *addr };
		ctx->optlen = sizeof(*in6);
	}
	/* Apart from the store to optlen: clang merges the two into one of 64
	 * bits, which the verifier refuses. */
	barrier();
	ctx->retval = 0;
	return true;
}

/* Whether IP options have a source route. Each byte is looked at, that of
 * another option's data too: a false alarm costs an option that nobody sets. */
static __always_inline bool has_source_route(struct bpf_sockopt *ctx)
{
	__u8 *options = ctx->optval;

	for (int i = 0; i < IP_OPTIONS_MAX; i++) {
		if ((void *)(options + i + 1) > ctx->optval_end)
			break;
		if (options[i] == IPOPT_LSRR || options[i] == IPOPT_SSRR)
			return true;
	}
	return false;
}

/* Whether the option makes the kernel send by way of an address that connect
 * never sees. It may be set at any time, so it is refused, not judged. */
static __always_inline bool chooses_way(struct bpf_sockopt *ctx)
{
	if (ctx->optlen <= 0)
		return false; /* takes the option away */
	if (ctx->level == SOL_IPV6)
		return ctx->optname == IPV6_RTHDR || ctx->optname == IPV6_2292PKTOPTIONS;
	return ctx->level == SOL_IP && ctx->optname == IP_OPTIONS && has_source_route(ctx);
}

#endif
