package userns

import (
	"fmt"
	"strconv"
	"strings"
)

// parseExtents reads extents of an id map, each of which is a container id, a host id and a length: lines with white space between
// the numbers, as in /proc/PID/uid_map.
func parseExtents(text string) (extents []Mapping, err error) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		m, err := parseMapping(fields)
		if err != nil {
			return nil, err
		}
		extents = append(extents, m)
	}
	return extents, nil
}

// ParseLabel reads the label that containerd's snapshots have for their id maps: extents "container:host:length", with commas
// between them. What is no such label is an InvalidArgument error.
func ParseLabel(text string) (extents []Mapping, err error) {
	for extent := range strings.SplitSeq(text, ",") {
		m, err := parseMapping(strings.Split(extent, ":"))
		if err != nil {
			return nil, err
		}
		extents = append(extents, m)
	}
	return extents, nil
}

// parseMapping reads a container id, a host id and a length of 1 and more.
func parseMapping(fields []string) (m Mapping, err error) {
	if len(fields) != 3 {
		return m, invalid("%q is no extent of an id map", fields)
	}
	for i, into := range []*uint32{&m.ContainerID, &m.HostID, &m.Length} {
		n, err := strconv.ParseUint(fields[i], 10, 32)
		if err != nil {
			return Mapping{}, invalid("%q in an id map is no id", fields[i])
		}
		*into = uint32(n)
	}
	if m.Length == 0 || m.last() > 1<<32-1 {
		return Mapping{}, invalid("an id map has %d ids from host id %d up", m.Length, m.HostID)
	}
	return m, nil
}

// String is the mapping in the form of containerd's labels.
func (m Mapping) String() string {
	return fmt.Sprintf("%d:%d:%d", m.ContainerID, m.HostID, m.Length)
}
