# Each target calls one tool or one script; what a step does is told there.
VERSION ?= $(shell git describe --tags --match 'v*' --dirty 2>/dev/null || echo v0.1.0-dev)
# The same flags everywhere: with others Go compiles all packages once more.
GOBUILD := CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)'
BIN     := bin
GORUN   := CGO_ENABLED=0 go run -trimpath

.DEFAULT_GOAL := help
.PHONY: help build generate lint check test fuzz broken e2e cluster soak programs test-vm kernels demo bench bench-agent bench-commands bench-consul bench-scale tools package release clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build bin/weir and bin/weir-cni, both static
	@test/tools/setup.sh go
	@echo 'build: $(BIN)/weir and $(BIN)/weir-cni; where nothing is compiled yet it takes a minute or two'
	$(GOBUILD) -o $(BIN)/weir ./cmd/weir
	$(GOBUILD) -o $(BIN)/weir-cni ./cmd/weir-cni

generate: ## Compile the eBPF programs (Debian bookworm's clang), generate bindings, the tables of docs/ and the manual
	test/tools/setup.sh build
	go generate ./redirect/bpfmap
	cd test/bench && go generate ./limit
	WEIR_UPDATE_DOCS=1 go test -count=1 -run '^TestReference' ./agent
	WEIR_UPDATE_DOCS=1 go test -count=1 -run '^TestReference' ./cmd/weir # whose manual has the agent's tables

lint: ## Check formatting, imports between packages, file sizes and common mistakes
	test/tools/setup.sh build lint
	test/lint.sh

test: ## Run all tests; as root those that need the kernel too; PKG=./agent RUN=REGEXP: only those
	PKG='$(PKG)' RUN='$(RUN)' test/run.sh

check: ## Lint, and every test that needs neither root nor a build: about a minute
	test/lint.sh
	@env -u CI WEIR_TEST_QUICK=1 PATH="$$PWD/.tools/envoy:$$PWD/.tools/bin:$$PATH" CGO_ENABLED=0 go test -trimpath -count=1 -parallel 4 ./...

fuzz: ## Fuzz every target in turn, FUZZTIME=10m each; what is found stays in testdata/fuzz
	test/tools/setup.sh go
	FUZZTIME='$(FUZZTIME)' test/fuzz.sh

broken: ## Break copies of the tree on purpose, and show the test that catches each (root)
	test/tools/setup.sh test cni
	test/broken.sh

e2e: ## Run real job files on a whole node (root); NOMAD=, CONSUL=, ENVOY=: those versions; RUN=REGEXP; STARTS=
	WEIR_STARTS='$(STARTS)' NOMAD='$(NOMAD)' CONSUL='$(CONSUL)' ENVOY='$(ENVOY)' PKG='$(PKG)' test/run-e2e.sh $(if $(RUN),-run '$(RUN)')

cluster: ## Run a cluster of four machines under load while its parts fail (root); NOMAD=, CONSUL=, ENVOY=, RUN=
	NOMAD='$(NOMAD)' CONSUL='$(CONSUL)' ENVOY='$(ENVOY)' PKG=./test/cluster test/run-e2e.sh -timeout 60m $(if $(RUN),-run '$(RUN)')

soak: ## Run a node under load while all around it fails (root), and upgrades from the last release; TIME=1h SEED=n
	test/tools/setup.sh test consul cni
	WEIR_SOAK_TIME='$(TIME)' WEIR_SOAK_SEED='$(SEED)' CGO_ENABLED=0 go test -trimpath -count=1 -v -timeout 0 ./test/soak $(if $(RUN),-run '$(RUN)')

programs: ## Run Debian's curl, JVM, node, Redis, dig, ping and NTP under the guards (root); fetches 180 MB once
	test/tools/setup.sh programs
	NOMAD='$(NOMAD)' CONSUL='$(CONSUL)' ENVOY='$(ENVOY)' PKG=./test/programs test/run-e2e.sh $(if $(RUN),-run '$(RUN)')

test-vm: build ## Run the kernel tests in VMs with Debian's kernels; RUN=REGEXP, KERNEL=, ARCH=arm64: only those
	test/tools/setup.sh vm
	$(GORUN) ./test/vm $(if $(RUN),-run '$(RUN)')

kernels: ## Measure the programs on each kernel and write the table of docs/compatibility.md
	test/tools/setup.sh vm
	$(GORUN) ./test/vm -report

tools: ## Install and build what tests and demo run: Envoy, Consul, Nomad, CNI plugins, Docker, Chromium
	test/tools/setup.sh build lint test race envoy consul nomad cni docker browser package lintian promtool firewalld

demo: build ## Show a redirected allocation on this machine, in namespaces of its own (root)
	test/tools/setup.sh rules envoy
	$(GORUN) ./test/demo

bench: build ## Measure side by side with Consul's engines and the limit, the agent, and the egress guard (root)
	test/tools/setup.sh test consul cni
	test/bench/run.sh
	go test ./redirect -run '^$$' -bench '^BenchmarkEgress$$' -count 5

bench-agent: build ## Measure the agent beside 1,000 proxies and a real Consul (root)
	test/tools/setup.sh test consul
	test/bench/run.sh -only agent

bench-commands: build ## Measure what the commands take on a node of 1,000 proxies (root)
	test/tools/setup.sh test consul
	test/bench/run.sh -only commands

bench-consul: ## Measure what nodes cost a Consul of 5,000 services; BEFORE=REVISION: beside that one
	test/tools/setup.sh test consul
	BEFORE='$(BEFORE)' test/consulcost/run.sh

bench-scale: build ## Measure connect, ADD and DEL on a node of 1 to 5,000 workloads (root); WORKLOADS=n: up to that many
	test/tools/setup.sh test
	test/bench/run.sh -only scale $(if $(WORKLOADS),-workloads $(WORKLOADS))

package: build ## Make deb, rpm and tarball in dist/; GOARCH=arm64: for that architecture
	VERSION='$(VERSION)' deploy/package.sh $(BIN) dist

release: ## Make the packages of amd64 and arm64, and SHA256SUMS, in dist/ without older ones
	rm -f dist/weir[-_]* dist/SHA256SUMS
	$(MAKE) package GOARCH=amd64 BIN=bin/amd64
	$(MAKE) package GOARCH=arm64 BIN=bin/arm64

clean: ## Remove what was built; the tools in .tools stay
	rm -rf bin dist/weir[-_]* dist/SHA256SUMS
