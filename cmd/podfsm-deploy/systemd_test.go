package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// systemdScript has a systemd of a user start the switch, in namespaces and a cgroup of its own. The switch is a script that notes its
// arguments. $1 names the cgroup, the rest starts the switch.
const systemdScript = `set -e
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir -p /run/systemd/system /run/user/0 /var/lib/podfsm-deploy "/sys/fs/cgroup/$1/shell"
cgroup=/sys/fs/cgroup/$1
shift
export XDG_RUNTIME_DIR=/run/user/0
unset DBUS_SESSION_BUS_ADDRESS
echo $$ >"$cgroup/shell/cgroup.procs"
/lib/systemd/systemd --user --unit=basic.target >/run/systemd.log 2>&1 &
systemd=$!
end() {
	kill $systemd
	wait $systemd || true
	echo $$ >/sys/fs/cgroup/cgroup.procs
	find "$cgroup" -depth -type d -exec rmdir {} +
}
trap end EXIT
until [ -S /run/user/0/systemd/private ]; do sleep 0.1; done

program=/var/lib/podfsm-deploy/podfsm-deploy
install_switch() { # WHAT IT DOES
	printf '#!/bin/sh\necho "$*" >>/run/told\n[ "$2" = rollback ] || {\n%s\n}\n' "$1" >$program
	chmod +x $program
}
told() {
	tr '\n' ',' </run/told
	rm /run/told
}
for does in 'exit 0' 'exit 3' 'kill -9 $$' "rm $program"; do
	install_switch "$does"
	status=0
	"$@" || status=$?
	echo "$does: $status, $(told)"
done

mkfifo /run/go-on
install_switch 'read -r line </run/go-on'
"$@" &
pod=$!
until [ -e /run/told ]; do sleep 0.1; done
kill -9 $pod
wait $pod || true
echo "without its pod: $(systemctl --user is-active podfsm-switch)"
echo >/run/go-on
until grep -q rollback /run/told; do sleep 0.1; done
echo "in the end: $(told)"
`

// systemd gives the switch's exit status to the pod, runs the rollback however the switch ends, and goes on without the pod.
func TestSwitchBySystemd(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	start := switchCommand("install")
	args := append([]string{
		"--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private",
		"bash", "-c", systemdScript, "bash", fmt.Sprintf("podfsm-deploy-test-%d", os.Getpid()), start[0], "--user",
	}, start[1:]...)
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "unshare", args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	require.NoError(t, err, "%s%s", out, &stderr)
	require.Equal(t, `exit 0: 0, switch install,switch rollback,
exit 3: 3, switch install,switch rollback,
kill -9 $$: 255, switch install,switch rollback,
rm /var/lib/podfsm-deploy/podfsm-deploy: 0, switch install,
without its pod: active
in the end: switch install,switch rollback,
`, string(out))
}
