// The first process of a test pod: it holds the namespaces, reaps what is
// re-parented to it in a shared pid namespace, and ends when told to.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

static void reap(int signal) {
	while (waitpid(-1, NULL, WNOHANG) > 0)
		;
}

static void quit(int signal) {
	_exit(0);
}

int main(void) {
	struct sigaction chld = {.sa_handler = reap, .sa_flags = SA_NOCLDSTOP | SA_RESTART};
	struct sigaction term = {.sa_handler = quit};

	if (sigaction(SIGCHLD, &chld, NULL) || sigaction(SIGINT, &term, NULL) || sigaction(SIGTERM, &term, NULL))
		return 1;
	for (;;)
		pause();
}
