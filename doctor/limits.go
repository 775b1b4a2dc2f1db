package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"github.com/podfsm/podfsm/userns"
)

const (
	// fewKeys is the number of keys per user below which the check warns: runc makes a key per
	// container.
	fewKeys = 1000
	// fewInotify is the number of inotify instances per user below which the check warns.
	fewInotify = 1024

	keysRemedy     = "sysctl -w kernel.keys.maxkeys=20000 kernel.keys.maxbytes=2000000, and put it into /etc/sysctl.d"
	rootKeysRemedy = "sysctl -w kernel.keys.root_maxkeys=1000000 kernel.keys.root_maxbytes=25000000, and put it into /etc/sysctl.d"
	inotifyRemedy  = "sysctl -w fs.inotify.max_user_instances=8192, and put it into /etc/sysctl.d"
)

// keys checks the limit and the number of keys of each user, see keyrings(7). Once a user has no
// keys left, its containers fail to start.
func keys(_ context.Context, n Node) []Finding {
	limit, err := n.number("sys/kernel/keys/maxkeys")
	if errors.Is(err, fs.ErrNotExist) {
		return []Finding{ok("this kernel has no keys")}
	}
	if err != nil {
		return []Finding{unknown(err.Error(), keysRemedy)}
	}
	rootLimit, err := n.number("sys/kernel/keys/root_maxkeys")
	if err != nil {
		return []Finding{unknown(err.Error(), rootKeysRemedy)}
	}
	users, err := n.read("key-users")
	if err != nil {
		return []Finding{unknown(err.Error(), "mount proc on /proc")}
	}
	evidence := fmt.Sprintf("kernel.keys.maxkeys = %d for each user, root_maxkeys = %d", limit, rootLimit)
	if user, remedy := nearLimit(users); user != "" {
		return []Finding{warn(evidence+", and "+user, remedy)}
	}
	switch shared := n.sharedUsers(); {
	case rootLimit < fewKeys:
		return []Finding{warn(evidence+", of which each container that runs as the node's root has one", rootKeysRemedy)}
	case limit < fewKeys && len(shared) > 0:
		return []Finding{warn(evidence+", of which each container has one; the pods of "+strings.Join(shared, ", ")+" share their users", keysRemedy)}
	default:
		return []Finding{ok(evidence)}
	}
}

// nearLimit returns a user of /proc/key-users with at least four fifths of its allowed keys or
// bytes: root, or else the first; "" for none. It ignores a limit of 0.
func nearLimit(users string) (user, remedy string) {
	for line := range strings.Lines(users) {
		var uid, usage, keys, instantiated, has, most, bytes, mostBytes int
		if _, err := fmt.Sscanf(line, "%d: %d %d/%d %d/%d %d/%d", &uid, &usage, &keys, &instantiated, &has, &most, &bytes, &mostBytes); err != nil {
			continue
		}
		near := most > 0 && 5*has >= 4*most || mostBytes > 0 && 5*bytes >= 4*mostBytes
		evidence := fmt.Sprintf("user %d has %d keys of %d bytes", uid, has, bytes)
		switch {
		case near && uid == 0:
			return evidence, rootKeysRemedy
		case near && user == "":
			user, remedy = evidence, keysRemedy
		}
	}
	return user, remedy
}

// sharedUsers returns the runtime handlers whose pods all share their users.
func (n Node) sharedUsers() (handlers []string) {
	if n.Config == nil {
		return nil
	}
	for _, h := range n.Config.Handlers {
		if h.Mode == userns.ModeNode {
			handlers = append(handlers, h.Name)
		}
	}
	return handlers
}

// inotify checks the limit of inotify instances per user, see inotify(7). Instances in a user
// namespace also count for the node's root, who made the namespace.
func inotify(_ context.Context, n Node) []Finding {
	limit, err := n.number("sys/fs/inotify/max_user_instances")
	if errors.Is(err, fs.ErrNotExist) {
		return []Finding{ok("this kernel has no inotify")}
	}
	if err != nil {
		return []Finding{unknown(err.Error(), inotifyRemedy)}
	}
	evidence := fmt.Sprintf("fs.inotify.max_user_instances = %d", limit)
	if limit < fewInotify {
		return []Finding{warn(evidence+", which the node's root and all pods with a user namespace share: programs in pods may fail with \"too many open files\"", inotifyRemedy)}
	}
	return []Finding{ok(evidence)}
}

// number returns the number in a file below /proc.
func (n Node) number(path string) (int, error) {
	text, err := n.read(path)
	if err != nil {
		return 0, err
	}
	number, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", path, err)
	}
	return number, nil
}
