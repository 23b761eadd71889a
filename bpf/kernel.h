/* SPDX-License-Identifier: MPL-2.0 */
/* Numbers and fields of the kernel that no header for BPF programs has. */
#ifndef WEIR_KERNEL_H
#define WEIR_KERNEL_H

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <stdbool.h>
#include "addr.h"

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_DCCP 33
#define IPPROTO_SCTP 132
#define IPPROTO_UDPLITE 136
#define IPPROTO_MPTCP 262
#define SOCK_STREAM 1
#define SOCK_DGRAM 2
#define SOCK_RAW 3
#define SOL_IP 0
#define SOL_IPV6 41
#define SO_ORIGINAL_DST 80 /* IP6T_SO_ORIGINAL_DST has the same number */
#define IP_OPTIONS 4
#define IPV6_2292PKTOPTIONS 6
#define IPV6_RTHDR 57
#define LO_IFINDEX 1 /* lo is the first device of every namespace */

#define EPERM 1
#define EEXIST 17
#define ENOPROTOOPT 92
#define EADDRINUSE 98
#define EADDRNOTAVAIL 99
#define ENETUNREACH 101
#define ECONNREFUSED 111

struct sockaddr_in {
	__u16 sin_family;
	__u16 sin_port;
	__u32 sin_addr;
	__u8 sin_zero[8];
};

struct sockaddr_in6 {
	__u16 sin6_family;
	__u16 sin6_port;
	__u32 sin6_flowinfo;
	struct addr sin6_addr;
	__u32 sin6_scope_id;
};

struct sock_common {
	__u32 skc_daddr;
	__u16 skc_dport;
	volatile unsigned char skc_state;
	unsigned char skc_ipv6only : 1;
	struct addr skc_v6_daddr;
} __attribute__((preserve_access_index));

/* IPV6_V6ONLY of a TCP socket. bpf_getsockopt does not answer it, so it is
 * read through BTF (bpf_skc_to_tcp6_sock: Linux 5.9). sock_common is the first
 * member of tcp6_sock, whatever the kernel. */
static __always_inline bool kernel_v6only(struct bpf_sock *sk)
{
	struct sock_common *common = (void *)bpf_skc_to_tcp6_sock(sk);

	return common && BPF_CORE_READ_BITFIELD(common, skc_ipv6only);
}

struct ip_options {
	unsigned char srr;
} __attribute__((preserve_access_index));

struct ip_options_rcu {
	struct ip_options opt;
} __attribute__((preserve_access_index));

struct ipv6_txoptions {
	void *srcrt;
} __attribute__((preserve_access_index));

struct ipv6_pinfo {
	struct ipv6_txoptions *opt;
} __attribute__((preserve_access_index));

struct inet_sock {
	struct ipv6_pinfo *pinet6;
	struct ip_options_rcu *inet_opt;
} __attribute__((preserve_access_index));

/* Whether a TCP socket sends by way of an address of its own choice, whatever
 * it connects to: IP_OPTIONS with a source route, or IPV6_RTHDR. inet_sock is
 * the first member of tcp_sock. */
static __always_inline bool kernel_source_routed(struct bpf_sock *sk)
{
	struct inet_sock *inet = (void *)bpf_skc_to_tcp_sock(sk);
	struct ip_options_rcu *options;
	struct ipv6_txoptions *extension;
	struct ipv6_pinfo *six;

	if (!inet)
		return false;
	options = inet->inet_opt;
	if (options && options->opt.srr)
		return true;
	six = inet->pinet6;
	extension = six ? six->opt : NULL;
	return extension && extension->srcrt;
}

struct mptcp_sock {
} __attribute__((preserve_access_index));

struct cred {
	struct {
		__u32 val;
	} fsuid;
} __attribute__((preserve_access_index));

struct file {
	struct cred *f_cred;
} __attribute__((preserve_access_index));

struct socket {
	struct file *file;
} __attribute__((preserve_access_index));

struct kernfs_node {
	__u64 id;
} __attribute__((preserve_access_index));

struct cgroup {
	struct kernfs_node *kn;
} __attribute__((preserve_access_index));

struct sock_cgroup_data {
	struct cgroup *cgroup;
} __attribute__((preserve_access_index));

struct sock {
	struct sock_common __sk_common;
	__u16 sk_type;
	__u16 sk_protocol;
	struct socket *sk_socket;
	struct sock_cgroup_data sk_cgrp_data;
} __attribute__((preserve_access_index));

/* No user has this ID: the kernel keeps it for "none". */
#define UID_NONE 0xffffffffu

/* The file-system UID under which a socket was opened, which is what --uid-owner
 * of iptables and skuid of nftables mean; UID_NONE for one without a file, as
 * the kernel's own. A TCP socket is followed by its types (see kernel_owner for
 * MPTCP); sock is the first member of both. */
static __always_inline __u32 kernel_uid(struct bpf_sock *sk)
{
	struct sock *whole = NULL;
	struct socket *socket;
	struct file *file;
	struct cred *cred;

	if (bpf_core_type_exists(struct mptcp_sock))
		whole = (void *)bpf_skc_to_mptcp_sock(sk);
	if (!whole)
		whole = (void *)bpf_skc_to_tcp_sock(sk);
	socket = whole ? whole->sk_socket : NULL;
	file = socket ? socket->file : NULL;
	cred = file ? file->f_cred : NULL;
	return cred ? cred->fsuid.val : UID_NONE;
}

/* The cgroup in which a TCP socket was made; 0: not known. */
static __always_inline __u64 kernel_cgroup(struct bpf_sock *sk)
{
	struct sock *whole = (void *)bpf_skc_to_tcp_sock(sk);
	struct cgroup *cgroup = whole ? whole->sk_cgrp_data.cgroup : NULL;
	struct kernfs_node *kn = cgroup ? cgroup->kn : NULL;

	return kn ? kn->id : 0;
}

/* The same by a pointer that the verifier has no type for. */
static __always_inline __u32 kernel_uid_read(struct sock *sk)
{
	struct file *file = BPF_CORE_READ(sk, sk_socket, file);

	return file ? BPF_CORE_READ(file, f_cred, fsuid.val) : UID_NONE;
}

/* The context of a program on socket options as the kernel has it. */
struct bpf_sockopt_kern {
	struct sock *sk;
} __attribute__((preserve_access_index));

static __always_inline __u32 kernel_uid_of_option(struct bpf_sockopt *ctx)
{
	return kernel_uid_read(BPF_CORE_READ((struct bpf_sockopt_kern *)ctx, sk));
}

/* The context of a program on addresses as the kernel has it. */
struct bpf_sock_addr_kern {
	struct sock *sk;
} __attribute__((preserve_access_index));

static __always_inline __u32 kernel_uid_of_addr(struct bpf_sock_addr *ctx)
{
	return kernel_uid_read(BPF_CORE_READ((struct bpf_sock_addr_kern *)ctx, sk));
}

/* The socket that the application holds: of MPTCP, connect sees the first
 * subflow, getpeername the whole. A kernel may be built without MPTCP. */
static __always_inline void *kernel_owner(struct bpf_sock *sk)
{
	void *whole = NULL;

	if (bpf_core_type_exists(struct mptcp_sock))
		whole = bpf_skc_to_mptcp_sock(sk);
	return whole ?: sk;
}

#endif
