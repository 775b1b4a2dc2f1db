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
			printed[name] = asPrinted(sysctlFile(name, ifName), value)
		}
	}
	return c.prepareWith(prev, map[string]any{"sysctl": printed})
}

// sysctlFile returns the path of a sysctl below /proc/sys, by the tuning plugin's rules.
func sysctlFile(name, ifName string) string {
	return strings.Replace(strings.ReplaceAll(name, ".", "/"), "IFNAME", ifName, 1)
}

// asPrinted returns a sysctl's value as the kernel prints it: decimal numbers with tabs between
// them, or sorted ranges of ports. Any other value only loses the space around it.
func asPrinted(file, value string) string {
	if file == "net/ipv4/ip_local_reserved_ports" { // the only such list of a network namespace
		return asRanges(value)
	}
	fields := strings.Fields(value)
	for i, field := range fields {
		number, err := strconv.ParseInt(field, 0, 64)
		if err != nil {
			return strings.TrimSpace(value)
		}
		fields[i] = strconv.FormatInt(number, 10)
	}
	return strings.Join(fields, "\t")
}

// asRanges sorts and merges a list of ports and ranges, such as "81,90-95,80". A list that the
// kernel would not take stays as it is.
func asRanges(list string) string {
	var ports [1<<16 + 1]bool // the last one ends the last range
	for part := range strings.SplitSeq(strings.TrimSuffix(list, ","), ",") {
		from, to, found := strings.Cut(part, "-")
		if !found {
			to = from
		}
		first, err1 := strconv.ParseUint(from, 0, 16)
		last, err2 := strconv.ParseUint(to, 0, 16)
		if err1 != nil || err2 != nil {
			return list
		}
		for port := first; port <= last; port++ {
			ports[port] = true
		}
	}
	var ranges []string
	for port := 0; port < len(ports); port++ {
		first := port
		for ports[port] {
			port++
		}
		switch port - first {
		case 0:
		case 1:
			ranges = append(ranges, strconv.Itoa(first))
		default:
			ranges = append(ranges, fmt.Sprintf("%d-%d", first, port-1))
		}
	}
	return strings.Join(ranges, ",")
}
