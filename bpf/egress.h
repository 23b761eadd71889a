/* SPDX-License-Identifier: MPL-2.0 */
/* The egress guard: what may leave a namespace other than by its proxy. TCP of a
 * transparent workload never does, and that of a plain one is in rules.h. */
#ifndef WEIR_EGRESS_H
#define WEIR_EGRESS_H

#include "guard.h"
#include "kernel.h"
#include "rules.h"

static __always_inline bool is_resolver(const struct snapshot *snapshot, const struct dial *dial)
{
	const struct config *config = snapshot->config;

	return (config->flags & CONFIG_DNS) && dial->port == config->dns_port &&
	       addr_equal(&dial->origin, &config->dns_addr);
}

/* What the exclusions and the answers say of a peer outside. */
static __always_inline enum verdict decide_peer(const struct snapshot *snapshot,
						const struct dial *dial, __u16 local_port)
{
	if ((snapshot->config->flags & CONFIG_PORTS_OUT) &&
	    snapshot_excludes_port(snapshot, EXCLUSION_PORT_OUT, dial->port))
		return VERDICT_PORT_EXCLUDED;
	if ((snapshot->config->flags & CONFIG_CIDRS) &&
	    snapshot_excludes_cidr(snapshot, &dial->origin))
		return VERDICT_CIDR_EXCLUDED;
	if (is_answer(snapshot, local_port, &dial->origin, dial->port))
		return VERDICT_UDP;
	return egress_refusal(snapshot->config);
}

/* The rules of a datagram, or of a socket of UDP that connects; the first that
 * matches decides. VERDICT_UDP is what needs no name. */
static __always_inline enum verdict
decide_egress(struct bpf_sock *sk, const struct snapshot *snapshot, const struct dial *dial)
{
	struct address *address;

	if (dials_as_proxy(snapshot, proxy_at(snapshot->cookie, snapshot->config->seat), dial) ||
	    is_resolver(snapshot, dial))
		return VERDICT_UDP;
	if (is_excluded_uid(snapshot, dial))
		return VERDICT_UID_EXCLUDED;
	/* By another device a loopback address leaves the namespace. */
	if (addr_is_local(&dial->origin))
		return !sk->bound_dev_if || sk->bound_dev_if == LO_IFINDEX
			       ? VERDICT_UDP
			       : egress_refusal(snapshot->config);
	address = snapshot_address(snapshot, &dial->origin);
	if (address && address->kind == ADDRESS_OWN)
		return VERDICT_UDP;
	return decide_peer(snapshot, dial, sk->src_port);
}

/* Whether connect and sendmsg see all that such a socket of IP sends. The kernel
 * asks no program where UDP-Lite connects. */
static __always_inline bool has_hooks(__u32 type, __u32 protocol)
{
	if (type == SOCK_STREAM)
		return protocol == IPPROTO_TCP || protocol == IPPROTO_MPTCP;
	return type == SOCK_DGRAM && protocol == IPPROTO_UDP;
}

/* Whether a workload may have a socket that has no hooks. VERDICT_DIRECT: it may. */
static __always_inline enum verdict decide_socket(const struct snapshot *snapshot,
						  const struct dial *dial)
{
	if (!snapshot->config)
		return VERDICT_REFUSED_TABLE;
	if (!(snapshot->config->flags & CONFIG_EGRESS) ||
	    dials_as_proxy(snapshot, proxy_at(snapshot->cookie, snapshot->config->seat), dial) ||
	    is_excluded_uid(snapshot, dial))
		return VERDICT_DIRECT;
	return snapshot->config->flags & CONFIG_EGRESS_ENFORCE ? VERDICT_REFUSED_EGRESS_SOCKET
							       : VERDICT_EGRESS_SOCKET_AUDIT;
}

#endif
