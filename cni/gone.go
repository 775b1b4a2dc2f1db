package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/podfsm/podfsm/host"
	"github.com/podfsm/podfsm/tracing"
)

// delGone runs DEL for a pod whose network namespace has gone, with an empty one instead: plugins
// free what is outside of the namespace.
func (d *Driver) delGone(ctx context.Context, a *Attachment, record Record) error {
	empty, err := emptyNetNS()
	if err != nil {
		return fmt.Errorf("failed to make an empty network namespace instead of %q: %w", a.NetNSPath, err)
	}
	defer empty.Close()
	return d.delNetworks(ctx, a, fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), empty.Fd()), true, record)
}

// emptyNetNS returns a new network namespace. It lives as long as the file is open, so that a
// killed daemon leaves nothing behind.
func emptyNetNS() (netns *os.File, _ error) {
	err := host.OnLastThread(func() (err error) {
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			netns, err = os.Open("/proc/thread-self/ns/net")
		}
		return err
	})
	return netns, err
}

// delWithoutNetNS runs DEL again without any namespace, for a plugin that failed with an empty one.
// If the plugin still misses something of the namespace, it has nothing left to undo.
func (c call) delWithoutNetNS(ctx context.Context, prev types.Result, before error) error {
	c.netns = "" // optional for DEL (CNI specification, section 2)
	err := c.execDel(ctx, prev)
	if !wantsNetNS(err) {
		return err
	}
	tracing.Log(ctx).WithError(errors.Join(before, err)).Warnf("DEL of CNI plugin %q counts as done: the plugin fails without the pod's network namespace, which has gone", c.state().Type)
	return nil
}

// wantsNetNS reports whether a plugin failed because it misses something that may have been in the
// pod's network namespace. containerd takes any text with "not found" or noFile for that. But a
// missing socket, or a missing file elsewhere, belongs to an agent that isn't up yet, and another
// thing that is not found, such as a pool of addresses, to a server.
func wantsNetNS(err error) bool {
	var failure *types.Error
	if !errors.As(err, &failure) {
		return false
	}
	text := failure.Error()
	if strings.Contains(text, "dial ") || strings.Contains(text, "connect:") {
		return false
	}
	if strings.Contains(text, noFile) {
		return !slices.ContainsFunc(missingFile.FindAllStringSubmatch(text, -1), func(m []string) bool { return !ofNetNS(m[1]) })
	}
	return missingLink.MatchString(text)
}

// missingLink matches the texts "Link not found", "Link eth0 not found", "interface name eth0 not
// found", "network namespace not found", "namespace /run/netns/x not found", but not the text
// "namespaces \"x\" not found" of Kubernetes.
var missingLink = regexp.MustCompile(`(?i)(\b(link|interface|device|netns|network namespace)( name| with name| with index)?( \S+)?|\bnamespace ["']?/\S+) not found`)

const noFile = "no such file or directory"

// missingFile finds the paths of the texts "open /a: no such file or directory" and "open \"/a\": no such file or directory".
var missingFile = regexp.MustCompile(`(/[^\s"':]*)["']?: ` + noFile)

// ofNetNS reports whether a path is a network namespace, or in one.
func ofNetNS(path string) bool {
	return strings.Contains(path, "netns") || strings.HasPrefix(path, "/proc/") || strings.HasPrefix(path, "/sys/class/net/")
}
