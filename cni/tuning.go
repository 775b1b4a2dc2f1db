package cni

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// prepareCheck derives the request configuration of CHECK. The tuning plugin compares the sysctls in there with the text that the kernel
// prints: "1024 65535" is never the same as "1024\t65535". So the sysctls are given as the kernel prints them, without those that the
// pod has set since.
func (c call) prepareCheck(prev types.Result) (path string, conf []byte, err error) {
	plugin := c.list.Plugins[c.plugin]
	if plugin.Network.Type != "tuning" {
		return c.prepare(prev)
	}
	tuning := struct {
		Sysctl map[string]string `json:"sysctl"`
	}{}
	if err := json.Unmarshal(plugin.Bytes, &tuning); err != nil {
		return "", nil, fmt.Errorf("failed to read its sysctls: %w", err)
	}
	ifName := c.attachment.Networks[c.network].IfName
	pods := map[string]bool{}
	for name := range c.sysctls {
		pods[sysctlFile(name, ifName)] = true
	}
	printed := map[string]string{}
	for name, value := range tuning.Sysctl {
		if !pods[sysctlFile(name, ifName)] {
			printed[name] = asPrinted(value)
		}
	}
	return c.prepareWith(prev, map[string]any{"sysctl": printed})
}

// sysctlFile is where a sysctl is below /proc/sys, as the tuning plugin takes its name.
func sysctlFile(name, ifName string) string {
	return strings.Replace(strings.ReplaceAll(name, ".", "/"), "IFNAME", ifName, 1)
}

// asPrinted is a sysctl's value as the kernel prints it: numbers are decimal, and between them are tabs. Whatever isn't numbers alone is
// printed as it was written.
func asPrinted(value string) string {
	fields := strings.Fields(value)
	for i, field := range fields {
		number, err := strconv.ParseInt(field, 0, 64)
		if err != nil {
			return value
		}
		fields[i] = strconv.FormatInt(number, 10)
	}
	return strings.Join(fields, "\t")
}
