/* SPDX-License-Identifier: MPL-2.0 */
/*
 * Addresses without maps: one form for both families, and the range that
 * carries an index.
 *
 * An address is 16 bytes in network order, IPv4 mapped to ::ffff:a.b.c.d, so
 * that every hook has one body for both families. A port is in host order.
 */
#ifndef WEIR_ADDR_H
#define WEIR_ADDR_H

#include <linux/types.h>
#include <stdbool.h>
#include <bpf/bpf_endian.h>

/* The encoded range: 127.128.0.0/9 and fd77:6569:7200::/96, the index in the
 * low bits. Index 0 and the last one are the range's network and broadcast
 * address, which the kernel does not connect to. */
#define ENCODED4_BASE 0x7f800000u
#define ENCODED4_MASK 0xff800000u
#define ENCODED6_WORD0 0xfd776569u
#define ENCODED6_WORD1 0x72000000u
#define INDEX_FIRST 1u
#define INDEX_COUNT ((1u << 23) - 2)

/* Where a workload has several own addresses of a family, the range is cut into
 * slices. Each has a route, and so a source address, of its own. */
#define SLICE_SHIFT 20
#define SLICE_MASK ((1u << SLICE_SHIFT) - 1)
#define SLICE_COUNT ((1u << SLICE_SHIFT) - 2)

struct addr {
	__u32 word[4]; /* network order */
};

/* Comparisons are made without branches: the verifier follows each branch of
 * every caller. */

/* Four words of a context, read one by one: a context takes no computed
 * pointers, and clang would otherwise merge the branches that read it. */
#define ADDR_OF_CTX(words)                                                                         \
	((struct addr){ {                                                                          \
		*(volatile __u32 *)&(words)[0],                                                    \
		*(volatile __u32 *)&(words)[1],                                                    \
		*(volatile __u32 *)&(words)[2],                                                    \
		*(volatile __u32 *)&(words)[3],                                                    \
	} })

static __always_inline struct addr addr_of_ip4(__u32 ip4)
{
	return (struct addr){ { 0, 0, bpf_htonl(0xffff), ip4 } };
}

static __always_inline bool addr_is_mapped(const struct addr *a)
{
	return !(a->word[0] | a->word[1] | (a->word[2] ^ bpf_htonl(0xffff)));
}

static __always_inline bool addr_equal(const struct addr *a, const struct addr *b)
{
	return !((a->word[0] ^ b->word[0]) | (a->word[1] ^ b->word[1]) | (a->word[2] ^ b->word[2]) |
		 (a->word[3] ^ b->word[3]));
}

static __always_inline bool addr_is_unspecified(const struct addr *a)
{
	if (addr_is_mapped(a))
		return a->word[3] == 0;
	return !(a->word[0] | a->word[1] | a->word[2] | a->word[3]);
}

static __always_inline bool addr_is_first_loopback(const struct addr *a)
{
	if (addr_is_mapped(a))
		return a->word[3] == bpf_htonl(0x7f000001);
	return !(a->word[0] | a->word[1] | a->word[2] | (a->word[3] ^ bpf_htonl(1)));
}

/* 127/8, ::1, and the unspecified address, which the kernel takes for the
 * loopback one when it is dialled. */
static __always_inline bool addr_is_local(const struct addr *a)
{
	if (addr_is_mapped(a))
		return (a->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0x7f000000) ||
		       a->word[3] == 0;
	return !(a->word[0] | a->word[1] | a->word[2] | (a->word[3] & ~bpf_htonl(1)));
}

/* Multicast and 255.255.255.255, which TCP does not connect to. */
static __always_inline bool addr_is_multicast(const struct addr *a)
{
	if (addr_is_mapped(a))
		return (a->word[3] & bpf_htonl(0xf0000000)) == bpf_htonl(0xe0000000) ||
		       a->word[3] == 0xffffffff;
	return (a->word[0] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}

static __always_inline struct addr addr_encode4(__u32 index)
{
	return addr_of_ip4(bpf_htonl(ENCODED4_BASE + index));
}

static __always_inline struct addr addr_encode6(__u32 index)
{
	return (struct addr){ { bpf_htonl(ENCODED6_WORD0), bpf_htonl(ENCODED6_WORD1), 0,
				bpf_htonl(index) } };
}

/* The index that an encoded address carries; 0 where it is not one. The whole
 * of either range counts as encoded, so 0 is never a known index. */
static __always_inline bool addr_decode(const struct addr *a, __u32 *index)
{
	if (addr_is_mapped(a)) {
		__u32 ip4 = bpf_ntohl(a->word[3]);

		*index = ip4 & ~ENCODED4_MASK;
		return (ip4 & ENCODED4_MASK) == ENCODED4_BASE;
	}
	*index = bpf_ntohl(a->word[3]);
	return !((a->word[0] ^ bpf_htonl(ENCODED6_WORD0)) |
		 (a->word[1] ^ bpf_htonl(ENCODED6_WORD1)) | a->word[2]);
}

#endif
