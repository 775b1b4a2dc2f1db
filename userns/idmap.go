package userns

import (
	"fmt"
	"strconv"
	"strings"
)

// parseExtents reads an id map in the form of /proc/PID/uid_map: a line per extent, with container
// id, host id and length.
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

// ParseLabel reads the label of containerd's snapshots for id maps: extents
// "container:host:length", separated by commas. An invalid label is an InvalidArgument error.
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

// parseMapping reads a container id, a host id and a length of at least 1.
func parseMapping(fields []string) (m Mapping, err error) {
	if len(fields) != 3 {
		return m, invalid("invalid extent %q of an id map", fields)
	}
	for i, into := range []*uint32{&m.ContainerID, &m.HostID, &m.Length} {
		n, err := strconv.ParseUint(fields[i], 10, 32)
		if err != nil {
			return Mapping{}, invalid("invalid id %q in an id map", fields[i])
		}
		*into = uint32(n)
	}
	if m.Length == 0 || m.last() > 1<<32-1 {
		return Mapping{}, invalid("invalid extent of %d ids from host id %d in an id map", m.Length, m.HostID)
	}
	return m, nil
}

// String returns the mapping in the form of containerd's labels.
func (m Mapping) String() string {
	return fmt.Sprintf("%d:%d:%d", m.ContainerID, m.HostID, m.Length)
}
