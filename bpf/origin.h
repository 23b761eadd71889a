/* SPDX-License-Identifier: MPL-2.0 */
/* The rows of a workload, and the table that turns an origin address into an
 * index and back. */
#ifndef WEIR_ORIGIN_H
#define WEIR_ORIGIN_H

#include "maps.h"

#define GENERATION_TRIES 4
#define INDEX_TRIES 8

/* A workload as one program run sees it. */
struct view {
	__u64 cookie;
	__u64 generation;
	struct config *config; /* NULL: rows are lost; the caller refuses */
};

/* False for a namespace that is not under Weir: the caller leaves the socket
 * as it is. An element of `workloads` may be recycled under our pointer while
 * user space replaces it; a generation is unique on the node, so a torn view
 * misses in `configs` and is read again. */
static __always_inline bool view_open(struct view *view, __u64 cookie)
{
	view->cookie = cookie;
	view->generation = 0;
	view->config = NULL;
	for (int try = 0; try < GENERATION_TRIES; try++) {
		struct workload *workload = bpf_map_lookup_elem(&workloads, &cookie);
		struct config_key key = { .cookie = cookie };

		if (!workload)
			return try > 0;
		key.generation = *(volatile __u64 *)&workload->generation;
		view->config = bpf_map_lookup_elem(&configs, &key);
		if (view->config) {
			view->generation = key.generation;
			return true;
		}
	}
	return true;
}

static __always_inline bool view_excludes(const struct view *view, enum exclusion_kind kind,
					  __u32 value)
{
	struct exclusion_key key = {
		.cookie = view->cookie,
		.generation = view->generation,
		.kind = kind,
		.value = value,
	};

	return bpf_map_lookup_elem(&exclusions, &key) != NULL;
}

static __always_inline bool view_excludes_cidr(const struct view *view, const struct addr *addr)
{
	struct cidr_key key = { .prefixlen = 256, .addr = *addr };
	__u32 *family;

	__builtin_memcpy(&key.scope[0], &view->cookie, sizeof(view->cookie));
	__builtin_memcpy(&key.scope[2], &view->generation, sizeof(view->generation));
	/* ::/0 covers the mapped form of every IPv4 address, and means none. */
	family = bpf_map_lookup_elem(&cidrs, &key);
	return family && *family == (addr_is_mapped(addr) ? 4 : 6);
}

/* The index of an origin, or 0 and the verdict that says why there is none.
 * An index belongs to one origin from its first use on: the row in `indexes`
 * is made with BPF_NOEXIST before anybody can learn of it. */
static __always_inline __u32 origin_intern(const struct view *view, const struct addr *addr,
					   enum verdict *refusal)
{
	struct origin_key key = { .cookie = view->cookie, .addr = *addr };
	struct index_key reverse = { .cookie = view->cookie };
	struct origin *known = bpf_map_lookup_elem(&origins, &key);
	struct origin fresh = { .used_ns = bpf_ktime_get_coarse_ns() };
	struct budget *budget;
	__u64 cookie = view->cookie;

	if (known) {
		known->used_ns = fresh.used_ns;
		return known->index;
	}
	*refusal = VERDICT_REFUSED_TABLE;
	budget = bpf_map_lookup_elem(&budgets, &cookie);
	if (!budget)
		return 0;
	if (budget->used >= view->config->budget) {
		*refusal = VERDICT_REFUSED_BUDGET;
		return 0;
	}
	__sync_fetch_and_add(&budget->used, 1);
	for (int try = 0; try < INDEX_TRIES; try++) {
		reverse.index = INDEX_FIRST + __sync_fetch_and_add(&budget->next, 1) % INDEX_COUNT;
		if (!bpf_map_update_elem(&indexes, &reverse, addr, BPF_NOEXIST)) {
			fresh.index = reverse.index;
			break;
		}
	}
	if (!fresh.index) {
		__sync_fetch_and_add(&budget->used, -1);
		return 0;
	}
	if (!bpf_map_update_elem(&origins, &key, &fresh, BPF_NOEXIST))
		return fresh.index;
	/* Another CPU was first with the same origin: its index stands, and ours
	 * never left this program. The other reason is a full table. */
	bpf_map_delete_elem(&indexes, &reverse);
	__sync_fetch_and_add(&budget->used, -1);
	known = bpf_map_lookup_elem(&origins, &key);
	return known ? known->index : 0;
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
