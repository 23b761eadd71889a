/* SPDX-License-Identifier: MPL-2.0 */
/* The rules of an outbound connection, in order. Nothing here touches the
 * socket: decide first, record afterwards. */
#ifndef WEIR_RULES_H
#define WEIR_RULES_H

#include "kernel.h"
#include "maps.h"
#include "origin.h"

/* What a task asks for, and where it is sent. */
struct dial {
	struct addr origin;
	struct addr destination;
	__u16 port; /* of origin */
	__u16 destination_port;
	__u16 family; /* of the socket, not of the address */
	__u16 protocol;
	__u16 made_family; /* of a socket that is made, for the event */
	__u16 made_type;
	bool waits; /* in the gate: redirected, with its outcome to come */
	__u32 uid;
	__u64 cgroup;
};

static __always_inline struct proxy *proxy_at(__u64 cookie, __u32 seat)
{
	struct proxy_key key = { .cookie = cookie, .seat = seat };

	return bpf_map_lookup_elem(&proxies, &key);
}

/* The proxy is the UID that the plugin was told and, once its listeners have
 * shown it, the cgroup they live in: a task that runs under the proxy's UID
 * elsewhere stays in the mesh. */
static __always_inline bool is_proxy(struct proxy *proxy, bool proxy_uid, __u64 cgroup)
{
	if (!proxy_uid) {
		if (proxy && proxy->cgroup == cgroup && !(proxy->flags & PROXY_SHARED))
			__sync_fetch_and_or((__u32 *)&proxy->flags, PROXY_SHARED);
		return false;
	}
	if (!proxy || !proxy->cgroup)
		return true;
	/* One that only listened in another's place is a task again afterwards. */
	return proxy->cgroup == cgroup && (!(proxy->flags & PROXY_TAKEN) || proxy->listeners);
}

/* Likewise where there are several: a cgroup that has not shown itself may be
 * any. Global, for the verifier to walk the seats once. */
__noinline int is_any_proxy(__u64 cookie, __u32 seats, __u32 proxy_uid, __u64 cgroup)
{
	int found = 0;

	for (__u32 seat = 0; seat < SEATS; seat++) {
		barrier_var(seat); /* a counter on the stack is unbounded to the verifier */
		if (seats >> seat & 1 && is_proxy(proxy_at(cookie, seat), proxy_uid, cgroup))
			found = 1;
	}
	return found;
}

/* Whether whoever dials is the proxy of the first seat, or any of several. */
static __always_inline bool dials_as_proxy(const struct snapshot *snapshot, struct proxy *proxy,
					   const struct dial *dial)
{
	bool proxy_uid = dial->uid == snapshot->config->proxy_uid;

	if (snapshot->config->flags & CONFIG_PROXIES)
		return is_any_proxy(snapshot->cookie, snapshot->config->seats, proxy_uid,
				    dial->cgroup);
	return is_proxy(proxy, proxy_uid, dial->cgroup);
}

static __always_inline bool is_excluded_uid(const struct snapshot *snapshot,
					    const struct dial *dial)
{
	return (snapshot->config->flags & CONFIG_UIDS) &&
	       snapshot_excludes(snapshot, EXCLUSION_UID, dial->uid);
}

/* Whether a proxy of the workload listens on the port; its seat, whether that
 * is for what goes out, and whether it is for what comes in beside the mesh. */
static __always_inline bool is_proxy_port(const struct snapshot *snapshot, __u32 port, __u32 *seat,
					  bool *outbound, bool *exposed)
{
	const struct config *config = snapshot->config;
	__u32 *row;

	*seat = config->seat;
	*outbound = port == config->outbound_port;
	*exposed = false;
	if (!port)
		return false;
	if (*outbound || port == config->inbound_port)
		return true;
	if (!(config->flags & (CONFIG_PROXIES | CONFIG_LISTENERS)))
		return false;
	row = snapshot_row(snapshot, EXCLUSION_LISTENER, port);
	if (!row)
		return false;
	*seat = *row & (LISTENS_OUTBOUND - 1);
	*outbound = *row & LISTENS_OUTBOUND;
	*exposed = *row & LISTENS_EXPOSED;
	return true;
}

/* A socket under the proxy's UID that binds one of the proxy's ports while the
 * proxy listens elsewhere. SO_REUSEPORT goes by UID alone: the kernel would
 * hand it a part of the proxy's connections. */
static __always_inline bool conflicts_with_proxy(const struct snapshot *snapshot, __u32 port,
						 __u32 uid, __u64 cgroup)
{
	bool outbound, exposed;
	struct proxy *proxy;
	__u32 seat;

	if (!snapshot->config || uid != snapshot->config->proxy_uid ||
	    !is_proxy_port(snapshot, port, &seat, &outbound, &exposed))
		return false;
	proxy = proxy_at(snapshot->cookie, seat);
	return proxy && proxy->listeners && proxy->cgroup != cgroup;
}

/* The cgroup of the first listener under the proxy's UID is the proxy's. A
 * second candidate has to wait until the first has no listener left, which is
 * how a restarted proxy gets in and a task beside a living one does not. */
static __always_inline bool learn_proxy(struct proxy *proxy, const struct binder *binder)
{
	__u64 known = proxy->cgroup;

	if (known == binder->cgroup)
		return true;
	if (known && (proxy->listeners || (proxy->flags & PROXY_PINNED)))
		return false;
	if (__sync_val_compare_and_swap(&proxy->cgroup, known, binder->cgroup) != known)
		return false;
	/* Whether tasks share this one is for the next of them to show. */
	__sync_fetch_and_and((__u32 *)&proxy->flags, ~PROXY_SHARED);
	proxy->outbound = 0; /* what its predecessor may have left uncounted */
	if (known)
		__sync_fetch_and_or((__u32 *)&proxy->flags, PROXY_TAKEN);
	return true;
}

/* Who bound a listener. What was bound before its namespace was a workload's, by an
 * Envoy that the agent finds while it starts, is whose the socket is. NULL: it is not
 * known. */
static __always_inline struct binder *binder_of(struct bpf_sock *sk)
{
	struct binder *binder;

	binder = bpf_sk_storage_get(&binders, sk, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (binder && !binder->cgroup) {
		binder->uid = kernel_uid(sk);
		binder->cgroup = kernel_cgroup(sk);
	}
	return binder && binder->cgroup ? binder : NULL;
}

static __always_inline bool wants_dns(const struct snapshot *snapshot, const struct dial *dial)
{
	if (dial->port != DNS_PORT || !(snapshot->config->flags & CONFIG_DNS))
		return false;
	return (snapshot->config->flags & CONFIG_DNS_ANY) ||
	       addr_equal(&dial->origin, &snapshot->config->dns_addr);
}

/* A global function: the verifier walks its slots once, not for each caller. */
__noinline int listening(__u64 cookie, __u32 role, __u32 port)
{
	struct listener_key key = { .cookie = cookie, .role = role, .port = port };

	for (__u32 slot = 0; slot < LISTENER_SLOTS; slot++) {
		struct bpf_sock *sk;

		barrier_var(slot); /* a counter on the stack is unbounded to the verifier */
		key.slot = slot;
		sk = bpf_map_lookup_elem(&listeners, &key);
		if (sk) {
			bpf_sk_release(sk);
			return 1;
		}
	}
	return 0;
}

/* Whether a gate holds what comes before the proxy listens on the port. */
static __always_inline bool gate_holds(__u64 cookie, __u16 port)
{
	struct listener_key key = {
		.cookie = cookie,
		.role = LISTENER_OUTBOUND4,
		.port = port,
		.slot = GATE_SLOT,
	};
	struct bpf_sock *sk = bpf_map_lookup_elem(&listeners, &key);

	if (!sk)
		return false;
	bpf_sk_release(sk);
	return true;
}

/* The address that a socket is bound to, or the unspecified one. */
static __always_inline struct addr source_of(struct bpf_sock *sk, const struct dial *dial)
{
	struct addr source;

	if (dial->family == AF_INET6) {
		source = ADDR_OF_CTX(sk->src_ip6);
		barrier(); /* keeps clang from merging the branches' reads */
	} else {
		source = addr_of_ip4(*(volatile __u32 *)&sk->src_ip4);
	}
	return source;
}

static __always_inline bool takes4(struct bpf_sock *sk, const struct dial *dial)
{
	struct addr source = source_of(sk, dial);

	if (dial->family == AF_INET)
		return true;
	return (addr_is_mapped(&source) || addr_is_unspecified(&source)) && !kernel_v6only(sk);
}

/* A socket that cannot be sent where a rule sends it is refused by name: the
 * kernel would only say that there is no route, or let it wait. */
static __always_inline enum verdict check_reachable(struct bpf_sock *sk, const struct dial *dial,
						    bool datagram, enum verdict verdict)
{
	if (verdict != VERDICT_UPSTREAM && verdict != VERDICT_DNS)
		return verdict;
	if (kernel_source_routed(sk))
		return VERDICT_REFUSED_OPTION;
	if (!addr_is_mapped(&dial->destination)) {
		if (dial->family == AF_INET)
			return VERDICT_REFUSED_FAMILY;
	} else if (!addr_is_mapped(&dial->origin) && (datagram || !takes4(sk, dial))) {
		/* The kernel has no way to send a single datagram so. */
		return VERDICT_REFUSED_FAMILY;
	}
	if (sk->bound_dev_if && sk->bound_dev_if != LO_IFINDEX && addr_is_local(&dial->destination))
		return VERDICT_REFUSED_DEVICE;
	return verdict;
}

/* Encodes the origin in the family that socket and proxy have in common. The
 * port stays. A family that the proxy cannot take is refused: it must never
 * pass the mesh. While no listener was seen, IPv4 is assumed, as in Consul.
 *
 * Without a listener the connection is refused here, where it is known who dials,
 * not by sk_lookup; the table is searched only where the proxy's row says of none. */
static __always_inline enum verdict encode(struct bpf_sock *sk, const struct snapshot *snapshot,
					   struct proxy *proxy, __u16 port, struct dial *dial)
{
	__u32 listens = proxy ? proxy->flags & (PROXY_LISTENS4 | PROXY_LISTENS6) : 0;
	enum verdict refusal = VERDICT_REFUSED_TABLE;
	bool use4 = takes4(sk, dial), use6 = false, listens_now;
	__u32 index;

	if (dial->family == AF_INET6) {
		struct addr source = source_of(sk, dial);

		use6 = !addr_is_mapped(&source) && (snapshot->config->flags & CONFIG_IPV6);
	}
	if (listens == (PROXY_LISTENS4 | PROXY_LISTENS6)) {
		/* Both were seen, perhaps at different times: ask what is there now. */
		bool six = listening(snapshot->cookie, LISTENER_OUTBOUND6, port);
		bool four = listening(snapshot->cookie, LISTENER_OUTBOUND4, port);

		if (six && use6 && !addr_is_mapped(&dial->origin))
			use4 = false;
		else if (use6 && six)
			use4 = use4 && four;
		else
			use6 = false;
		if (!use6 && dial->family == AF_INET && six && !four)
			use4 = false;
		listens_now = use4 ? four : six;
	} else {
		if (listens == PROXY_LISTENS6)
			use4 = false;
		else
			use6 = false;
		listens_now = proxy && proxy->outbound;
	}
	if (!use4 && !use6)
		return VERDICT_REFUSED_FAMILY;
	index = origin_intern(snapshot, &dial->origin, &refusal);
	if (!index)
		return refusal;
	dial->destination = use4 ? addr_encode4(index) : addr_encode6(index);
	if (listens_now ||
	    listening(snapshot->cookie, use4 ? LISTENER_OUTBOUND4 : LISTENER_OUTBOUND6, port))
		return VERDICT_REDIRECTED;
	dial->waits = use4 && gate_holds(snapshot->cookie, port);
	return dial->waits ? VERDICT_REDIRECTED : VERDICT_REFUSED_NO_PROXY;
}

/* Whether a socket is bound to an address that the workload does not have, which
 * IPV6_FREEBIND lets anybody do. What answers in the namespace answers to there. */
static __always_inline bool is_foreign_source(const struct snapshot *snapshot,
					      const struct addr *source)
{
	struct address *address;

	if (addr_is_local(source)) /* or bound to none */
		return false;
	address = snapshot_address(snapshot, source);
	return !address || address->kind != ADDRESS_OWN;
}

/* What leaves the namespace past the proxy, as the egress guard has it. */
static __always_inline enum verdict egress_refusal(const struct config *config)
{
	return config->flags & CONFIG_EGRESS_ENFORCE ? VERDICT_REFUSED_EGRESS
						     : VERDICT_EGRESS_AUDIT;
}

/* A TCP connection of a workload where nothing is redirected. */
static __always_inline enum verdict plain(const struct config *config)
{
	return config->flags & CONFIG_EGRESS ? egress_refusal(config) : VERDICT_DIRECT;
}

/* The rules of a TCP connection; the first that matches decides. */
static __always_inline enum verdict decide(struct bpf_sock *sk, const struct snapshot *snapshot,
					   struct dial *dial)
{
	struct addr source = source_of(sk, dial);
	struct address *address;
	struct proxy *proxy;
	bool foreign;
	__u32 index;
	__u16 port;

	if (!snapshot->config)
		return VERDICT_REFUSED_TABLE;
	/* Before the loopback rule: a task that dials the range itself would
	 * otherwise reach the proxy with another connection's origin. One bound
	 * in it got past post_bind (IP_BIND_ADDRESS_NO_PORT). */
	if (addr_decode(&dial->origin, &index) || addr_decode(&source, &index))
		return VERDICT_REFUSED_ENCODED;
	/* Before the exemptions: the proxy and excluded UIDs resolve names too. */
	if (wants_dns(snapshot, dial)) {
		dial->destination = snapshot->config->dns_addr;
		dial->destination_port = snapshot->config->dns_port;
		return VERDICT_DNS;
	}
	proxy = proxy_at(snapshot->cookie, snapshot->config->seat);
	port = snapshot->config->outbound_port;
	if (dials_as_proxy(snapshot, proxy, dial))
		return VERDICT_PROXY;
	if (is_excluded_uid(snapshot, dial))
		return VERDICT_UID_EXCLUDED;
	/* The packets would go by its way, whatever is decided here. */
	if ((snapshot->config->flags & CONFIG_TRANSPARENT) && kernel_source_routed(sk))
		return VERDICT_REFUSED_OPTION;
	foreign = (snapshot->config->flags & CONFIG_TRANSPARENT) &&
		  is_foreign_source(snapshot, &source);
	if (addr_is_local(&dial->origin)) {
		if (foreign)
			return VERDICT_REFUSED_SOURCE;
		if (!sk->bound_dev_if || sk->bound_dev_if == LO_IFINDEX)
			return VERDICT_LOCAL;
		/* By another device it leaves the namespace. */
		return snapshot->config->flags & CONFIG_TRANSPARENT ? VERDICT_REFUSED_DEVICE
								    : plain(snapshot->config);
	}
	address = snapshot_address(snapshot, &dial->origin);
	if (address && address->kind == ADDRESS_OWN)
		return foreign ? VERDICT_REFUSED_SOURCE : VERDICT_LOCAL;
	if (address && address->kind == ADDRESS_PROXY) {
		proxy = proxy_at(snapshot->cookie, address->seat);
		port = address->port ?: port;
	} else if (address && address->kind == ADDRESS_UPSTREAM) {
		dial->destination = address->listener;
		dial->destination_port = address->port;
		return foreign ? VERDICT_REFUSED_SOURCE : VERDICT_UPSTREAM;
	}
	if ((snapshot->config->flags & CONFIG_PORTS_OUT) &&
	    snapshot_excludes_port(snapshot, EXCLUSION_PORT_OUT, dial->port))
		return VERDICT_PORT_EXCLUDED;
	if ((snapshot->config->flags & CONFIG_CIDRS) &&
	    snapshot_excludes_cidr(snapshot, &dial->origin))
		return VERDICT_CIDR_EXCLUDED;
	if (!(snapshot->config->flags & CONFIG_TRANSPARENT))
		return plain(snapshot->config);
	/* As the kernel does; the proxy would take it, and an index be spent. */
	if (addr_is_multicast(&dial->origin) || (address && address->kind == ADDRESS_BROADCAST))
		return VERDICT_REFUSED_BROADCAST;
	if (foreign)
		return VERDICT_REFUSED_SOURCE;
	/* The proxy is on lo; such a socket cannot send there. */
	if (sk->bound_dev_if)
		return VERDICT_REFUSED_DEVICE;
	return encode(sk, snapshot, proxy, port, dial);
}

/* A connected IPv6 socket passes every write to an IPv4 peer through here once
 * more, with the address that connect gave it: that is decided already. */
static __always_inline bool is_resolved(struct bpf_sock *sk, const struct snapshot *snapshot,
					const struct dial *dial)
{
	return sk->state == BPF_TCP_ESTABLISHED && dial->port == snapshot->config->dns_port &&
	       addr_equal(&dial->origin, &snapshot->config->dns_addr);
}

static __always_inline enum verdict decide_udp(struct bpf_sock *sk, const struct snapshot *snapshot,
					       struct dial *dial, bool datagram)
{
	if (!snapshot->config)
		return VERDICT_REFUSED_TABLE;
	if (!wants_dns(snapshot, dial) || (datagram && is_resolved(sk, snapshot, dial)))
		return VERDICT_UDP;
	dial->destination = snapshot->config->dns_addr;
	dial->destination_port = snapshot->config->dns_port;
	return VERDICT_DNS;
}

#endif
