/* Programs that do what few do: odd_program WHAT. Each prints what it saw and ends in its own way. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;
static char *self;

static void churn(int rounds)
{
    void *kept[64] = {0};
    for (int i = 0; i < rounds; i++) {
        free(kept[i % 64]);
        kept[i % 64] = malloc(16 + (size_t)(i * 37) % 3000);
    }
    for (int i = 0; i < 64; i += 2)
        free(kept[i]);
}

static void say(const char *text)
{
    (void)!write(1, text, strlen(text));
}

static int say_number(int number)
{
    char text[32];
    snprintf(text, sizeof text, "%d\n", number);
    say(text);
    return 0;
}

static int waited(void)
{
    int status = -1;
    wait(&status);
    return status;
}

/* ---- ends */

static int by_abort(void) { say("before\n"); abort(); }
static int by_segv(void) { say("before\n"); raise(SIGSEGV); return 1; }
static int by_exit_now(void) { printf("lost"); _exit(17); }
static int by_system_call(void) { syscall(SYS_exit_group, 18); return 1; }
static int by_quick_exit(void) { quick_exit(19); }

static int by_double_free(void)
{
    char *volatile block = malloc(24);
    free(block);
    free(block); /* glibc says so, and aborts */
    return 0;
}

static void *ends_all(void *nothing)
{
    (void)nothing;
    exit(9);
}

static void *lingers(void *nothing)
{
    usleep(20000);
    churn(100);
    return nothing;
}

static int by_thread(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, ends_all, NULL);
    pause();
    return 0;
}

/* The first thread ends, another goes on: /proc/PID then belongs to a zombie. */
static int first_thread_ends(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, lingers, NULL);
    pthread_detach(thread);
    pthread_exit(NULL);
}

/* ---- processes */

static int execs_itself(void)
{
    const char *left = getenv("LEFT");
    char next[16];
    int n = left ? atoi(left) : 6;
    if (n == 0)
        return say_number(getpid() > 0);
    snprintf(next, sizeof next, "%d", n - 1);
    setenv("LEFT", next, 1);
    execl(self, self, "execs_itself", (char *)NULL);
    return 1;
}

static int forks_deeply(void)
{
    for (int depth = 0; depth < 8; depth++) {
        pid_t child = fork();
        if (child) {
            churn(100);
            return WEXITSTATUS(waited());
        }
        churn(50);
    }
    say("deep\n");
    return 6;
}

static int forks_below_threads(void)
{
    pthread_t thread;
    for (int i = 0; i < 3; i++)
        pthread_create(&thread, NULL, lingers, NULL);
    for (int i = 0; i < 10; i++) {
        if (fork() == 0) {
            churn(50);
            _exit(3);
        }
        if (WEXITSTATUS(waited()) != 3)
            return 1;
    }
    say("ok\n");
    exit(0);
}

static int vforks(void)
{
    if (vfork() == 0) {
        execl("/bin/echo", "echo", "vforked", (char *)NULL);
        _exit(1);
    }
    int first = waited();
    if (vfork() == 0)
        _exit(4);
    return first ? 1 : WEXITSTATUS(waited());
}

static int daemonises(void)
{
    if (daemon(1, 1))
        return 1;
    churn(500);
    say("daemon\n");
    return 0;
}

static int stops_and_goes_on(void)
{
    if (fork() == 0) {
        usleep(50000);
        kill(getppid(), SIGCONT);
        _exit(0);
    }
    raise(SIGSTOP);
    say("continued\n");
    return 0;
}

static int in_a_pid_namespace(void)
{
    if (unshare(CLONE_NEWUSER | CLONE_NEWPID) && unshare(CLONE_NEWPID)) {
        say("refused\n");
        return 77;
    }
    if (fork() == 0) {
        churn(100);
        say_number(getpid());
        execl("/bin/echo", "echo", "inside", (char *)NULL);
    }
    return WEXITSTATUS(waited());
}

static int in_a_chroot(void)
{
    if (mkdtemp(strcpy(self, "jailXXXXXX")) == NULL || chroot(self) || chdir("/")) {
        say("refused\n");
        return 77;
    }
    churn(2000);
    if (fork() == 0) {
        churn(10);
        _exit(2);
    }
    say_number(WEXITSTATUS(waited()));
    execl("/bin/true", "true", (char *)NULL);
    say_number(errno);
    return 4;
}

static int gives_up_root(void)
{
    if (setgid(65534) || setuid(65534)) {
        say("refused\n");
        return 77;
    }
    churn(2000);
    if (fork() == 0)
        _exit(2);
    say_number(WEXITSTATUS(waited()));
    return 0;
}

/* ---- files, limits, memory, signals */

static int closes_all(void)
{
    for (int fd = 0; fd < 1024; fd++)
        close(fd);
    churn(5000);
    return open("/dev/null", O_WRONLY) != 0;
}

static int first_free_file(void)
{
    return say_number(open("/dev/null", O_RDONLY));
}

static int runs_out_of_memory(void)
{
    struct rlimit limit = {200u << 20, 200u << 20};
    int blocks = 0;
    setrlimit(RLIMIT_AS, &limit);
    while (blocks < 100000 && malloc(1 << 20))
        blocks++;
    say(blocks > 100 ? "many\n" : "few\n");
    errno = 0;
    say(malloc((size_t)1 << 40) == NULL && errno == ENOMEM ? "none\n" : "?\n");
    return 0;
}

static int locks_its_memory(void)
{
    int failed = mlockall(MCL_CURRENT | MCL_FUTURE);
    churn(2000);
    return say_number(failed);
}

static int moves_the_break(void)
{
    sbrk(100000);
    void *a = malloc(300000);
    sbrk(3 * 4096);
    void *b = malloc(200000);
    free(a);
    free(b);
    a = malloc(130000);
    sbrk(16);
    churn(500);
    free(a);
    malloc_trim(0);
    free(realloc(realloc(memalign(4096, 10000), 5000000), 100));
    return 0;
}

static int recurses(int depth)
{
    volatile char frame[64];
    frame[0] = 1;
    if (depth % 500 == 0)
        free(malloc(50));
    return depth ? recurses(depth - 1) + frame[0] : 0;
}

static int recurses_deeply(void)
{
    return say_number(recurses(40000));
}

static sigjmp_buf back;

static void jump_back(int number)
{
    siglongjmp(back, number);
}

static int survives_faults(void)
{
    volatile int faults = 0;
    signal(SIGSEGV, jump_back);
    while (faults < 50)
        if (sigsetjmp(back, 1))
            faults++;
        else
            *(volatile int *)16 = 1;
    return say_number(faults);
}

static void allocate(int number)
{
    free(malloc((size_t)number * 10));
}

static int handles_signals_on_its_own_stack(void)
{
    stack_t stack = {.ss_sp = malloc((size_t)MINSIGSTKSZ), .ss_size = (size_t)MINSIGSTKSZ};
    struct sigaction action = {.sa_handler = allocate, .sa_flags = SA_ONSTACK};
    sigaltstack(&stack, NULL);
    sigaction(SIGUSR1, &action, NULL);
    for (int i = 0; i < 1000; i++)
        raise(SIGUSR1);
    say("handled\n");
    return 0;
}

#define ENTRY(name) {#name, name}

static const struct {
    const char *name;
    int (*run)(void);
} table[] = {
    ENTRY(by_abort), ENTRY(by_segv), ENTRY(by_exit_now), ENTRY(by_system_call), ENTRY(by_quick_exit), ENTRY(by_double_free),
    ENTRY(by_thread), ENTRY(first_thread_ends), ENTRY(execs_itself), ENTRY(forks_deeply), ENTRY(forks_below_threads),
    ENTRY(vforks), ENTRY(daemonises), ENTRY(stops_and_goes_on), ENTRY(in_a_pid_namespace), ENTRY(in_a_chroot),
    ENTRY(gives_up_root), ENTRY(closes_all), ENTRY(first_free_file), ENTRY(runs_out_of_memory), ENTRY(locks_its_memory),
    ENTRY(moves_the_break), ENTRY(recurses_deeply), ENTRY(survives_faults), ENTRY(handles_signals_on_its_own_stack),
};

int main(int argc, char **argv)
{
    static char path[4096];
    self = strncpy(path, argv[0], sizeof path - 1);
    churn(100);
    for (size_t i = 0; argc == 2 && i < sizeof table / sizeof *table; i++)
        if (strcmp(argv[1], table[i].name) == 0)
            return table[i].run();
    return 2;
}
