# Makes the machine a node by the words of docs/install.md: stock containerd first, then the package. DRIVER is the kubelet's cgroupDriver.
driver=$1
[ "$driver" = systemd ] && systemd=true || systemd=false
programs=/lab/.build/bin

install -D -t /usr/local/bin "$programs"/{containerd,containerd-shim-runc-v2,ctr}
install -D -t /usr/local/sbin "$programs/runc"
install -D -t /opt/cni/bin "$programs"/{bridge,host-local,portmap,loopback}
install -D -m 0644 -t /etc/systemd/system /lab/containerd.service
mkdir -p /etc/cni/net.d /etc/containerd
cat >/etc/cni/net.d/10-pods.conflist <<END
{"cniVersion": "1.1.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}
]}
END
cat >/etc/containerd/config.toml <<END
version = 4
imports = ["/etc/containerd/conf.d/*.toml"]
[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = "podfsm.test/pause:1"
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
    SystemdCgroup = $systemd
END
aa-enabled
systemctl daemon-reload
systemctl enable containerd
systemctl start containerd
ctr --namespace k8s.io images import /lab/images.tar

dpkg --install /lab/.build/nodes/package/*.deb
sed -i "s/SystemdCgroup = true/SystemdCgroup = $systemd/" /etc/containerd/conf.d/podfsm.toml
for mode in auto node; do
	cat >"/etc/containerd/conf.d/podfsm-$mode.toml" <<END
version = 4
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.podfsm-$mode]
  runtime_type = "io.containerd.runc.v2"
  sandboxer = "podfsm"
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
cat >>/etc/containerd/conf.d/podfsm-node.toml <<END
[plugins.'io.containerd.podsandbox.controller.v1.podfsm'.userns.podfsm-node]
  mode = "node"
  node_wide_uid_mapping = { container_id = 0, host_id = 2000000000, size = 65536 }
  node_wide_gid_mapping = { container_id = 0, host_id = 2000000000, size = 65536 }
END
systemctl restart containerd
systemctl show --property ExecStart containerd | grep -q containerd-podfsm
podfsm doctor
