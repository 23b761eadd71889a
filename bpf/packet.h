/* SPDX-License-Identifier: MPL-2.0 */
/* A packet as netfilter hands it over: it begins with the header of IP. */
#ifndef WEIR_PACKET_H
#define WEIR_PACKET_H

#include "addr.h"
#include "kernel.h"

#define ETH_P_IP 0x0800
#define IPPROTO_HOPOPTS 0
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_AH 51
#define IPPROTO_DSTOPTS 60
#define HEADERS_MAX 8 /* of IPv6, before what they carry */
#define TCP_SYN 0x02
#define TCP_ACK 0x10

struct packet {
	struct addr source;
	struct addr destination;
	__u16 source_port;
	__u16 destination_port;
	__u8 protocol;
	bool ports;       /* they could be read */
	bool fragment;    /* not the first one of a datagram */
	bool established; /* TCP that does not begin a connection */
};

typedef struct {
	struct net *net;
} possible_net_t;

struct net {
	__u64 net_cookie;
} __attribute__((preserve_access_index));

struct net_device {
	int ifindex;
	possible_net_t nd_net;
} __attribute__((preserve_access_index));

struct sk_buff {
	struct net_device *dev;
	struct sock *sk;
	unsigned long _skb_refdst;
} __attribute__((preserve_access_index));

/* The cookie of the namespace that the packet is in, for which this type of
 * program has no helper. Its context is the kernel's own buffer. */
static __always_inline __u64 packet_netns(struct __sk_buff *skb)
{
	return BPF_CORE_READ((struct sk_buff *)skb, dev, nd_net.net, net_cookie);
}

/* Returns where the transport header begins, 0 where nothing could be read. */
static __always_inline __u32 packet_read4(struct __sk_buff *skb, struct packet *packet)
{
	__u8 header[20];

	if (bpf_skb_load_bytes(skb, 0, header, sizeof(header)))
		return 0;
	packet->protocol = header[9];
	packet->fragment = (header[6] & 0x1f) | header[7];
	packet->source = addr_of_ip4(*(__u32 *)&header[12]);
	packet->destination = addr_of_ip4(*(__u32 *)&header[16]);
	return (header[0] & 0xf) * 4;
}

static __always_inline __u32 packet_read6(struct __sk_buff *skb, struct packet *packet)
{
	__u8 header[40], next[4];
	__u32 offset = sizeof(header);

	if (bpf_skb_load_bytes(skb, 0, header, sizeof(header)))
		return 0;
	packet->protocol = header[6];
	__builtin_memcpy(&packet->source, &header[8], sizeof(packet->source));
	__builtin_memcpy(&packet->destination, &header[24], sizeof(packet->destination));
	for (__u32 i = 0; i < HEADERS_MAX; i++) {
		switch (packet->protocol) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_FRAGMENT:
		case IPPROTO_AH:
			break;
		default:
			return offset;
		}
		if (bpf_skb_load_bytes(skb, offset, next, sizeof(next)))
			return 0;
		if (packet->protocol == IPPROTO_FRAGMENT) {
			packet->fragment = next[2] | (next[3] & 0xf8);
			offset += 8;
		} else if (packet->protocol == IPPROTO_AH) {
			offset += (next[1] + 2) * 4;
		} else {
			offset += (next[1] + 1) * 8;
		}
		packet->protocol = next[0];
		/* What follows in a later fragment is data. */
		if (packet->fragment)
			return 0;
	}
	return 0;
}

static __always_inline void packet_read(struct __sk_buff *skb, struct packet *packet)
{
	__u32 offset;
	__u16 ports[2];
	__u8 flags;

	__builtin_memset(packet, 0, sizeof(*packet));
	offset = skb->protocol == bpf_htons(ETH_P_IP) ? packet_read4(skb, packet)
						      : packet_read6(skb, packet);
	if (!offset || packet->fragment || bpf_skb_load_bytes(skb, offset, ports, sizeof(ports)))
		return;
	packet->ports = true;
	packet->source_port = bpf_ntohs(ports[0]);
	packet->destination_port = bpf_ntohs(ports[1]);
	if (packet->protocol == IPPROTO_TCP && !bpf_skb_load_bytes(skb, offset + 13, &flags, 1))
		packet->established = (flags & (TCP_SYN | TCP_ACK)) != TCP_SYN;
}

#endif
