# Has a cluster of this node deploy podfsm by the chart, run a pod with it, and remove it, by the words of
# docs/howto/install-on-a-cluster.md. The node runs a stock containerd.
programs=/lab/.build/kubernetes
dir=/var/lib/cluster
mkdir -p $dir
cd $dir
ctr --namespace k8s.io images import /lab/package/podfsm-deploy-*.tar
version=$(basename /lab/package/podfsm-deploy-*.tar | sed 's/podfsm-deploy-\(.*\)-linux-.*/\1/')

# Pods reach the API server by the first address for services, which is the node's own: nothing else needs a proxy.
ip address add 10.96.0.1/32 dev lo
for user in admin,system:masters system:kube-controller-manager, system:kube-scheduler, system:node:node,system:nodes; do
	name=${user%,*}
	echo "$name,$name,$name,${user##*,}"
	cat >"$name.kubeconfig" <<END
{"apiVersion": "v1", "kind": "Config", "current-context": "here",
 "clusters": [{"name": "here", "cluster": {"server": "https://10.96.0.1", "certificate-authority": "$dir/pki/apiserver.crt"}}],
 "users": [{"name": "here", "user": {"token": "$name"}}],
 "contexts": [{"name": "here", "context": {"cluster": "here", "user": "here"}}]}
END
done >tokens.csv
cat >kubelet.yaml <<END
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
cgroupDriver: systemd
failSwapOn: false
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
evictionHard: {memory.available: 0%, nodefs.available: 0%, nodefs.inodesFree: 0%, imagefs.available: 0%, imagefs.inodesFree: 0%}
END
part() { # NAME ARGUMENT...
	systemd-run --quiet --unit="$1" --working-directory=$dir "$programs/$1" "${@:2}"
}
kubectl() { "$programs/kubectl" --kubeconfig $dir/admin.kubeconfig "$@"; }
helm() { HOME=$dir /lab/.build/bin/helm --kubeconfig $dir/admin.kubeconfig --namespace kube-system "$@"; }
until_true() { # SECONDS COMMAND...
	local deadline=$((SECONDS + $1))
	until "${@:2}"; do
		if [ $SECONDS -gt $deadline ]; then
			echo "not within $1 s: ${*:2}" >&2
			return 1
		fi
		sleep 2
	done
}
part etcd --data-dir=$dir/etcd --unsafe-no-fsync --listen-client-urls=http://127.0.0.1:2379 --advertise-client-urls=http://127.0.0.1:2379
part kube-apiserver --etcd-servers=http://127.0.0.1:2379 --advertise-address=10.96.0.1 --secure-port=443 --cert-dir=$dir/pki \
	--token-auth-file=$dir/tokens.csv --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction \
	--service-cluster-ip-range=10.96.0.0/16 --allow-privileged --service-account-issuer=https://kubernetes.default.svc \
	--service-account-key-file=/lab/service-accounts.key --service-account-signing-key-file=/lab/service-accounts.key
until_true 600 kubectl get --raw /readyz
part kube-controller-manager --kubeconfig=$dir/system:kube-controller-manager.kubeconfig --root-ca-file=$dir/pki/apiserver.crt \
	--service-account-private-key-file=/lab/service-accounts.key --use-service-account-credentials --leader-elect=false --node-monitor-grace-period=5m
part kube-scheduler --kubeconfig=$dir/system:kube-scheduler.kubeconfig --leader-elect=false
part kubelet --config=$dir/kubelet.yaml --kubeconfig=$dir/system:node:node.kubeconfig --hostname-override=node
until_true 600 kubectl wait --for condition=Ready node/node --timeout 10s

rolled_out() {
	kubectl --namespace kube-system rollout status daemonset/podfsm-deploy --timeout 10m ||
		{ kubectl --namespace kube-system logs --selector app.kubernetes.io/name=podfsm-deploy --tail 200; return 1; }
}
runs() { systemctl show --property ExecStart containerd | grep -q "path=$1 "; }

runs /usr/local/bin/containerd
helm install podfsm /lab/deploy/helm/podfsm --set image.tag="$version"
rolled_out
kubectl --namespace kube-system logs --selector app.kubernetes.io/name=podfsm-deploy --tail 20
runs /usr/bin/containerd-podfsm
[ "$(kubectl get node node --output 'jsonpath={.metadata.labels.podfsm\.io/installed}')" = true ]
until_true 120 kubectl get serviceaccount default
kubectl apply --filename - <<END
apiVersion: v1
kind: Pod
metadata: {name: web}
spec:
  runtimeClassName: podfsm
  containers: [{name: main, image: "podfsm.test/busybox:1", imagePullPolicy: Never, command: [tail, -f, /dev/null]}]
END
kubectl wait --for condition=Ready pod/web --timeout 10m
podfsm ps | grep default/web

kubectl delete pod web --timeout 10m
helm upgrade podfsm /lab/deploy/helm/podfsm --reuse-values --set mode=uninstall
rolled_out
runs /usr/local/bin/containerd
[ -z "$(kubectl get node node --output 'jsonpath={.metadata.labels.podfsm\.io/installed}')" ]
[ -z "$(ls -d /usr/bin/*podfsm* /etc/containerd/conf.d/podfsm.toml {/var/lib,/run}/containerd/*podfsm* 2>/dev/null)" ]
helm uninstall podfsm
until_true 600 sh -c '[ -z "$(ctr --namespace k8s.io tasks list --quiet)" ]'
systemctl stop kubelet kube-scheduler kube-controller-manager kube-apiserver etcd
