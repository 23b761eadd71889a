// SPDX-License-Identifier: MPL-2.0
/*
 * The egress guard for families of sockets that no hook of a cgroup sees: packet,
 * vsock, XDP, SMC, TIPC, CAN and what else reaches outside without an address of IP.
 * A hook of BPF's LSM asks it at the root of cgroup v2, once a workload of the node
 * has an egress guard (redirect/program/family.go).
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
	struct task_struct *task = (void *)bpf_get_current_task();

	return BPF_CORE_READ(task, nsproxy, net_ns, net_cookie);
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

/* The arguments of socket_create: family, type, protocol, whether the kernel asks. */
SEC("lsm_cgroup/socket_create")
int weir_family(unsigned long long *ctx)
{
	struct dial dial = {};
	struct snapshot snapshot;
	enum verdict verdict;

	if (stays((int)ctx[0]) || (int)ctx[3] || !snapshot_open(&snapshot, own_netns()))
		return 1;
	dial.uid = (__u32)bpf_get_current_uid_gid();
	dial.cgroup = bpf_get_current_cgroup_id();
	dial.made_family = ctx[0];
	dial.made_type = ctx[1];
	dial.protocol = ctx[2];
	verdict = decide_socket(&snapshot, &dial);
	if (verdict == VERDICT_DIRECT)
		return 1;
	emit(&snapshot, &dial, verdict);
	return !is_refusal(verdict); /* 0 is EPERM */
}

char LICENSE[] SEC("license") = "Dual MPL/GPL";
