// A pause program that tries things, and tells by its exit code.
//
//	prober --version  says that it is podfsm-init of another release
//	prober exit N     exits with N
//	prober seccomp    exits with 0 when every system call is allowed or refused as it should be, else with the number of its line
//	prober readonly   the same for what it can change of the filesystem
//	prober rootreadonly
//	                  the same for the root filesystem alone, and what it can see of another
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/keyctl.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int line;

// refused ends the program unless a system call fails with an error.
static void refused(int number, long result, int error) {
	line = number;
	if (result != -1 || errno != error)
		_exit(line);
}

static void allowed(int number, long result) {
	line = number;
	if (result == -1)
		_exit(line);
}

#define REFUSED(call) (errno = 0, refused(__LINE__, (call), EPERM))
#define FAILS(call, error) (errno = 0, refused(__LINE__, (call), error))
#define ALLOWED(call) allowed(__LINE__, (call))

#if defined(__x86_64__)
// By the 32-bit interface, where 20 is getpid and x86_64 has writev: the filter sees another architecture.
static long getpid32(void) {
	long result;
	__asm__ volatile("int $0x80" : "=a"(result) : "a"(20L) : "r8", "r9", "r10", "r11", "memory");
	if (result < 0 && result > -4096) {
		errno = -result;
		return -1;
	}
	return result;
}
#endif

static void seccomp(char *self) {
	char stack[64];
	struct timespec moment = {.tv_nsec = 1000000};
	int status;
	pid_t child;

	REFUSED(syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 0));
	REFUSED(syscall(SYS_add_key, "user", "x", "x", 1, KEY_SPEC_PROCESS_KEYRING));
	REFUSED(syscall(SYS_request_key, "user", "x", NULL, 0));
	REFUSED(unshare(CLONE_NEWUSER));
	REFUSED(unshare(CLONE_NEWNS));
	REFUSED(setns(0, 0));
	REFUSED(mount("none", "/dev", "tmpfs", 0, ""));
	REFUSED(umount2("/dev", MNT_DETACH));
	REFUSED(syscall(SYS_pivot_root, ".", "."));
	REFUSED(syscall(SYS_open_tree, AT_FDCWD, "/", 0));
	REFUSED(syscall(SYS_move_mount, AT_FDCWD, "/", AT_FDCWD, "/dev", 0));
	REFUSED(syscall(SYS_mount_setattr, AT_FDCWD, "/", 0, NULL, 0));
	REFUSED(syscall(SYS_fsopen, "tmpfs", 0));
	REFUSED(chroot("/"));
	REFUSED(syscall(SYS_bpf, 0, NULL, 0));
	REFUSED(syscall(SYS_perf_event_open, NULL, 0, -1, -1, 0));
	REFUSED(syscall(SYS_userfaultfd, 0));
	REFUSED(syscall(SYS_init_module, NULL, 0, ""));
	REFUSED(syscall(SYS_kexec_load, 0, 0, NULL, 0));
	REFUSED(syscall(SYS_reboot, 0, 0, 0, NULL));
	REFUSED(syscall(SYS_io_uring_setup, 1, NULL));
	REFUSED(syscall(SYS_open_by_handle_at, AT_FDCWD, NULL, 0));
	REFUSED(syscall(SYS_settimeofday, NULL, NULL));
	REFUSED(syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, NULL, NULL, NULL, NULL));
	REFUSED(syscall(SYS_clone, CLONE_NEWNET | SIGCHLD, NULL, NULL, NULL, NULL));
	REFUSED(syscall(SYS_personality, ADDR_NO_RANDOMIZE));
	REFUSED(socket(AF_VSOCK, SOCK_STREAM, 0));
	REFUSED(syscall(0x3fffffff));
	FAILS(syscall(SYS_clone3, stack, sizeof stack), ENOSYS); // for which libraries call clone
#if defined(__x86_64__)
	FAILS(syscall(0x40000000 | SYS_getpid), ENOSYS);
	REFUSED(getpid32());
#endif

	// Only its own children can it trace, as with runc.
	FAILS(ptrace(PTRACE_ATTACH, getppid() ? getppid() : 1, NULL, NULL), EPERM);
	ALLOWED(personality(0xffffffff));
	ALLOWED(socket(AF_INET, SOCK_STREAM, 0));
	ALLOWED(nanosleep(&moment, NULL));
	ALLOWED(child = fork());
	if (child == 0) {
		execl(self, self, "exit", "7", NULL);
		_exit(1);
	}
	ALLOWED(waitpid(child, &status, 0));
	if (!WIFEXITED(status) || WEXITSTATUS(status) != 7)
		_exit(__LINE__);
	_exit(0);
}

static void rootreadonly(void) {
	FAILS(open("/x", O_CREAT | O_WRONLY, 0600), EROFS);
	FAILS(mkdir("/work/x", 0700), EROFS);
	FAILS(open("/proc/self/status", O_RDONLY), ENOENT);
	FAILS(open("/etc/passwd", O_RDONLY), ENOENT);
	FAILS(open("../../../../etc/passwd", O_RDONLY), ENOENT);
	_exit(0);
}

static void readonly(void) {
	FAILS(open("/x", O_CREAT | O_WRONLY, 0600), EROFS);
	FAILS(open("/dev/x", O_CREAT | O_WRONLY, 0600), EROFS);
	FAILS(open("/dev/shm/x", O_CREAT | O_WRONLY, 0600), EROFS);
	FAILS(mkdir("/work/x", 0700), EROFS);
	FAILS(chmod("/", 0777), EROFS);
	// Descriptor 0 is the host's /dev/null.
	FAILS(fchmod(0, 0600), EROFS);
	FAILS(fchown(0, 0, 0), EROFS);
	ALLOWED(write(1, "x", 1));
	FAILS(open("/proc/self/status", O_RDONLY), ENOENT);
	_exit(0);
}

int main(int argc, char **argv) {
	if (argc == 2 && strcmp(argv[1], "--version") == 0)
		_exit(write(1, "podfsm-init v9 protocol 99\n", 27) != 27);
	if (argc == 3 && strcmp(argv[1], "exit") == 0)
		_exit(atoi(argv[2]));
	if (argc == 2 && strcmp(argv[1], "seccomp") == 0)
		seccomp(argv[0]);
	if (argc == 2 && strcmp(argv[1], "readonly") == 0)
		readonly();
	if (argc == 2 && strcmp(argv[1], "rootreadonly") == 0)
		rootreadonly();
	return 255;
}
