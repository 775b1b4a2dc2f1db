# Makes the machine a node with a stock containerd: DRIVER, which is the kubelet's cgroupDriver.
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
# Otherwise a power cut within half a minute after an image was unpacked leaves empty files in its layers.
[plugins.'io.containerd.service.v1.diff-service']
  sync_fs = true
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
