/* Confines itself with seccomp, then allocates, forks and exits: shim_confined HOW FATAL. HOW: prctl, syscall, strict. */
#include <errno.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define ANSWER(nr, what)                                                                                               \
    {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, (nr)}, {BPF_RET | BPF_K, 0, 0, (what)}

static void install(const char *how, const struct sock_fprog *program)
{
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    /* As libseccomp asks what the kernel knows. */
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_STRICT, 1, NULL) != -1 || errno != EINVAL)
        perror("probe");
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_TSYNC, NULL) != -1 || errno != EFAULT)
        perror("probe");
    long done = strcmp(how, "prctl") == 0 ? prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program)
                                          : syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, program);
    if (done)
        perror("seccomp");
}

static void churn(void)
{
    for (int i = 0; i < 1000; i++)
        free(malloc(16 + (size_t)i));
    munmap(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 4096);
}

int main(int argc, char **argv)
{
    char said[64];
    churn();
    if (argc < 3)
        return 2;
    if (strcmp(argv[1], "strict") == 0) {
        prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT);
        for (int i = 0; i < 1000; i++)
            free(malloc(16));
        (void)!write(1, "strict\n", 7);
        syscall(SYS_exit, 5);
    }
    unsigned no = strcmp(argv[2], "kill") == 0 ? SECCOMP_RET_KILL_PROCESS : SECCOMP_RET_ERRNO | EPERM;
    struct sock_filter filter[] = {
        {BPF_LD | BPF_W | BPF_ABS, 0, 0, 0},
        ANSWER(SYS_open, no),      ANSWER(SYS_openat, no),     ANSWER(SYS_mkdir, no),     ANSWER(SYS_fallocate, no),
        ANSWER(SYS_rename, no),    ANSWER(SYS_readlink, no),   ANSWER(SYS_faccessat, no), ANSWER(SYS_unlink, no),
        {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW},
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    install(argv[1], &program);
    churn();
    int status = 0;
    pid_t child = fork();
    if (child == 0) {
        churn();
        _exit(3);
    }
    waitpid(child, &status, 0);
    int length = snprintf(said, sizeof said, "child %d\n", status);
    (void)!write(1, said, (size_t)length);
    return 7;
}
