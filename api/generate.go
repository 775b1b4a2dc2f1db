// Package api holds the definitions of podfsm's gRPC services; the Go code of
// each stands beside its .proto file.
package api

//go:generate sh generate.sh
