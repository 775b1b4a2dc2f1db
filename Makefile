# Everything here works from any path, as root, as often as you like.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# What the targets need of Debian, each as PACKAGE:PROOF, where PROOF is a
# program or a file that the package brings.
packages := \
	gcc:gcc \
	libc6-dev:/usr/lib/$(shell uname -m)-linux-gnu/libc.a \
	libseccomp-dev:/usr/include/seccomp.h \
	pkg-config:pkg-config \
	iptables:iptables-nft-save \
	nftables:nft \
	iproute2:ip \
	util-linux:nsenter \
	e2fsprogs:mkfs.ext4 \
	busybox-static:/usr/share/doc/busybox-static/copyright \
	crun:crun \
	strace:strace \
	conmon:conmon \
	binutils:strip \
	systemd:systemd-analyze

# Further flags for go test, such as -run or -v.
TESTFLAGS ?=

# How results are shown: what fails, and a line per minute. Empty for all that go test prints.
PROGRESS ?= | go run ./integration/progress
gotest = go test $(if $(PROGRESS),-json)

# Flags for make bench, such as -sections or -rounds.
BENCHFLAGS ?=

.PHONY: help
help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: deps
deps: ## Install the Debian packages that are missing
	@missing=(); \
	for entry in $(packages); do \
		proof=$${entry#*:}; \
		[ -e "$$proof" ] || command -v "$$proof" >/dev/null || missing+=("$${entry%%:*}"); \
	done; \
	if [ $${#missing[@]} -eq 0 ]; then exit 0; fi; \
	echo "installing $${missing[*]}"; \
	if [ "$$(id -u)" -ne 0 ]; then echo "root is needed: apt-get install $${missing[*]}" >&2; exit 1; fi; \
	apt-get update -qq; \
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}" >/dev/null

.PHONY: build
build: deps ## Build bin/containerd-podfsm and bin/podfsm
	@start=$$SECONDS; GOBIN='$(CURDIR)/bin' go install ./cmd/...; echo "built bin/ in $$((SECONDS - start)) s"

.PHONY: demo
demo: build ## Run pods on a containerd-podfsm of its own and show what happens
	@go run ./integration/demo

.PHONY: test
test: unit integration ## Run all tests

.PHONY: unit
unit: deps ## Run the tests of the packages, with the race detector
	$(gotest) -race $(TESTFLAGS) $$(go list ./... | grep -v '/integration$$\|/integration/harness$$\|/integration/cluster$$') $(PROGRESS)

# The first release is built from this repository's history, which a shallow clone lacks.
first_release = $(shell sed -n 's/^const firstFormat = "\(.*\)"/\1/p' integration/upgrade_test.go)
skip_first_release = $(if $(shell git cat-file -e '$(first_release)^{commit}' 2>/dev/null || echo missing),-skip '^TestUpgradeFromFirstRelease$$')

.PHONY: history
history:
	@$(if $(skip_first_release),echo 'NOT RUN: TestUpgradeFromFirstRelease needs commit $(first_release): run git fetch --unshallow' >&2,true)

.PHONY: integration
integration: deps history ## Run the tests on real containerd, runc and CNI plugins
	$(gotest) -p 1 -parallel 5 -timeout 45m $(TESTFLAGS) $(skip_first_release) ./integration ./integration/harness $(PROGRESS)

# Tests that have more cells, kills or rounds with PODFSM_FULL=1.
long_tests := TestRandomSequences|TestKillMatrix|TestReboot|TestSoak|TestNetworkCycles|TestMemory|TestLedgerDamage|TestThousandSandboxes|TestRemapKilled|TestPackagesAreReproducible|TestInstall|TestUpgradeFromFirstRelease|TestUpgradeOfSteps|TestOtherPlugins

.PHONY: long
long: deps history ## Run the long matrices, which make test runs a part of
	PODFSM_FULL=1 $(gotest) -timeout 60m $(TESTFLAGS) -run '^($(long_tests))$$' $(skip_first_release) ./integration $(PROGRESS)
	PODFSM_FULL=1 $(gotest) -timeout 10m $(TESTFLAGS) -run '^TestSuite$$' ./snapshot/remapping $(PROGRESS)
	PODFSM_FULL=1 $(gotest) -timeout 20m $(TESTFLAGS) -run '^TestChurn$$' ./lifecycle $(PROGRESS)

# How long make fuzz works on each target. A second try, because go test may fail when its time is up in the middle of an input; what it has
# really found is in testdata from then on, and fails again.
FUZZTIME ?= 5s

.PHONY: fuzz
fuzz: deps ## Fuzz each parser of foreign input for FUZZTIME
	@mkdir -p .build; grep -rl '^func Fuzz' --include='*_test.go' . | xargs -n1 dirname | sort -u | while read -r package; do \
		for target in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9]*\)(.*/\1/p' "$$package"/*_test.go); do \
			echo "$$package $$target"; \
			try() { go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) "$$package" </dev/null >.build/fuzz.log 2>&1; }; \
			try || try || { cat .build/fuzz.log; exit 1; }; \
		done; \
	done

# containerd's long-term release, and the versions that it is built with.
lts := $(shell sed -n 's/^\t.* => \([^ ]*\) \(v[^ ]*\)$$/\1@\2/p' examples/own-containerd-2.3/go.mod)

.PHONY: compat
compat: deps ## Run the unit tests with containerd's long-term release, 2.3
	@mkdir -p .build; cp go.mod .build/compat.mod; cp go.sum .build/compat.sum
	go get -modfile=.build/compat.mod $(lts)
	go test -mod=mod -modfile=.build/compat.mod $(TESTFLAGS) $$(go list ./... | grep -v '/integration\|/cmd/containerd-podfsm$$')

.PHONY: next
next: deps ## Build and test podfsm with the newest releases of containerd, runc, CNI and the CRI; PRERELEASES=1 for release candidates, too
	@.ci/next

.PHONY: lint
lint: ## Look for mistakes with go vet and staticcheck
	go vet ./...
	go tool -modfile=.ci/lint/go.mod staticcheck ./...

.PHONY: compare
compare: build ## Measure what faults leave, with containerd's own handler and with podfsm's, and write docs/stock-beside-ours.md
	@go run ./integration/compare

# Flags for make conformance, such as -focus.
CONFORMANCEFLAGS ?=

.PHONY: conformance
conformance: deps ## Run the CRI's public test suite, critest, with podfsm beside an unmodified containerd
	@go run ./integration/conformance $(CONFORMANCEFLAGS)

.PHONY: bench-remap
bench-remap: deps ## Measure what the owners of a user namespace cost, and write docs/remap-bench.md
	@go run ./integration/benchremap

.PHONY: bench
bench: build ## Measure podfsm beside an unmodified containerd, CRI-O and a floor, and write docs/bench.md and docs/bench.svg
	@go run ./integration/bench $(BENCHFLAGS)

.PHONY: kill-matrix
kill-matrix: deps ## Run the whole kill matrix and write docs/kill-matrix.md
	PODFSM_FULL=1 go test -timeout 60m $(TESTFLAGS) -run '^TestKillMatrix$$' ./integration -write-docs

.PHONY: cluster
cluster: deps ## Run the tests on a Kubernetes cluster, whose first build takes half an hour
	go test -timeout 90m -v $(TESTFLAGS) ./integration/cluster

# What the targets below need of Debian besides packages.
lab_packages := qemu-system-x86:qemu-system-x86_64 qemu-utils:qemu-img debootstrap:debootstrap
arm64_packages := qemu-system-arm:qemu-system-aarch64 qemu-user-static:qemu-aarch64-static \
	gcc-aarch64-linux-gnu:aarch64-linux-gnu-gcc libc6-dev-arm64-cross:/usr/aarch64-linux-gnu/lib/libc.a

# Flags for the lab, such as -run or -tests.
NODESFLAGS ?=

.PHONY: nodes
nodes: lab_packages += $(arm64_packages)
nodes: lab-deps ## Run podfsm on virtual machines with systemd, cgroup v2 and AppArmor, from installation to purge, through restarts, reboots and power cuts
	@go run ./integration/lab $(NODESFLAGS)

.PHONY: nodes-smoke
nodes-smoke: lab-deps ## Run the shortest scenario of make nodes: one machine, every kind of pod, a SIGKILL and a power cut
	@go run ./integration/lab -smoke $(NODESFLAGS)

.PHONY: node-shell
node-shell: lab-deps ## Boot a virtual machine of make nodes and give a shell in it
	@go run ./integration/lab -shell

.PHONY: lab-deps
lab-deps:
	@$(MAKE) --no-print-directory deps packages='$(packages) $(lab_packages)'

.PHONY: dist
dist: ## Build dist/: tarballs and Debian packages for amd64 and arm64, the same bytes for the same commit
	@deploy/package/dist

.PHONY: generate
generate: ## Write what is generated: the API, the state diagram, the reference of options, the example's module
	go generate ./...
	for example in examples/*; do (cd "$$example" && go mod tidy); done

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin .build dist
