/* SPDX-License-Identifier: MPL-2.0 */
/* What user space sets: limits of the node, and the rows of one workload. */
#ifndef WEIR_CONFIG_H
#define WEIR_CONFIG_H

#include "addr.h"

/* Bits of config.flags. A bit that is clear spares the hook a lookup. */
enum config_flag {
	CONFIG_TRANSPARENT = 1 << 0, /* redirect what no rule exempts, out and in */
	CONFIG_DNS = 1 << 1,         /* steer DNS to dns_addr:dns_port */
	CONFIG_DNS_ANY = 1 << 2,     /* ... whatever server was dialled, not only dns_addr */
	CONFIG_UIDS = 1 << 3,        /* the workload has excluded UIDs */
	CONFIG_PORTS_OUT = 1 << 4,   /* ... excluded outbound ports */
	CONFIG_PORTS_IN = 1 << 5,    /* ... excluded inbound ports */
	CONFIG_CIDRS = 1 << 6,       /* ... excluded CIDRs */
	CONFIG_IPV6 = 1 << 7,        /* the encoded IPv6 range is routed to lo in this namespace */
	CONFIG_AUDIT = 1 << 8,       /* the guard counts what it would refuse */
	CONFIG_ENFORCE = 1 << 9,     /* the guard refuses */
	CONFIG_PROXIES = 1 << 10,    /* there are proxies beside the first */
	CONFIG_LISTENERS = 1 << 11,  /* proxies have exposed ports */
	CONFIG_SOURCES = 1 << 12,    /* the own address depends on the origin: see map sources */
	CONFIG_FORWARD = 1 << 13,    /* the operator lets it forward */
	CONFIG_EGRESS_AUDIT = 1 << 14,   /* the egress guard counts what it would refuse */
	CONFIG_EGRESS_ENFORCE = 1 << 15, /* the egress guard refuses */
};
#define CONFIG_EGRESS (CONFIG_EGRESS_AUDIT | CONFIG_EGRESS_ENFORCE)

/* One generation of a workload's configuration. Never changed in place. */
struct config {
	enum config_flag flags;
	__u32 proxy_uid;     /* UID of the proxies as the plugin was told */
	__u32 budget;        /* origin addresses that the workload may hold */
	__u16 outbound_port; /* of the first proxy, which has all that no other owns */
	__u16 inbound_port;  /* 0: not known yet */
	struct addr dns_addr;
	__u16 dns_port;
	__u16 ephemeral_first; /* the namespace's ip_local_port_range */
	__u16 ephemeral_last;
	__u8 seat;  /* of the first proxy */
	__u8 seats; /* of all proxies, a bit for each */
};

/* What a port or a UID means to a workload. */
enum exclusion_kind {
	EXCLUSION_PORT_OUT = 1, /* in `ports` */
	EXCLUSION_PORT_IN = 2,  /* likewise */
	EXCLUSION_UID = 3,
	/* No exclusion: the port of a listener that config does not name. The value
	 * is the seat of its proxy with LISTENS_OUTBOUND or LISTENS_EXPOSED. */
	EXCLUSION_LISTENER = 4,
	/* Nor is this: an inbound port that belongs to a proxy. The value is the inbound
	 * port of one beside the first, or the port itself with PROXY_LISTENS_HERE: open
	 * while a listener of the proxy is there, and to that one alone. */
	EXCLUSION_SERVICE = 5,
};
#define LISTENS_OUTBOUND (1 << 8) /* for what goes out */
#define LISTENS_EXPOSED (1 << 9)  /* a port with PROXY_LISTENS_HERE */
#define PROXY_LISTENS_HERE (1 << 16)

enum address_kind {
	ADDRESS_OWN = 1,       /* the workload's own: traffic to it stays local */
	ADDRESS_UPSTREAM = 2,  /* an upstream's virtual IP: goes to its listener */
	ADDRESS_PROXY = 3,     /* a virtual IP that a proxy beside the first owns */
	ADDRESS_BROADCAST = 4, /* of a network that the workload is in: nobody there has it */
	/* Of the first encoded IPv6 address of a slice: the own address of the slice's
	 * IPv6 connections, as listener. */
	ADDRESS_SOURCE = 5,
};

/* What one address means to a workload. */
struct address {
	enum address_kind kind;
	__u16 port; /* of the upstream's listener; the proxy's outbound port */
	__u16 seat; /* of the proxy */
	struct addr listener;
};

#define DNS_PORT 53
#define SEATS 8 /* as many proxies has a workload at most */

#endif
