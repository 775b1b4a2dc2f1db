package integration

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"os"
	osexec "os/exec"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	podfsmv1 "github.com/podfsm/podfsm/api/podfsm/v1"
	"github.com/podfsm/podfsm/integration/harness"
)

// pack makes packages of built binaries for an architecture, of all kinds or of some, and returns their folder.
func pack(t *testing.T, arch, binaries string, kinds ...string) (dir string) {
	t.Helper()
	programs, err := harness.BuildPacking(t.Context())
	require.NoError(t, err)
	dir = t.TempDir()
	args := append([]string{"v1.2.3-4-gabcdef0", "1795529540", arch, binaries, programs, dir}, kinds...)
	out, err := osexec.CommandContext(t.Context(), "../deploy/package/pack", args...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return dir
}

// packages are those for this machine: what make dist builds in full, else the tarball and the Debian package of the daemon that all
// tests run.
func packages(t *testing.T) (dir string) {
	t.Helper()
	if full() {
		return dist(t)
	}
	return pack(t, goruntime.GOARCH, stripped(t), "deb", "tar")
}

// only returns the only file in a directory that matches a pattern.
func only(t *testing.T, dir, pattern string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, pattern))
	require.NoError(t, err)
	require.Len(t, files, 1)
	return files[0]
}

// A node with stock containerd gets the package, runs pods with podfsm, and goes back. In full, the
// test uses the static binaries of make dist.
func TestInstall(t *testing.T) {
	t.Parallel()
	i := startInstallation(t)
	i.examine()
	i.installPackage()
	i.upgrade()
	i.comeBackFromStock()
	i.drain()
	i.removePackage()
	i.installTarball()
	if full() {
		i.installRPM()
	}
	require.NoError(t, i.old.StopAndRemove(t.Context()))
}

func startInstallation(t *testing.T) *installation {
	t.Helper()
	dir := packages(t)
	i := startMachine(t)
	i.tarball, i.deb = only(t, dir, "*-linux-"+goruntime.GOARCH+".tar.gz"), only(t, dir, "*_"+goruntime.GOARCH+".deb")
	files := []*string{&i.tarball, &i.deb}
	if full() {
		i.rpm = only(t, dir, "*."+map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[goruntime.GOARCH]+".rpm")
		files = append(files, &i.rpm)
	}
	// The packages are outside of the machine.
	for _, file := range files {
		inside := filepath.Join(i.Dir(), filepath.Base(*file))
		content, err := os.ReadFile(*file)
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(inside, content, 0o600))
		*file = inside
	}
	return i
}

// requireStays requires that the package can't be removed while podfsm has a pod.
func (i *installation) requireStays() {
	i.Helper()
	_, err := i.m.run("dpkg", "-r", "podfsm")
	require.ErrorContains(i, err, "podfsm has 1 sandbox, which a containerd without podfsm can't stop")
	require.ErrorContains(i, err, "default/pod")
	require.FileExists(i, i.m.path("/usr/bin/containerd-podfsm"))
	require.FileExists(i, i.m.path(dropIn))
}

func (i *installation) preflight(program string) (told string, err error) {
	out, err := i.m.run(program, "doctor", "--preflight")
	return strings.Join(strings.Fields(out), " "), err // as it isn't wrapped
}

// examine runs the preflight of each unpacked package on the node.
func (i *installation) examine() {
	for _, tc := range []struct {
		dir    string
		unpack []string
	}{
		{"/deb", []string{"dpkg-deb", "-x", i.deb, "/deb"}}, {"/tarball", []string{"tar", "-C", "/tarball", "-xzf", i.tarball}},
	} {
		i.m.do(i.T, "mkdir", tc.dir)
		i.m.do(i.T, tc.unpack...)
		told, err := i.preflight(tc.dir + "/usr/bin/podfsm")
		require.ErrorContains(i, err, "1 check has failed", "podfsm has no handler yet")
		require.Contains(i, told, `let /etc/containerd/config.toml have, at its top: imports = ["/etc/containerd/conf.d/*.toml"]`)
		require.Contains(i, told, "ok pause "+tc.dir+"/usr/bin/podfsm-init: ")
		i.m.do(i.T, "rm", "-r", tc.dir)
	}
}

func imports(config map[string]any) { config["imports"] = []string{"/etc/containerd/conf.d/*.toml"} }

// installPackage installs the Debian package after the changes that the preflight asks for.
func (i *installation) installPackage() {
	installed := i.m.do(i.T, "dpkg", "-i", i.deb)
	for _, file := range []string{"man/man8/podfsm.8.gz", "bash-completion/completions/podfsm", "zsh/vendor-completions/_podfsm", "fish/vendor_completions.d/podfsm.fish"} {
		require.FileExists(i, i.m.path("/usr/share/"+file))
	}
	require.Contains(i, installed, `imports = ["/etc/containerd/conf.d/*.toml"]`, "it says what is missing")
	require.Contains(i, installed, "podfsm doctor --preflight")
	require.Contains(i, installed, "from now on every start of containerd.service runs containerd-podfsm")
	told, err := i.preflight("podfsm")
	require.Error(i, err)
	require.Contains(i, told, `let /etc/containerd/config.toml have, at its top: imports = ["/etc/containerd/conf.d/*.toml"]`)
	require.NoError(i, i.m.configure(i.Node, imports))
	told, _ = i.preflight("podfsm")
	require.Contains(i, told, "podfsm handler --write "+handlerFile, "the node's runc isn't where podfsm.toml takes it to be")
	i.m.do(i.T, "podfsm", "handler", "--write", handlerFile)
	told, err = i.preflight("podfsm")
	require.NoError(i, err)
	require.NotContains(i, told, "podfsm handler --write")
	dump := i.m.do(i.T, "containerd-podfsm", "config", "dump")
	require.Contains(i, dump, "sandboxer = 'podfsm'")
	require.NotContains(i, dump, "unknown key")
	verified, err := i.m.run("systemd-analyze", "verify", "--man=no", "/usr/lib/systemd/system/containerd.service")
	require.NoError(i, err)
	require.NotContains(i, verified, "podfsm.conf")
	i.requireRuns("/usr/local/bin/containerd") // nothing has been restarted

	require.NoError(i, i.Restart(i.Context()))
	i.requireRuns("/usr/bin/containerd-podfsm")
	i.requireReady(i.old)
	i.pod = startPod(i.T, i.Node, harness.PodfsmHandler, i.PodConfig("pod"))
	startContainer(i.T, i.pod, "main")
	require.Contains(i, i.m.do(i.T, "podfsm", "--address", i.Socket(), "ps"), "default/pod")
}

// upgrade installs the package again while a pod lives, and requires that the package can't be
// removed.
func (i *installation) upgrade() {
	i.requireStays()
	require.NoError(i, i.Stop(i.Context()))
	i.requireStays()
	require.NotContains(i, i.m.do(i.T, "dpkg", "-i", i.deb), "imports")
	require.NoError(i, i.Start(i.Context()))
	i.requireReady(i.pod)
}

// comeBackFromStock runs a containerd without podfsm, which can't stop the pod. After the return to
// podfsm, the pod works.
func (i *installation) comeBackFromStock() {
	i.m.do(i.T, "mv", dropIn, "/podfsm.conf")
	require.NoError(i, i.Restart(i.Context()))
	i.requireRuns("/usr/local/bin/containerd")
	require.Error(i, i.pod.StopAndRemove(i.Context()))
	i.m.do(i.T, "cp", "/podfsm.conf", dropIn)
	i.requireStays()
	require.NoError(i, i.Restart(i.Context()))
	i.requireReady(i.pod)
}

func (i *installation) drain() {
	_, err := i.m.run("podfsm", "drain", "--wait=0s")
	require.ErrorContains(i, err, "1 sandbox left")
	require.NoError(i, i.Restart(i.Context()))
	_, err = i.RunPod(i.Context(), harness.PodfsmHandler, i.PodConfig("new"))
	require.Equal(i, codes.Unavailable, status.Code(err))
	require.ErrorContains(i, err, "podfsm drain --cancel")
	i.requireStays()
	i.requireReady(i.pod)
	out := i.m.do(i.T, "podfsm", "drain", "--force")
	require.Regexp(i, `gone: \S+ default/pod\ndrained: podfsm has no sandboxes\n$`, out)
	list, err := i.Sandboxes().List(i.Context(), &podfsmv1.ListRequest{})
	require.NoError(i, err)
	require.Empty(i, list.GetSandboxes())
	require.Contains(i, i.m.do(i.T, "podfsm", "--address", i.Socket(), "leaks"), "No leaks found")
}

// removePackage returns to stock, as soon as only podfsm's handlers need podfsm.
func (i *installation) removePackage() {
	require.NoError(i, i.m.configure(i.Node, func(config map[string]any) {
		imports(config)
		config["plugins"].(map[string]any)["io.containerd.cri.v1.images"].(map[string]any)["snapshotter"] = "podfsm"
		criOf(config)["default_runtime_name"] = harness.PodfsmHandler
	}))
	_, err := i.m.run("dpkg", "-r", "podfsm")
	require.ErrorContains(i, err, "change snapshotter in [plugins.'io.containerd.cri.v1.images'] and default_runtime_name in [")
	require.FileExists(i, i.m.path("/usr/bin/containerd-podfsm"))
	require.NoError(i, i.m.configure(i.Node, imports))
	i.m.do(i.T, "dpkg", "-r", "podfsm")
	require.NoFileExists(i, i.m.path("/usr/bin/containerd-podfsm"))
	require.FileExists(i, i.m.path(handlerFile), "as it was edited, dpkg keeps it until it is purged")
	require.NoError(i, i.Restart(i.Context()))
	i.requireRuns("/usr/local/bin/containerd")
	i.requireReady(i.old)
	_, err = i.RunPod(i.Context(), harness.PodfsmHandler, i.PodConfig("nobody's"))
	require.ErrorContains(i, err, "podfsm", "nobody has that sandboxer")
	i.m.do(i.T, "dpkg", "-P", "podfsm")
	require.NoFileExists(i, i.m.path(handlerFile))
	i.requireNoLedger()
	require.NoError(i, i.Restart(i.Context()))
	i.requireReady(i.old)
	again := startPod(i.T, i.Node, harness.StockHandler, i.PodConfig("again"))
	startContainer(i.T, again, "main")
	require.NoError(i, again.StopAndRemove(i.Context()))
	i.RequireClean(i.T, i.before)
	require.Equal(i, i.mounts, i.m.mounts(i.T))
}

// installTarball installs and removes podfsm by the tarball.
func (i *installation) installTarball() {
	i.m.do(i.T, "tar", "-C", "/", "-xzf", i.tarball)
	require.NoError(i, i.Restart(i.Context()))
	i.requireRuns("/usr/bin/containerd-podfsm")
	_, err := i.m.run("/usr/share/podfsm/uninstall")
	require.ErrorContains(i, err, "takes new pods")
	i.m.do(i.T, "podfsm", "drain")
	i.m.do(i.T, "/usr/share/podfsm/uninstall")
	i.requireNoLedger()
	require.NoError(i, i.Restart(i.Context()))
	i.requireRuns("/usr/local/bin/containerd")
	require.Empty(i, strings.TrimSpace(i.m.do(i.T, "sh", "-c", "find /usr /etc -xdev -path '*podfsm*' -not -path '*/.build/*' -newer /systemd")))
	i.RequireClean(i.T, i.before)
}

// installRPM installs, upgrades and removes podfsm by the rpm. On Debian, rpm has no database of the
// packages, hence --nodeps.
func (i *installation) installRPM() {
	told := i.m.do(i.T, "rpm", "--install", "--nodeps", i.rpm)
	require.Contains(i, told, "podfsm doctor --preflight")
	require.NoError(i, i.Restart(i.Context()))
	i.requireRuns("/usr/bin/containerd-podfsm")
	told = i.m.do(i.T, "rpm", "--upgrade", "--force", "--nodeps", i.rpm)
	require.NotContains(i, told, "podfsm doctor --preflight")
	_, err := i.m.run("rpm", "--erase", "podfsm")
	require.ErrorContains(i, err, "takes new pods")
	require.FileExists(i, i.m.path("/usr/bin/containerd-podfsm"))
	i.m.do(i.T, "podfsm", "drain")
	i.m.do(i.T, "rpm", "--erase", "podfsm")
	require.NoFileExists(i, i.m.path("/usr/bin/containerd-podfsm"))
	require.NoFileExists(i, i.m.path(dropIn))
	require.NoError(i, i.Restart(i.Context()))
	i.requireRuns("/usr/local/bin/containerd")
	i.requireReady(i.old)
}

// The same input gives the same packages at any time. In full, two builds of one commit in two
// places are the same, and report their version.
func TestPackagesAreReproducible(t *testing.T) {
	if full() {
		requireDists(t, dist(t), dist(t))
		return
	}
	binaries := t.TempDir()
	for _, name := range []string{"containerd-podfsm", "podfsm", "podfsm-deploy", "podfsm-init"} {
		require.NoError(t, os.WriteFile(filepath.Join(binaries, name), []byte(name), 0o600))
	}
	for _, arch := range []string{"amd64", "arm64"} {
		dir := pack(t, arch, binaries)
		before := digests(t, dir)
		require.Len(t, before, 5)
		require.Equal(t, before, digests(t, pack(t, arch, binaries)))
		field, err := osexec.CommandContext(t.Context(), "dpkg-deb", "--field", only(t, dir, "podfsm_1.2.3+4.gabcdef0_*.deb"), "Architecture").Output()
		require.NoError(t, err)
		require.Equal(t, arch+"\n", string(field))
		requireBringsNothing(t, dir)
		requirePages(t, only(t, dir, "*.tar.gz"))
		requireImage(t, only(t, dir, "podfsm-deploy-*.tar"), arch)
		requireExtension(t, only(t, dir, "*.sysext.raw"), arch)
	}
	requireMerges(t, only(t, pack(t, goruntime.GOARCH, binaries, "sysext"), "*.sysext.raw"))
}

// requireBringsNothing requires that no package makes apt or dnf install another one: a containerd or
// a runtime of the distribution could replace the node's own.
func requireBringsNothing(t *testing.T, dir string) {
	t.Helper()
	fields, err := osexec.CommandContext(t.Context(), "dpkg-deb", "--field", only(t, dir, "*.deb"), "Depends", "Recommends", "Suggests").Output()
	require.NoError(t, err)
	require.Equal(t, "Suggests: containerd.io (>= 2.4) | containerd (>= 2.4), runc (>= 1.2)\n", string(fields))
	relations, err := osexec.CommandContext(t.Context(), "rpm", "--query", "--package", "--qf", "[%{RECOMMENDNAME} ][%{SUGGESTNAME} ]", only(t, dir, "*.rpm")).Output()
	require.NoError(t, err)
	require.Equal(t, "containerd.io runc ", string(relations))
}

// requireDists sees that two runs of make dist have given the same, and what that is.
func requireDists(t *testing.T, dir, again string) {
	t.Helper()
	require.Equal(t, digests(t, dir), digests(t, again))
	require.Len(t, digests(t, dir), 2*5+1)

	tarball := only(t, dir, "*-linux-"+goruntime.GOARCH+".tar.gz")
	unpacked := t.TempDir()
	for _, program := range []string{"podfsm", "containerd-podfsm", "podfsm-init"} {
		require.NoError(t, osexec.CommandContext(t.Context(), "tar", "-C", unpacked, "-xzf", tarball, "usr/bin/"+program).Run())
		version, err := osexec.CommandContext(t.Context(), filepath.Join(unpacked, "usr/bin", program), "--version").Output()
		require.NoError(t, err)
		require.Regexp(t, `v?0\.0\.0-1-g[0-9a-f]{7,}`, string(version))
	}
	for _, arch := range []string{"amd64", "arm64"} {
		told, err := osexec.CommandContext(t.Context(), "lintian", "--allow-root", "--fail-on", "error,warning", only(t, dir, "*_"+arch+".deb")).CombinedOutput()
		require.NoError(t, err, "%s", told)
	}
	host, err := osexec.CommandContext(t.Context(), "rpm", "--query", "--package", "--queryformat", "%{BUILDHOST}", only(t, dir, "*.x86_64.rpm")).Output()
	require.NoError(t, err)
	require.Equal(t, "localhost", string(host))
}

// requireImage sees that an image is for an architecture, and that the program in it finds podfsm's files.
func requireImage(t *testing.T, archive, arch string) {
	t.Helper()
	image, err := tarball.ImageFromPath(archive, nil)
	require.NoError(t, err)
	config, err := image.ConfigFile()
	require.NoError(t, err)
	require.Equal(t, arch, config.Architecture)
	require.Equal(t, []string{"/podfsm-deploy"}, config.Config.Entrypoint)
	files := map[string]int64{}
	for content := tar.NewReader(mutate.Extract(image)); ; {
		header, err := content.Next()
		if err == io.EOF {
			break
		}
		require.NoError(t, err)
		files[header.Name] = header.Mode
	}
	for name, mode := range map[string]int64{
		"podfsm-deploy": 0o755, "podfsm/usr/bin/containerd-podfsm": 0o755, "podfsm" + dropIn: 0o644, "podfsm" + handlerFile: 0o644,
	} {
		require.Equal(t, mode, files[name], name)
	}
	require.NotContains(t, files, "podfsm/usr/share/podfsm/uninstall", "podfsm-deploy uninstalls")
}

// requireExtension sees that a system extension is for an architecture, and has nothing outside of /usr.
func requireExtension(t *testing.T, image, arch string) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "extension")
	out, err := osexec.CommandContext(t.Context(), "unsquashfs", "-dest", dir, image).CombinedOutput()
	require.NoError(t, err, "%s", out)
	release, err := os.ReadFile(filepath.Join(dir, "usr/lib/extension-release.d/extension-release.podfsm"))
	require.NoError(t, err)
	require.Equal(t, "ID=_any\nARCHITECTURE="+map[string]string{"amd64": "x86-64", "arm64": "arm64"}[arch]+"\n", string(release))
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	require.Len(t, entries, 1)
	require.FileExists(t, filepath.Join(dir, dropIn))
	require.FileExists(t, filepath.Join(dir, "usr/share/podfsm/podfsm.toml"))
}

// mergeExtension has systemd merge an extension into /usr, in a mount namespace of its own.
const mergeExtension = `set -e
mount --make-rshared /
mount -t tmpfs tmpfs /run
mkdir /run/extensions
cp "$1" /run/extensions/podfsm.raw
systemd-sysext merge
cat /usr/bin/podfsm /usr/lib/systemd/system/containerd.service.d/podfsm.conf
systemd-sysext unmerge
[ ! -e /usr/bin/podfsm ]
`

// requireMerges sees that systemd takes a system extension for this machine.
func requireMerges(t *testing.T, image string) {
	t.Helper()
	out, err := osexec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "private", "sh", "-c", mergeExtension, "merge", image).CombinedOutput()
	require.NoError(t, err, "%s", out)
	require.Contains(t, string(out), "ExecStart=/usr/bin/containerd-podfsm")
}

// requirePages requires that a tarball has all pages, and that their links work.
func requirePages(t *testing.T, tarball string) {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, osexec.CommandContext(t.Context(), "tar", "-C", dir, "-xzf", tarball, "usr/share/doc/podfsm").Run())
	root := filepath.Join(dir, "usr/share/doc/podfsm")
	for page, text := range pages(t) {
		require.FileExists(t, filepath.Join(root, page))
		in := filepath.Dir(filepath.Join(root, page))
		for _, link := range regexp.MustCompile(`\]\(([^):#]+)[)#]`).FindAllStringSubmatch(text, -1) {
			if target := filepath.Join(in, link[1]); strings.HasPrefix(target, filepath.Join(root, "docs")) {
				require.FileExists(t, target, "linked in %s", page)
			}
		}
	}
}

// dist runs make dist on a copy of this repository that is a commit of its own, the same each time.
func dist(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	script := `set -e
tar -C .. --exclude=./.git --exclude=./.build --exclude=./bin --exclude=./dist -c . | tar -C "$1" -x
cd "$1"
git init -q
git add -A
git -c user.name=dist -c user.email=dist@localhost commit -qm dist
make dist
`
	cmd := osexec.CommandContext(t.Context(), "bash", "-c", script, "dist", dir)
	cmd.Env = append(os.Environ(), "GIT_AUTHOR_DATE=1795529540 +0000", "GIT_COMMITTER_DATE=1795529540 +0000")
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "%s", out)
	return filepath.Join(dir, "dist")
}

// digests are those of all files of a folder.
func digests(t *testing.T, dir string) map[string]string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	require.NoError(t, err)
	all := map[string]string{}
	for _, entry := range entries {
		content, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		require.NoError(t, err)
		sum := sha256.Sum256(content)
		all[entry.Name()] = hex.EncodeToString(sum[:])
	}
	return all
}
