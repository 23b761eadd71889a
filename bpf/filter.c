// SPDX-License-Identifier: MPL-2.0
/*
 * What no hook of a socket sees. Netfilter asks these programs in a workload's
 * namespace, where a rule of ours names them (redirect/program/filter.go):
 *
 *   forward   weir_forward   what is forwarded through the namespace, to a
 *                            namespace or a machine inside of it, or from there
 *   input     weir_input     what comes in by a device and sk_lookup is not asked
 *                            for: broadcast, multicast, UDP-Lite, SCTP, DCCP, and
 *                            IPv6 with a source of the workload's own
 *   input     weir_forged    what comes in and is answered by another device
 *   output    weir_output    what leaves by a device, of TCP what begins a
 *                            connection: for the egress guard alone, as is the
 *                            one before
 *
 * 1 refuses the packet, 0 lets it go on. The programs are the node's: a rule has
 * no constant, so each packet names its namespace by its device.
 */
#include "guard.h"
#include "kernel.h"
#include "maps.h"
#include "origin.h"
#include "output.h"
#include "packet.h"
#include "verdict.h"

static __always_inline int end(const struct snapshot *snapshot, const struct packet *packet,
			       enum verdict verdict)
{
	struct event *event = event_reserve(count(snapshot->cookie, verdict));

	if (event) {
		event->cookie = snapshot->cookie;
		event->source = packet->source;
		event->source_port = packet->source_port;
		event->destination = packet->destination;
		event->destination_port = packet->destination_port;
		event->verdict = verdict;
		bpf_ringbuf_submit(event, 0);
	}
	return is_refusal(verdict);
}

SEC("socket")
int weir_forward(struct __sk_buff *skb)
{
	struct packet packet;
	enum config_flag flags;
	struct snapshot snapshot;

	if (!snapshot_open(&snapshot, packet_netns(skb)))
		return 0;
	packet_read(skb, &packet);
	if (!snapshot.config)
		return end(&snapshot, &packet, VERDICT_REFUSED_TABLE);
	flags = snapshot.config->flags;
	if (!(flags & CONFIG_FORWARD) &&
	    flags & (CONFIG_TRANSPARENT | CONFIG_ENFORCE | CONFIG_EGRESS_ENFORCE))
		return end(&snapshot, &packet, VERDICT_REFUSED_FORWARDED);
	/* A connection counts once; of what has none, each packet. */
	if (packet.established)
		return 0;
	return end(&snapshot, &packet, VERDICT_FORWARDED);
}

/* What the guard says of a packet that sk_lookup has not seen. */
static __always_inline enum verdict decide_input(const struct snapshot *snapshot,
						 const struct packet *packet)
{
	if (!snapshot->config)
		return VERDICT_REFUSED_TABLE;
	if (!(snapshot->config->flags & (CONFIG_AUDIT | CONFIG_ENFORCE)))
		return VERDICT_DIRECT;
	/* Without a port it is a later fragment, which is nothing without the first. */
	if (!packet->ports)
		return packet->fragment ? VERDICT_DIRECT : guard_refusal(snapshot->config);
	/* Unicast to a port of UDP: sk_lookup decides, or a connected socket has it.
	 * sk_lookup takes a source of the workload's own for one that is inside. */
	if (packet->protocol == IPPROTO_UDP && is_own(snapshot, &packet->destination) &&
	    !is_own(snapshot, &packet->source) && !addr_is_local(&packet->source))
		return VERDICT_DIRECT;
	if ((snapshot->config->flags & CONFIG_PORTS_IN) &&
	    snapshot_excludes_port(snapshot, EXCLUSION_PORT_IN, packet->destination_port))
		return VERDICT_INBOUND_EXCLUDED;
	return guard_datagram(snapshot, packet->destination_port, &packet->source,
			      packet->source_port);
}

SEC("socket")
int weir_input(struct __sk_buff *skb)
{
	struct packet packet;
	enum verdict verdict;
	struct snapshot snapshot;

	packet_read(skb, &packet);
	switch (packet.protocol) {
	case IPPROTO_UDP:
	case IPPROTO_UDPLITE:
	case IPPROTO_SCTP:
	case IPPROTO_DCCP:
	/* What they carry is behind more headers than are followed. */
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_FRAGMENT:
	case IPPROTO_DSTOPTS:
	case IPPROTO_AH:
		break;
	default:
		return 0;
	}
	if (!snapshot_open(&snapshot, packet_netns(skb)))
		return 0;
	verdict = decide_input(&snapshot, &packet);
	return verdict == VERDICT_DIRECT ? 0 : end(&snapshot, &packet, verdict);
}

/* Tells of what would leave, by whom and to where. */
static __always_inline int end_output(const struct snapshot *snapshot, const struct dial *dial,
				      enum verdict verdict)
{
	struct event *event = event_reserve(count(snapshot->cookie, verdict));

	if (event) {
		event->cookie = snapshot->cookie;
		event->origin = dial->origin;
		event->origin_port = dial->port;
		event->destination = dial->origin;
		event->destination_port = dial->port;
		event->protocol = dial->protocol;
		event->uid = dial->uid;
		event->cgroup = dial->cgroup;
		event->verdict = verdict;
		if (dial->uid == UID_NONE)
			__builtin_memcpy(event->comm, "kernel", sizeof("kernel"));
		bpf_ringbuf_submit(event, 0);
	}
	return is_refusal(verdict);
}

/* The first two words of other protocols are no ports. */
static __always_inline bool has_ports(__u8 protocol)
{
	return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP || protocol == IPPROTO_UDPLITE ||
	       protocol == IPPROTO_SCTP || protocol == IPPROTO_DCCP;
}

SEC("socket")
int weir_output(struct __sk_buff *skb)
{
	struct net_device *device = packet_output(skb);
	struct packet packet;
	struct snapshot snapshot;
	struct dial dial = {};
	enum verdict verdict;

	if (!device || BPF_CORE_READ(device, ifindex) == LO_IFINDEX ||
	    !snapshot_open(&snapshot, device_netns(device)))
		return 0;
	packet_read(skb, &packet);
	dial.origin = packet.destination;
	if (has_ports(packet.protocol))
		dial.port = packet.destination_port;
	dial.protocol = packet.protocol;
	verdict = decide_output(skb, &snapshot, &packet, &dial);
	return verdict == VERDICT_DIRECT ? 0 : end_output(&snapshot, &dial, verdict);
}

/* The rule that asks has found that the answer would leave by another device than
 * the one by which this came: it is for somebody else, whom the sender names. */
SEC("socket")
int weir_forged(struct __sk_buff *skb)
{
	struct packet packet;
	struct snapshot snapshot;
	struct dial dial = {};

	if (!snapshot_open(&snapshot, packet_netns(skb)))
		return 0;
	packet_read(skb, &packet);
	dial.origin = packet.source;
	if (has_ports(packet.protocol))
		dial.port = packet.source_port;
	dial.protocol = packet.protocol;
	dial.uid = UID_NONE;
	if (!snapshot.config)
		return end_output(&snapshot, &dial, VERDICT_REFUSED_TABLE);
	if (!(snapshot.config->flags & CONFIG_EGRESS))
		return 0;
	return end_output(&snapshot, &dial, egress_refusal(snapshot.config));
}

char LICENSE[] SEC("license") = "Dual MPL/GPL";
