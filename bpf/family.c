// SPDX-License-Identifier: MPL-2.0
/*
 * The egress guard for families of sockets that no hook of a cgroup sees: packet,
 * vsock, XDP, SMC, TIPC, CAN and what else reaches outside without an address of IP.
 * The kernel asks it before it asks its security modules, whether or not BPF is one
 * of them, once a workload of the node has an egress guard (redirect/program/family.go).
 */
#include "egress.h"
#include "emit.h"
#include "packet.h"

#define AF_UNIX 1
#define AF_KEY 15
#define AF_NETLINK 16
#define AF_ALG 38

struct nsproxy {
	struct net *net_ns;
} __attribute__((preserve_access_index));

struct task_struct {
	struct nsproxy *nsproxy;
} __attribute__((preserve_access_index));

/* The socket's namespace is that of whoever makes it. */
static __always_inline __u64 own_netns(void)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();
	struct nsproxy *nsproxy = task->nsproxy;

	return nsproxy ? nsproxy->net_ns->net_cookie : 0;
}

/* weir_socket has the families of IP; the others do not leave the machine. */
static __always_inline bool stays(int family)
{
	switch (family) {
	case AF_UNIX:
	case AF_INET:
	case AF_INET6:
	case AF_KEY:
	case AF_NETLINK:
	case AF_ALG:
		return true;
	}
	return false;
}

/* The arguments: family, type, protocol, and whether the kernel asks for itself. What
 * is not 0 is what socket(2) ends with; a security module may still say no to the rest. */
SEC("fmod_ret/security_socket_create")
int weir_family(unsigned long long *ctx)
{
	struct dial dial = {};
	struct snapshot snapshot;
	enum verdict verdict;

	if (stays((int)ctx[0]) || (int)ctx[3] || !snapshot_open(&snapshot, own_netns()))
		return 0;
	dial.uid = (__u32)bpf_get_current_uid_gid();
	dial.cgroup = bpf_get_current_cgroup_id();
	dial.made_family = ctx[0];
	dial.made_type = ctx[1];
	dial.protocol = ctx[2];
	verdict = decide_socket(&snapshot, &dial);
	if (verdict == VERDICT_DIRECT)
		return 0;
	emit(&snapshot, &dial, verdict);
	return is_refusal(verdict) ? -errno_of(verdict) : 0;
}

char LICENSE[] SEC("license") = "Dual MPL/GPL";
