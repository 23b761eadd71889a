/* SPDX-License-Identifier: MPL-2.0 */
/* The rows of a workload, and the table that turns an origin address into an
 * index and back. */
#ifndef WEIR_ORIGIN_H
#define WEIR_ORIGIN_H

#include "kernel.h"
#include "maps.h"

#define GENERATION_TRIES 4
#define INDEX_TRIES 65536 /* as many as a workload may hold by default */

/* A workload as one program run sees it. */
struct snapshot {
	__u64 cookie;
	__u64 generation;
	struct config *config; /* NULL: rows are lost; the caller refuses */
};

/* False for a namespace that is not under Weir: the caller leaves the socket
 * as it is. An element of `workloads` may be recycled under our pointer while
 * user space replaces it; a generation is unique on the node, so a torn snapshot
 * misses in `configs` and is read again. */
static __always_inline bool snapshot_open(struct snapshot *snapshot, __u64 cookie)
{
	int try = 0;

	snapshot->cookie = cookie;
	snapshot->generation = 0;
	snapshot->config = NULL;
	/* Not unrolled: each namespace has a program of its own with this in it. */
#pragma clang loop unroll(disable)
	do {
		struct config_key key = { .cookie = cookie };
		struct workload *workload;

		barrier_var(try); /* nor begun outside of the loop */
		workload = bpf_map_lookup_elem(&workloads, &cookie);
		if (!workload)
			return try > 0;
		key.generation = *(volatile __u64 *)&workload->generation;
		snapshot->config = bpf_map_lookup_elem(&configs, &key);
		if (snapshot->config) {
			snapshot->generation = key.generation;
			return true;
		}
	} while (++try < GENERATION_TRIES);
	return true;
}

/* What a port or a UID means to the workload; NULL: nothing. */
static __always_inline __u32 *snapshot_row(const struct snapshot *snapshot,
					   enum exclusion_kind kind, __u32 value)
{
	struct exclusion_key key = {
		.cookie = snapshot->cookie,
		.generation = snapshot->generation,
		.kind = kind,
		.value = value,
	};

	return bpf_map_lookup_elem(&exclusions, &key);
}

static __always_inline bool snapshot_excludes(const struct snapshot *snapshot,
					      enum exclusion_kind kind, __u32 value)
{
	return snapshot_row(snapshot, kind, value) != NULL;
}

/* Whether the workload excludes a port, of those that go out or come in. */
static __always_inline bool snapshot_excludes_port(const struct snapshot *snapshot,
						   enum exclusion_kind kind, __u16 port)
{
	struct exclusion_key key = {
		.cookie = snapshot->cookie,
		.generation = snapshot->generation,
		.kind = kind,
		.value = port / PORTS_PER_ROW,
	};
	struct ports *row = bpf_map_lookup_elem(&ports, &key);

	return row && row->bits[port % PORTS_PER_ROW / 64] >> port % 64 & 1;
}

/* What an address means to the workload; NULL: nothing. */
static __always_inline struct address *snapshot_address(const struct snapshot *snapshot,
							const struct addr *addr)
{
	struct address_key key = {
		.cookie = snapshot->cookie,
		.generation = snapshot->generation,
		.addr = *addr,
	};

	return bpf_map_lookup_elem(&addresses, &key);
}

static __always_inline struct cidr_key snapshot_cidr_key(const struct snapshot *snapshot,
							 const struct addr *addr)
{
	struct cidr_key key = { .prefixlen = 256, .addr = *addr };

	__builtin_memcpy(&key.scope[0], &snapshot->cookie, sizeof(snapshot->cookie));
	__builtin_memcpy(&key.scope[2], &snapshot->generation, sizeof(snapshot->generation));
	return key;
}

static __always_inline bool snapshot_excludes_cidr(const struct snapshot *snapshot,
						   const struct addr *addr)
{
	struct cidr_key key = snapshot_cidr_key(snapshot, addr);
	__u32 *family;

	/* ::/0 covers the mapped form of every IPv4 address, and means none. */
	family = bpf_map_lookup_elem(&cidrs, &key);
	return family && *family == (addr_is_mapped(addr) ? 4 : 6);
}

/* The slice of the encoded range whose route has the own address that a
 * connection to this origin should have. */
static __always_inline __u32 snapshot_slice(const struct snapshot *snapshot,
					    const struct addr *addr)
{
	struct cidr_key key = snapshot_cidr_key(snapshot, addr);
	__u32 *slice = bpf_map_lookup_elem(&sources, &key);

	return slice ? *slice : 0;
}

/* The index that a row of `origins` holds, or 0 if it is not this origin's any
 * more: the collector may have deleted the row under our pointer, and another
 * origin moved in. What the reverse row says stands for as long as a socket
 * carries the index. */
static __always_inline __u32 origin_index(__u64 cookie, const struct addr *addr,
					  struct origin *origin)
{
	struct index_key key = { .cookie = cookie, .index = *(volatile __u32 *)&origin->index };
	struct addr *reverse = bpf_map_lookup_elem(&indexes, &key);

	return reverse && addr_equal(reverse, addr) ? key.index : 0;
}

/* A search for a free index. */
struct index_search {
	struct budget *budget;
	const struct addr *addr;
	struct index_key key;
	__u32 found; /* 0: none */
	__u32 first; /* of the indexes to choose from */
	__u32 count;
	__u32 pad;
};

/* Takes the next index unless it is in use: after a lap round the range, those
 * of long-lived connections are. A full table ends the search. */
static long index_try(__u32 round, struct index_search *search)
{
	int err; /* before Linux 6.4 the upper half of a map helper's result is not set */

	search->key.index =
		search->first + __sync_fetch_and_add(&search->budget->next, 1) % search->count;
	err = bpf_map_update_elem(&indexes, &search->key, search->addr, BPF_NOEXIST);
	if (!err)
		search->found = search->key.index;
	return err != -EEXIST;
}

/* How many indexes the workloads of the node hold together. */
static __always_inline __u32 indexes_held(void)
{
	__u32 given_at = INDEXES_GIVEN, freed_at = INDEXES_FREED;
	__u32 *given = bpf_map_lookup_elem(&index_totals, &given_at);
	__u32 *freed = bpf_map_lookup_elem(&index_totals, &freed_at);

	return given && freed ? *given - *freed : 0;
}

static __always_inline void index_given(struct budget *budget, __u32 how_many)
{
	__u32 at = INDEXES_GIVEN;
	__u32 *given = bpf_map_lookup_elem(&index_totals, &at);

	__sync_fetch_and_add(&budget->used, how_many);
	if (given)
		__sync_fetch_and_add(given, how_many);
}

/* How many origins the node holds before workloads that hold their share get no more:
 * seven eighths of the table. User space puts the number in place of the marker,
 * "WEIRHIGH", by the table that it made: see bpfmap.SetHighWater. */
static __always_inline __u64 origin_high_water(void)
{
	__u64 rows;

	asm volatile("%0 = 0x5745495248494748 ll" : "=r"(rows));
	return rows;
}

/* The index of an origin, or 0 and the verdict that says why there is none.
 * An index belongs to one origin from its first use on: the row in `indexes`
 * is made with BPF_NOEXIST before anybody can learn of it. */
static __always_inline __u32 origin_intern(const struct snapshot *snapshot, const struct addr *addr,
					   enum verdict *refusal)
{
	struct origin_key key = { .cookie = snapshot->cookie, .addr = *addr };
	struct index_key reverse = { .cookie = snapshot->cookie };
	struct origin *known = bpf_map_lookup_elem(&origins, &key);
	struct origin fresh = { .used_ns = bpf_ktime_get_coarse_ns() };
	struct index_search search = { .first = INDEX_FIRST, .count = INDEX_COUNT };
	__u64 exists = BPF_NOEXIST;
	struct budget *budget;
	__u32 *released, held;
	__u64 cookie = snapshot->cookie;

	if (snapshot->config->flags & CONFIG_SOURCES) {
		search.first += snapshot_slice(snapshot, addr) << SLICE_SHIFT;
		search.count = SLICE_COUNT;
	}
	if (known) {
		__u32 index = origin_index(snapshot->cookie, addr, known);

		known->used_ns = fresh.used_ns;
		/* Of another slice, the origin is routed by another network than
		 * when the index was given; the collector finds what it leaves. */
		if (index && index - search.first < search.count)
			return index;
		if (index)
			exists = BPF_ANY;
	}
	*refusal = VERDICT_REFUSED_TABLE;
	budget = bpf_map_lookup_elem(&budgets, &cookie);
	if (!budget)
		return 0;
	released = bpf_map_lookup_elem(&releases, &cookie);
	held = budget->used - (released ? *released : 0);
	if (held >= snapshot->config->budget) {
		*refusal = VERDICT_REFUSED_BUDGET;
		return 0;
	}
	if (held >= ORIGIN_SHARE && indexes_held() >= origin_high_water()) {
		*refusal = VERDICT_REFUSED_SHARE;
		return 0;
	}
	index_given(budget, 1);
	search.budget = budget;
	search.addr = addr;
	search.key.cookie = cookie;
	bpf_loop(INDEX_TRIES, index_try, &search, 0);
	fresh.index = search.found;
	reverse.index = search.found;
	if (!fresh.index) {
		index_given(budget, -1);
		return 0;
	}
	if (!bpf_map_update_elem(&origins, &key, &fresh, exists))
		return fresh.index;
	/* Another CPU was first with the same origin: its index stands, and ours
	 * never left this program. The other reason is a full table. */
	bpf_map_delete_elem(&indexes, &reverse);
	index_given(budget, -1);
	known = bpf_map_lookup_elem(&origins, &key);
	return known ? origin_index(snapshot->cookie, addr, known) : 0;
}

/* The origin that an encoded address of this workload stands for. */
static __always_inline struct addr *origin_resolve(__u64 cookie, const struct addr *encoded)
{
	struct index_key key = { .cookie = cookie };

	if (!addr_decode(encoded, &key.index))
		return NULL;
	return bpf_map_lookup_elem(&indexes, &key);
}

#endif
