package pause

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// InitName is the file name of the program that becomes pause.
	InitName = "podfsm-init"

	// protocol is the version of podfsm-init's arguments and descriptors that this package speaks.
	protocol = "1"
)

// FindInit returns the path of podfsm-init. Like containerd for a shim, it looks beside the daemon's executable,
// then in PATH. It fails with NotFound and the remedy.
func FindInit() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fmt.Errorf("failed to find %s: %w", InitName, err)
	}
	beside := filepath.Join(filepath.Dir(self), InitName)
	if _, err := os.Stat(beside); err == nil {
		return beside, nil
	}
	inPath, err := exec.LookPath(InitName)
	if err != nil {
		return "", fmt.Errorf("there is no %s beside %q nor in PATH; install the one of this release there, or set init_path in podfsm's section of containerd's configuration: %w",
			InitName, self, errdefs.ErrNotFound)
	}
	return inPath, nil
}

func loadInit(path string) (*os.File, error) {
	source, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer source.Close()
	return sealed(InitName, source)
}

// versionTimeout bounds the run of podfsm-init that prints its version, which takes a few milliseconds.
const versionTimeout = 10 * time.Second

// checkProtocol refuses a podfsm-init of another release before any pod is started with it.
func checkProtocol(program *os.File) error {
	ctx, cancel := context.WithTimeout(context.Background(), versionTimeout)
	defer cancel()
	_, err := versionOf(ctx, program, nil)
	return err
}

// versionOf runs podfsm-init for its version. It executes the descriptor, because the ids of a user namespace may
// not be able to traverse the path.
func versionOf(ctx context.Context, program *os.File, attr *syscall.SysProcAttr) (string, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/fd/3", "--version")
	cmd.ExtraFiles, cmd.SysProcAttr = []*os.File{program}, attr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("failed to get the version of %s: %w", InitName, err)
	}
	version := strings.TrimSpace(string(out))
	if !strings.HasSuffix(version, " protocol "+protocol) {
		return "", fmt.Errorf("%s reports the version %.100q, but this release needs protocol %s: %w", InitName, version, protocol, errdefs.ErrFailedPrecondition)
	}
	return version, nil
}

// sealed copies a file into memory that no holder of a descriptor can change (memfd_create(2), fcntl_sealing).
func sealed(name string, source io.Reader) (*os.File, error) {
	const flags = unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	fd, err := unix.MemfdCreate(name, flags|unix.MFD_EXEC)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(name, flags) // Linux before 6.3
	}
	if err != nil {
		return nil, err
	}
	file := os.NewFile(uintptr(fd), name)
	defer file.Close()
	if _, err := io.Copy(file, source); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(file.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_SEAL|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_WRITE); err != nil {
		return nil, err
	}
	return os.Open(fdPath(file)) // what is open for writing can't be executed (ETXTBSY)
}

// Examine runs podfsm-init once, in new namespaces of every kind that pause has, and returns its version. It
// changes nothing.
//
// Errors: NotFound for a missing program, FailedPrecondition for a program of another release; those of clone(2).
func Examine(ctx context.Context, initPath string) (version string, err error) {
	program, err := loadInit(initPath)
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", err
	}
	defer program.Close()
	version, err = versionOf(ctx, program, &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		// It needs no id mappings: it prints its version under any ids.
	})
	if err != nil {
		return "", fmt.Errorf("failed to run %q in namespaces of its own: %w", initPath, err)
	}
	return version, nil
}
