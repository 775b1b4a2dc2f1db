# Gives the node podfsm, by the words of docs/howto/install.md: DRIVER. Pods run on.
driver=$1
[ "$driver" = systemd ] && systemd=true || systemd=false
dpkg-deb -x /lab/package/*.deb /root/unpacked
/root/unpacked/usr/bin/podfsm doctor --preflight # warns of the missing handler
apt-get install --yes /lab/package/*.deb
podfsm handler --write /etc/containerd/conf.d/podfsm.toml
podfsm doctor --preflight
for mode in auto node remap; do
	[ $mode = remap ] && snapshotter=podfsm || snapshotter=overlayfs
	cat >"/etc/containerd/conf.d/podfsm-$mode.toml" <<END
version = 4
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.podfsm-$mode]
  runtime_type = "io.containerd.runc.v2"
  sandboxer = "podfsm"
  snapshotter = "$snapshotter"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.podfsm-$mode.options]
    SystemdCgroup = $systemd
END
done
cat >>/etc/containerd/conf.d/podfsm-auto.toml <<END
[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns.podfsm-auto]
  mode = "auto"
[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns_pool]
  ranges = [{ host_id = 3000000000, size = 6553600 }]
END
cat >>/etc/containerd/conf.d/podfsm-remap.toml <<END
[plugins.'io.containerd.snapshotter.v1.podfsm']
  strategy = "metacopy"
END
cat >>/etc/containerd/conf.d/podfsm-node.toml <<END
[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns.podfsm-node]
  mode = "node"
  node_wide_uid_mapping = { container_id = 0, host_id = 2000000000, size = 65536 }
  node_wide_gid_mapping = { container_id = 0, host_id = 2000000000, size = 65536 }
END
systemctl restart containerd
systemctl show --property ExecStart containerd | grep -q containerd-podfsm
# Before Linux 6.3 the check tmpfs fails for podfsm-auto and podfsm-node: TestTmpfsVolumes compares.
found=$(podfsm doctor) || [ $? = 2 ]
echo "$found"
[ -z "$(grep '^fail' <<<"$found" | grep -v '^fail *tmpfs ' || true)" ]
