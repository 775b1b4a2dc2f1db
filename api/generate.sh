#!/bin/sh
# Generates the Go code of the services. Needs protoc (Debian: protobuf-compiler)
# and its well-known types; protoc-gen-go comes at the version in go.mod.
set -eu

bin=$(mktemp -d)
trap 'rm -rf "$bin"' EXIT
GOBIN=$bin go install google.golang.org/protobuf/cmd/protoc-gen-go
GOBIN=$bin go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2

PATH=$bin:$PATH protoc -I . \
	--go_out=. --go_opt=paths=source_relative \
	--go-grpc_out=. --go-grpc_opt=paths=source_relative \
	podfsm/v1/podfsm.proto podfsm/v1/output.proto
