/* SPDX-License-Identifier: MPL-2.0 */
/* The egress guard for packets: what the kernel itself makes, a tunnel or an answer,
 * and what a socket sends that was not asked when it connected or sent: because it is
 * older than the guard, or because a rule of the namespace sends it elsewhere. */
#ifndef WEIR_OUTPUT_H
#define WEIR_OUTPUT_H

#include "egress.h"
#include "packet.h"
#include "verdict.h"

#define IPPROTO_ICMP 1
#define IPPROTO_ICMPV6 58
#define ICMP_ECHOREPLY 0
#define ICMP_PORT_UNREACH 0x0303 /* type and code */
#define ICMPV6_PORT_UNREACH 0x0104
#define QUOTED_TO4 (20 + 8 + 16)
#define QUOTED_TO6 (40 + 8 + 24)
#define MLD_REPORT 131
#define MLD_DONE 132
#define ND_ROUTER_SOLICIT 133
#define ND_NEIGHBOR_SOLICIT 135
#define ND_NEIGHBOR_ADVERT 136
#define ICMPV6_ECHO_REPLY 129
#define MLD2_REPORT 143
#define MLD_AT 48 /* behind the header of IPv6 and a router alert */
#define MLD_RECORDS 8
#define DST_NOREF 1ul

struct dst_entry {
	struct net_device *dev;
} __attribute__((preserve_access_index));

/* By which device the packet leaves, after whatever rewrote it. The device that
 * netfilter names is the one from before. */
static __always_inline struct net_device *packet_output(struct __sk_buff *skb)
{
	unsigned long dst = BPF_CORE_READ((struct sk_buff *)skb, _skb_refdst) & ~DST_NOREF;

	return dst ? BPF_CORE_READ((struct dst_entry *)dst, dev) : NULL;
}

static __always_inline __u64 device_netns(struct net_device *device)
{
	return BPF_CORE_READ(device, nd_net.net, net_cookie);
}

/* A group that the kernel joins by itself: all routers, or that of an own address
 * (ff02::1:ff00:0/104), of which nobody can choose more than 24 bits. */
static __always_inline bool is_kernels_group(const struct addr *group)
{
	if (group->word[1])
		return false;
	if (!group->word[2])
		return group->word[3] == bpf_htonl(2);
	return group->word[0] == bpf_htonl(0xff020000) && group->word[2] == bpf_htonl(1) &&
	       (group->word[3] & bpf_htonl(0xff000000)) == bpf_htonl(0xff000000);
}

/* Whether a report of multicast names no group that a task chose. */
static __always_inline bool is_kernels_report(struct __sk_buff *skb, __u8 type)
{
	struct {
		__u8 type, extra;
		__u16 sources;
		struct addr group;
	} record;
	__u16 records;

	if (type != MLD2_REPORT)
		return !bpf_skb_load_bytes(skb, MLD_AT + 8, &record.group, sizeof(record.group)) &&
		       is_kernels_group(&record.group);
	if (bpf_skb_load_bytes(skb, MLD_AT + 6, &records, sizeof(records)))
		return false;
	records = bpf_ntohs(records);
	for (__u32 i = 0; i < MLD_RECORDS; i++) {
		if (i == records)
			return true;
		if (bpf_skb_load_bytes(skb, MLD_AT + 8 + i * sizeof(record), &record,
				       sizeof(record)) ||
		    record.extra || record.sources || !is_kernels_group(&record.group))
			return false;
	}
	return records == MLD_RECORDS;
}

/* Whether an error quotes a datagram to an own address: weir_forged has seen it. */
static __always_inline bool quotes_own(struct __sk_buff *skb, const struct snapshot *snapshot,
				       bool six)
{
	struct addr to;
	__u32 to4;

	if (six)
		return !bpf_skb_load_bytes(skb, QUOTED_TO6, &to, sizeof(to)) &&
		       is_own(snapshot, &to);
	if (bpf_skb_load_bytes(skb, QUOTED_TO4, &to4, sizeof(to4)))
		return false;
	to = addr_of_ip4(to4);
	return is_own(snapshot, &to);
}

/* What the kernel says by ICMP and has to: where its neighbours are, that nobody has
 * the port, and the answer to a ping. Any other error quotes a packet whose source
 * anybody may have written. */
static __always_inline bool is_control(struct __sk_buff *skb, const struct snapshot *snapshot,
				       const struct packet *packet)
{
	__u16 message = packet->source_port;
	__u8 type = message >> 8;

	if (!packet->ports)
		return false;
	if (packet->protocol == IPPROTO_ICMP)
		return type == ICMP_ECHOREPLY ||
		       (message == ICMP_PORT_UNREACH && quotes_own(skb, snapshot, false));
	if (message == ICMPV6_PORT_UNREACH)
		return quotes_own(skb, snapshot, true);
	switch (type) {
	case MLD_REPORT:
	case MLD_DONE:
	case MLD2_REPORT:
		return is_kernels_report(skb, type);
	case ND_ROUTER_SOLICIT:
	case ND_NEIGHBOR_SOLICIT:
	case ND_NEIGHBOR_ADVERT:
	case ICMPV6_ECHO_REPLY:
		return true;
	}
	return false;
}

/* Whether the packet goes where its socket is connected to. */
static __always_inline bool goes_to_peer(struct sock *sk, const struct packet *packet)
{
	struct addr peer;

	if (bpf_ntohs(BPF_CORE_READ(sk, __sk_common.skc_dport)) != packet->destination_port)
		return false;
	if (addr_is_mapped(&packet->destination))
		return BPF_CORE_READ(sk, __sk_common.skc_daddr) == packet->destination.word[3];
	BPF_CORE_READ_INTO(&peer, sk, __sk_common.skc_v6_daddr);
	return addr_equal(&peer, &packet->destination);
}

/* The socket that sends the packet, unless it is a small one, of a connection that
 * begins or is over. */
static __always_inline struct sock *packet_sock(struct __sk_buff *skb)
{
	struct sock *sk = BPF_CORE_READ((struct sk_buff *)skb, sk);
	__u8 state = sk ? BPF_CORE_READ(sk, __sk_common.skc_state) : 0;

	return state == BPF_TCP_TIME_WAIT || state == BPF_TCP_NEW_SYN_RECV ? NULL : sk;
}

/* A packet that leaves by a device of the namespace other than lo. VERDICT_DIRECT:
 * nothing is to be said of it. */
static __always_inline enum verdict decide_output(struct __sk_buff *skb,
						  const struct snapshot *snapshot,
						  const struct packet *packet, struct dial *dial)
{
	struct sock *sk = packet_sock(skb);
	enum verdict verdict;

	if (!snapshot->config)
		return VERDICT_REFUSED_TABLE;
	if (!(snapshot->config->flags & CONFIG_EGRESS))
		return VERDICT_DIRECT;
	dial->uid = sk ? kernel_uid_read(sk) : UID_NONE;
	if (dial->uid != UID_NONE) {
		dial->cgroup = BPF_CORE_READ(sk, sk_cgrp_data.cgroup, kn, id);
		if (dials_as_proxy(snapshot, proxy_at(snapshot->cookie, snapshot->config->seat),
				   dial) ||
		    is_excluded_uid(snapshot, dial))
			return VERDICT_DIRECT;
	} else if ((packet->protocol == IPPROTO_ICMP || packet->protocol == IPPROTO_ICMPV6) &&
		   is_control(skb, snapshot, packet)) {
		return VERDICT_DIRECT;
	}
	verdict = egress_refusal(snapshot->config);
	/* A raw socket of a task has been counted when it was made. */
	if (dial->uid != UID_NONE && BPF_CORE_READ(sk, sk_type) == SOCK_RAW)
		return is_refusal(verdict) ? verdict : VERDICT_DIRECT;
	if (!packet->ports || !sk || BPF_CORE_READ(sk, sk_protocol) != packet->protocol)
		return verdict;
	/* What is the namespace's own is somebody else's by another device. */
	if (addr_is_local(&dial->origin) || is_own(snapshot, &dial->origin))
		return verdict;
	/* A connection that was judged by where it goes, whoever makes it for a task: of
	 * one of MPTCP the kernel makes the later ones. */
	if (packet->protocol == IPPROTO_TCP)
		return goes_to_peer(sk, packet) ||
				       decide_peer(snapshot, dial, packet->source_port) != verdict
			       ? VERDICT_DIRECT
			       : verdict;
	/* Likewise another socket of a task, when it was made, connected or sent. */
	if (dial->uid == UID_NONE)
		return verdict;
	if (!is_refusal(verdict))
		return VERDICT_DIRECT;
	if (packet->protocol == IPPROTO_UDP &&
	    (is_resolver(snapshot, dial) ||
	     decide_peer(snapshot, dial, packet->source_port) != verdict))
		return VERDICT_DIRECT;
	return verdict;
}

#endif
