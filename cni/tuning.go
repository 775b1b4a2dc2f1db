package cni

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
)

// prepareCheck derives the request configuration of CHECK. The tuning plugin compares the sysctls
// of its configuration with the text that the kernel prints, and "1024 65535" never equals
// "1024\t65535". So prepareCheck writes the sysctls as the kernel prints them, and omits those that
// the pod has set since.
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

// sysctlFile returns the path of a sysctl below /proc/sys, by the tuning plugin's rules.
func sysctlFile(name, ifName string) string {
	return strings.Replace(strings.ReplaceAll(name, ".", "/"), "IFNAME", ifName, 1)
}

// asPrinted returns a sysctl's value as the kernel prints it: decimal numbers with tabs between
// them. A value with anything else stays as it is.
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
