/* SPDX-License-Identifier: MPL-2.0 */
/* Every map, and every struct that crosses into Go. */
#ifndef WEIR_MAPS_H
#define WEIR_MAPS_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "addr.h"
#include "config.h"

/* What the tables have room for unless the operator says otherwise, see bpfmap.Sizes. A
 * hash table pays 16 bytes for each row that it may get, when it is made; rows
 * themselves, and all of a trie, take memory with use. */
#define MAX_WORKLOADS 16384
#define MAX_ADDRESSES 65536
#define MAX_PREFIXES 262144
#define MAX_EXCLUSIONS 32768
#define MAX_ORIGINS 131072
#define LISTENER_SLOTS 64
#define GATE_SLOT LISTENER_SLOTS /* behind them all: see redirect/gate.go */
/* A workload holds so many flows at most, one in each slot: that many that it began,
 * and as many that began outside and that it may answer, for the egress guard. */
#define FLOW_SLOTS 128
#define FLOW_SHIFT 25 /* of 32 bits the upper 7 */
#define MAX_FLOWS 65536

/* What lets a connection go on, in the order of the rules; then what concerns a
 * listener, and never a connection; then what refuses one, to the end, so that a
 * verdict which nobody thought of refuses. Each name of a refusal begins with
 * REFUSED_. A new verdict changes the layout: see redirect/bpfmap/tables.go. */
enum verdict {
	VERDICT_REDIRECTED,
	VERDICT_PROXY,
	VERDICT_UID_EXCLUDED,
	VERDICT_LOCAL,
	VERDICT_UPSTREAM,
	VERDICT_PORT_EXCLUDED,
	VERDICT_CIDR_EXCLUDED,
	VERDICT_DIRECT,
	VERDICT_DNS,
	VERDICT_UDP,
	VERDICT_INBOUND,
	VERDICT_INBOUND_EXCLUDED,
	VERDICT_GUARD_AUDIT,
	VERDICT_GUARD_EPHEMERAL,
	VERDICT_FORWARDED,
	VERDICT_EGRESS_AUDIT,
	VERDICT_EGRESS_SOCKET_AUDIT,

	VERDICT_LISTENER,
	VERDICT_REFUSED_LISTENER_IDENTITY,
	VERDICT_REFUSED_LISTENER_ADDRESS,
	VERDICT_REFUSED_LISTENER_TABLE,
	VERDICT_LISTENER_GONE, /* the last: sk_lookup drops from here on */

	VERDICT_REFUSED_ENCODED,
	VERDICT_REFUSED_FAMILY,
	VERDICT_REFUSED_DEVICE,
	VERDICT_REFUSED_OPTION,
	VERDICT_REFUSED_BROADCAST,
	VERDICT_REFUSED_SOURCE,
	VERDICT_REFUSED_BUDGET,
	VERDICT_REFUSED_SHARE,
	VERDICT_REFUSED_TABLE,
	VERDICT_REFUSED_NO_PROXY,
	VERDICT_REFUSED_INBOUND_NO_PROXY,
	VERDICT_REFUSED_INBOUND_UNKNOWN,
	VERDICT_REFUSED_GUARD,
	VERDICT_REFUSED_FORWARDED,
	VERDICT_REFUSED_EGRESS,
	VERDICT_REFUSED_EGRESS_SOCKET,
	VERDICT_MAX,

	VERDICT_FIRST_REFUSED = VERDICT_REFUSED_ENCODED, /* of a connection */
};

struct verdict_counts {
	enum verdict names[0]; /* takes no room: tells an upgrade what each count is of */
	__u64 count[VERDICT_MAX];
	__u64 events_lost; /* that a reader asked for and does not get */
	__u64 event_due;   /* CLOCK_MONOTONIC: when its share of the ring is whole again */
};

/* A quarter of the ring is for whoever comes first. The rest is for workloads
 * within their share: so many events at once, and one more each interval. */
#define EVENTS_BYTES (1 << 20)
#define EVENTS_FREE_FOR_ALL (EVENTS_BYTES / 4)
#define EVENT_INTERVAL_NS (1000000000ull / 128)
#define EVENT_BURST 256

/* Which generation of a workload's rows is in force. Written by user space as
 * the last step of a change; a generation is never used twice on a node, so a
 * reader holds the old set or the new one and can tell when it holds neither. */
struct workload {
	__u64 generation;
};

struct config_key {
	__u64 cookie;
	__u64 generation;
};

struct exclusion_key {
	__u64 cookie;
	__u64 generation;
	enum exclusion_kind kind;
	__u32 value; /* port or UID; in `ports` which row of the kind */
};

/* Excluded ports, a bit each: a range costs a row for every 1,024 ports. */
#define PORTS_PER_ROW 1024
struct ports {
	__u64 bits[PORTS_PER_ROW / 64];
};

struct address_key {
	__u64 cookie;
	__u64 generation;
	struct addr addr;
};

struct cidr_key {
	__u32 prefixlen; /* 128 for cookie and generation, plus the prefix */
	__u32 scope[4];  /* cookie, generation */
	struct addr addr;
};

enum proxy_flag {
	PROXY_LISTENS4 = 1 << 0, /* a listener took IPv4 at some time */
	PROXY_LISTENS6 = 1 << 1, /* ... IPv6 */
	PROXY_SHARED = 1 << 2,   /* a task of another UID runs in its cgroup: the UID decides */
	PROXY_PINNED = 1 << 3,   /* user space set the cgroup; the kernel does not learn another */
	PROXY_TAKEN =
		1 << 4, /* the cgroup took another's place by listening: it has it while it does */
};

/* A proxy keeps its seat while the ports and the order of proxies change. */
struct proxy_key {
	__u64 cookie;
	__u32 seat;
	__u32 pad;
};

/* Who a proxy of a workload is, as far as the kernel has seen. */
struct proxy {
	__u64 cgroup;    /* of the proxy; 0: not known yet, its UID alone decides */
	__u32 listeners; /* that this cgroup has open now */
	enum proxy_flag flags;
	__u32 outbound; /* of listeners; at times too few, never too many */
	__u32 pad;
};

struct origin_key {
	__u64 cookie;
	struct addr addr;
};

struct origin {
	__u64 used_ns; /* CLOCK_MONOTONIC (coarse) of the last connect */
	__u32 index;
	__u32 pad;
};

struct index_key {
	__u64 cookie;
	__u32 index;
	__u32 pad;
};

/* What a workload may hold however full the node's table is, and how many rows
 * of the table are for workloads that hold more. The rest is a reserve: nobody
 * can take the first destinations from others. */
#define ORIGIN_SHARE 128 /* see origin_high_water for the rest */

enum index_total {
	INDEXES_GIVEN = 0, /* by the programs */
	INDEXES_FREED = 1, /* by user space */
	INDEX_TOTALS = 2,
};

/* A workload's share of the index space. Written by the programs only. */
struct budget {
	__u32 next; /* wraps; an index in use is passed over */
	__u32 used;
};

enum listener_role {
	LISTENER_OUTBOUND4 = 1, /* takes IPv4 from the encoded range */
	LISTENER_OUTBOUND6 = 2,
	LISTENER_INBOUND4 = 3,
	LISTENER_INBOUND6 = 4,
	LISTENER_UPSTREAM = 5, /* in GATE_SLOT alone: nobody listens on an upstream's port yet */
};

/* A workload's slot for a datagram that an unconnected socket sent. */
struct flow_key {
	__u64 cookie;
	__u32 slot; /* below FLOW_SLOTS; of those that began outside FLOW_SLOTS more */
	__u32 pad;
};

struct flow {
	__u64 sent_ns; /* CLOCK_MONOTONIC (coarse) of the last datagram */
	struct addr remote;
	__u16 remote_port;
	__u16 local_port;
	__u32 pad;
};

struct listener_key {
	__u64 cookie;
	enum listener_role role;
	__u16 port; /* of the listener; who looks has it from the generation in force */
	__u16 slot; /* below LISTENER_SLOTS: workers, hot restart; or GATE_SLOT */
};

/* Who bound a socket, or who dialled while the connection waits in the gate. sockops
 * runs without a process and reads it here. */
struct binder {
	__u64 cgroup;
	__u32 uid;
	__u16 flags; /* BINDER_... */
	__u16 seat;  /* of the proxy that it is registered for */
	__u32 pid;
	char comm[16];
	__u32 pad;
};
#define BINDER_REGISTERED (1 << 0)
#define BINDER_OUTBOUND (1 << 1) /* ... for what goes out */
#define BINDER_WAITS (1 << 2)    /* dialled, and has no outcome yet */

/* What a socket's owner dialled where the rewritten address does not say it. */
struct dialled {
	struct addr addr;
	struct addr actual; /* where the kernel was sent instead */
	__u16 port;
	__u16 actual_port;
	__u32 pad;
};

/* The node's own row: set by user space, read by every event. layout and instance
 * stay where they are in every layout: a version finds another's by them. */
struct control {
	__u64 events_until_ns; /* CLOCK_MONOTONIC; 0: nobody reads */
	__u32 layout;          /* of all structs here; user space refuses another */
	__u32 instance;        /* whose programs these are: see program.InstanceOf */
	__u64 digest[2];       /* of the objects that the node runs; tells when to upgrade */
};

struct event {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u64 cookie;
	__u64 cgroup;            /* 0 inbound, as are uid and pid; of a listener its binder's */
	struct addr source;      /* inbound: who dialled; outbound: zero */
	struct addr origin;      /* what was dialled; from sk_lookup zero: see destination */
	struct addr destination; /* where the verdict sent it */
	__u32 uid;
	__u32 pid;
	enum verdict verdict;
	__u16 origin_port;
	__u16 destination_port;
	__u16 source_port;
	__u16 protocol; /* of a socket that is made, or of what it sends: IPPROTO_..., ETH_P_... */
	__u16 family;   /* of a socket that is made; else 0, as is the next */
	__u16 socket_type; /* SOCK_... */
	char comm[16];
};

/* Writer, reader, end of life:
 *   workloads   user space    every hook    DEL, or its namespace is gone
 *   configs     user space    every hook    a newer generation is in force
 *   exclusions, ports, addresses, cidrs, sources   as configs
 *   proxies     the kernel    connect       as workloads; a seat with its proxy
 *   budgets, origins, indexes the kernel    as workloads; origins by the collector
 *   listeners   sockops       sk_lookup     the socket closes
 *   releases    the collector connect       as workloads
 *   index_totals the kernel and the collector, a row each; never
 *   flows       sendmsg       sk_lookup     as workloads; the next in its slot
 *   verdicts    every hook    user space    as workloads
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_WORKLOADS);
	__type(key, __u64);
	__type(value, struct workload);
} workloads SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2 * MAX_WORKLOADS);
	__type(key, struct config_key);
	__type(value, struct config);
} configs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_EXCLUSIONS);
	__type(key, struct exclusion_key);
	__type(value, __u32);
} exclusions SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_EXCLUSIONS);
	__type(key, struct exclusion_key);
	__type(value, struct ports);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_ADDRESSES);
	__type(key, struct address_key);
	__type(value, struct address);
} addresses SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PREFIXES);
	__type(key, struct cidr_key);
	__type(value, __u32);
} cidrs SEC(".maps");

/* The slice of the encoded range for origins of a prefix; without a row the
 * first. Only workloads with several networks have rows here. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PREFIXES);
	__type(key, struct cidr_key);
	__type(value, __u32);
} sources SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 2 * MAX_WORKLOADS);
	__type(key, struct proxy_key);
	__type(value, struct proxy);
} proxies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_WORKLOADS);
	__type(key, __u64);
	__type(value, struct budget);
} budgets SEC(".maps");

/* How many indexes the collector gave back: what is held is used less these.
 * A counter of its own, because user space cannot subtract from one that the
 * programs add to. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_WORKLOADS);
	__type(key, __u64);
	__type(value, __u32);
} releases SEC(".maps");

/* The same two counts for the node as a whole. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, INDEX_TOTALS);
	__type(key, __u32);
	__type(value, __u32);
} index_totals SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_ORIGINS);
	__type(key, struct origin_key);
	__type(value, struct origin);
} origins SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_ORIGINS);
	__type(key, struct index_key);
	__type(value, struct addr);
} indexes SEC(".maps");

/* No program is attached to this map, so a socket in it behaves as before. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 65536);
	__type(key, struct listener_key);
	__type(value, __u64);
} listeners SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_FLOWS);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_WORKLOADS);
	__type(key, __u64);
	__type(value, struct verdict_counts);
} verdicts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct binder);
} binders SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct dialled);
} dials SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct control);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, EVENTS_BYTES);
	__type(value, struct event); /* says what a record is; the map itself has no values */
} events SEC(".maps");

#endif
