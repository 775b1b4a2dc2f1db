# Every target works from any directory, as root, and can be repeated.

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
	squashfs-tools:mksquashfs \
	crun:crun \
	strace:strace \
	rpm:rpm \
	conmon:conmon \
	binutils:strip \
	systemd:systemd-analyze

# Further flags for go test, such as -run or -v.
TESTFLAGS ?=

# Shows failures and a line of progress per minute. Empty shows the whole output of go test.
PROGRESS ?= | go run ./tools/progress
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
demo: build ## Run pods on a private containerd-podfsm and show what happens
	@go run ./tools/demo

# Flags for make node: -cluster makes it the node of a Kubernetes cluster.
NODEFLAGS ?=

.PHONY: node
node: build ## Open a shell on a private containerd-podfsm with crictl, ctr and podfsm, or run the commands of stdin there
	@go run ./tools/node $(NODEFLAGS)

.PHONY: sweep
sweep: ## Remove the nodes kept by PODFSM_KEEP=1
	@go run ./tools/node -sweep

.PHONY: test
test: unit integration ## Run all tests

# Tests that only make long runs. make test has a shorter test for each of their subjects.
only_long := TestUpgradeOfSteps|TestChurnSeesLeaks|TestPrometheus

# Unit tests mostly wait, so more packages than processors are tested in parallel. make lint runs go vet.
.PHONY: unit
unit: deps ## Run the tests of the packages, with the race detector
	$(gotest) -race -p 4 -vet=off $(TESTFLAGS) -skip '^($(only_long))$$' $$(go list ./... | grep -v '/integration$$\|/integration/harness$$\|/integration/cluster$$\|/tools/node$$') $(PROGRESS)

# The first release is built from this repository's history, which a shallow clone lacks.
first_release = $(shell sed -n 's/^const firstFormat = "\(.*\)"/\1/p' integration/lifecycle_upgrade_test.go)
no_first_release = $(if $(shell git cat-file -e '$(first_release)^{commit}' 2>/dev/null || echo missing),TestUpgradeFromFirstRelease)

.PHONY: history
history:
	@$(if $(no_first_release),echo 'NOT RUN: TestUpgradeFromFirstRelease needs commit $(first_release): run git fetch --unshallow' >&2,true)

.PHONY: integration
integration: deps history ## Run the tests on real containerd, runc and CNI plugins
	$(gotest) -p 1 -parallel 6 -vet=off -timeout 45m $(TESTFLAGS) -skip '^($(only_long)|$(no_first_release))$$' ./integration ./integration/harness ./tools/node $(PROGRESS)

# Tests that have more cells, kills or rounds with PODFSM_FULL=1.
long_tests := $(only_long)|TestRandomSequences|TestKillMatrix|TestReboot|TestSoak|TestNetworkCycles|TestMemory|TestLedgerDamage|TestThousandSandboxes|TestRemapKilled|TestPackagesAreReproducible|TestInstall|TestUpgradeFromFirstRelease|TestOtherPlugins|TestManyPodsInParallel|TestBench|TestOwnContainerd

# Unit tests with more cells or rounds with PODFSM_FULL=1, and those that make unit leaves out.
long_unit_tests := $(only_long)|TestReplayOfEachSequenceOfInputs|TestChainsOfPlugins|TestStrategies

# What make long needs of Debian besides packages.
long_packages := lintian:lintian

.PHONY: long
long: packages += $(long_packages)
long: deps history ## Run the long matrices; make test runs a part of them
	PODFSM_FULL=1 $(gotest) -timeout 60m $(TESTFLAGS) -run '^($(long_tests))$$' -skip '^($(no_first_release))$$' ./integration $(PROGRESS)
	PODFSM_FULL=1 $(gotest) -timeout 10m $(TESTFLAGS) -run '^TestSuite$$' ./snapshot/remapping $(PROGRESS)
	PODFSM_FULL=1 $(gotest) -timeout 20m $(TESTFLAGS) -run '^TestChurn$$' ./lifecycle $(PROGRESS)
	PODFSM_FULL=1 $(gotest) -race -timeout 20m $(TESTFLAGS) -run '^($(long_unit_tests))$$' ./lifecycle ./cni ./snapshot/owners $(PROGRESS)

# How long make fuzz works on each target. It tries twice, because go test may fail when the time ends
# during an input. A real failure stays in testdata and fails again.
FUZZTIME ?= 5s

.PHONY: fuzz
fuzz: deps ## Fuzz each parser of foreign input for FUZZTIME
	@mkdir -p .build; git grep -l '^func Fuzz' -- '*_test.go' | xargs -n1 dirname | sort -u | sed 's,^,./,' | while read -r package; do \
		for target in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9]*\)(.*/\1/p' "$$package"/*_test.go); do \
			echo "$$package $$target"; \
			try() { go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) "$$package" </dev/null >.build/fuzz.log 2>&1; }; \
			try || try || { cat .build/fuzz.log; exit 1; }; \
		done; \
	done

# containerd's long-term release and its dependencies.
lts := $(shell sed -n 's/^\t.* => \([^ ]*\) \(v[^ ]*\)$$/\1@\2/p' examples/own-containerd-2.3/go.mod)

.PHONY: compat
compat: deps ## Run the unit tests with containerd's long-term release, 2.3
	@mkdir -p .build; cp go.mod .build/compat.mod; cp go.sum .build/compat.sum
	go get -modfile=.build/compat.mod $(lts)
	go test -mod=mod -modfile=.build/compat.mod $(TESTFLAGS) $$(go list ./... | grep -v '/integration\|/tools/\|/cmd/containerd-podfsm$$')

.PHONY: next
next: deps ## Test podfsm with the newest releases of containerd, runc, CNI and the CRI; PRERELEASES=1 for release candidates, too
	@tools/next

.PHONY: lint
lint: ## Check the code with gofmt, go vet and staticcheck
	@unformatted=$$(gofmt -l .); if [ -n "$$unformatted" ]; then echo "gofmt these files:" $$unformatted >&2; exit 1; fi
	go vet ./...
	go tool -modfile=tools/modules/lint/go.mod staticcheck ./...

# The targets of ci in their order. A skipped test fails ci, except for the reasons in tools/progress.
.PHONY: ci
ci: ## Run everything that must pass before a merge
	@$(if $(no_first_release),$(MAKE) history; exit 1,true)
	@$(MAKE) lint
	@$(MAKE) compat
	@$(MAKE) fuzz FUZZTIME=3s
	@$(MAKE) nodes-smoke
	@$(MAKE) conformance
	@$(MAKE) test TESTFLAGS='-count=1' PROGRESS='| go run ./tools/progress -all -fail-on-skip'
	@$(MAKE) long TESTFLAGS='-count=1' PROGRESS='| go run ./tools/progress -all -fail-on-skip'

.PHONY: compare
compare: build ## Measure what faults leave behind with stock and podfsm handlers, and write docs/explanation/stock-beside-ours.md
	@go run ./tools/compare

# Flags for make conformance, such as -focus.
CONFORMANCEFLAGS ?=

.PHONY: conformance
conformance: deps ## Run the CRI's public test suite, critest, with podfsm beside an unmodified containerd
	@go run ./integration/conformance $(CONFORMANCEFLAGS)

.PHONY: bench-remap
bench-remap: deps ## Measure the cost of remapping images, and write docs/explanation/remap-bench.md
	@go run ./tools/benchremap

.PHONY: bench
bench: build ## Measure podfsm beside an unmodified containerd, CRI-O and a floor, and write docs/explanation/bench.md and docs/explanation/bench.svg
	@go run ./tools/bench $(BENCHFLAGS)

.PHONY: kill-matrix
kill-matrix: deps ## Run the whole kill matrix and write docs/explanation/kill-matrix.md
	PODFSM_FULL=1 go test -timeout 60m $(TESTFLAGS) -run '^TestKillMatrix$$' ./integration -write-docs

.PHONY: cluster
cluster: deps ## Run the tests on a Kubernetes cluster; the first build takes half an hour
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
node-shell: lab-deps ## Boot a virtual machine of make nodes and open a shell in it
	@go run ./integration/lab -shell

.PHONY: lab-deps
lab-deps:
	@$(MAKE) --no-print-directory deps packages='$(packages) $(lab_packages)'

.PHONY: dist
dist: deps ## Build dist/: Debian packages, rpms, tarballs, system extensions and images for amd64 and arm64, the same bytes for the same commit
	@deploy/package/dist

.PHONY: manifests
manifests: ## Write deploy/manifests/podfsm.yaml from the chart in deploy/helm
	@GOBIN='$(CURDIR)/.build/bin' go -C tools/modules/helm install tool
	@mkdir -p deploy/manifests
	@{ echo '# Rendered from deploy/helm/podfsm by make manifests; do not edit.'; \
		.build/bin/helm template podfsm deploy/helm/podfsm --namespace kube-system; } >deploy/manifests/podfsm.yaml

.PHONY: generate
generate: ## Generate the API, the state diagram, the reference of options, and the example's module
	go generate ./...
	for example in examples/*; do (cd "$$example" && go mod tidy); done

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin .build dist
