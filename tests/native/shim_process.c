/* Ways a process starts others, is interrupted and ends: shim_process WAY [ARGUMENT]. What it prints is checked by the tests. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <threads.h>
#include <unistd.h>

extern char **environ;
static void *volatile sink;
static const char *argument;

static int status_of(pid_t child)
{
    int status = 0;
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int way_fork(void)
{
    void *inherited = sink = malloc(0x4444);
    pid_t child = fork();
    if (child == 0) {
        void *volatile block = malloc(0x5555);
        free(block == NULL ? NULL : inherited == sink ? inherited : NULL);
        exit(7);
    }
    sink = malloc(0x6666);
    printf("%d %d\n", child, status_of(child));
    return 0;
}

/* A child that libc's fork knows nothing of. */
static int way_rawfork(void)
{
    sink = malloc(0x4444);
    pid_t child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0);
    if (child == 0) {
        sink = malloc(0x5555);
        _exit(8);
    }
    int status = status_of(child);
    sink = malloc(0x6666);
    printf("%d %d\n", child, status);
    return 0;
}

static int way_vfork(void)
{
    sink = malloc(0x4444);
    pid_t child = vfork();
    if (child == 0)
        _exit(9);
    int status = status_of(child);
    sink = malloc(0x6666);
    pid_t second = vfork();
    if (second == 0) {
        execl("/bin/echo", "echo", "from", "vfork", NULL);
        _exit(1);
    }
    printf("%d %d\n", status, status_of(second));
    return 0;
}

static int way_spawn(void)
{
    char *const argv[] = {"sh", "-c", "exit 5", NULL};
    pid_t child;
    sink = malloc(0x4444);
    int failed = posix_spawn(&child, "/bin/sh", NULL, NULL, argv, environ);
    int first = status_of(child);
    printf("%d %d %d\n", failed, first, system("exit 6") >> 8);
    return 0;
}

static int way_exec(void)
{
    sink = malloc(0x4444);
    execlp("echo", "echo", "after", "exec", (char *)NULL);
    return 1;
}

static int way_exec_bare(void)
{
    char *const argv[] = {"echo", "bare", NULL};
    char *const nothing[] = {NULL};
    execve("/bin/echo", argv, nothing);
    return 1;
}

/* Every exec fails and says why, and the program goes on recording. argument: an executable file that is no program. */
static int way_exec_fail(void)
{
    char *const argv[] = {"x", NULL};
    char *const nothing[] = {NULL};
    int errors[4];
    errno = 0;
    execv("/nowhere/to/be/found", argv), errors[0] = errno;
    execve(argument, argv, environ), errors[1] = errno;
    execlp("no-such-program-anywhere", "x", (char *)NULL), errors[2] = errno;
    execle("/etc/passwd", "x", (char *)NULL, nothing), errors[3] = errno;
    sink = malloc(0x6666);
    printf("%d %d %d %d\n", errors[0], errors[1], errors[2], errors[3]);
    return 3;
}

static int way_exit_in_thread_main(void *nothing)
{
    (void)nothing;
    sink = malloc(0x4444);
    exit(4);
}

static int way_exit_thread(void)
{
    thrd_t thread;
    thrd_create(&thread, way_exit_in_thread_main, NULL);
    for (;;)
        pause();
    return 0;
}

static void late(void)
{
    sink = malloc(0x7777);
    fputs("late\n", stdout);
}

static int way_return(void)
{
    atexit(late);
    return 11;
}

static int way_exit(void)
{
    atexit(late);
    exit(12);
}

static int way__exit(void)
{
    sink = malloc(0x7777);
    _exit(13);
}

static int way__Exit(void)
{
    sink = malloc(0x7777);
    _Exit(14);
}

static int way_quick_exit(void)
{
    at_quick_exit(late);
    setvbuf(stdout, NULL, _IONBF, 0);
    quick_exit(15);
}

static int way_abort(void)
{
    sink = malloc(0x7777);
    abort();
}

static int way_kill(void)
{
    for (int i = 0; i < 1000; i++)
        sink = malloc(0x100 + (size_t)i);
    kill(getpid(), SIGKILL);
    return 0;
}

/* ---- signals ---- */

static volatile sig_atomic_t handled;

static void on_signal(int number)
{
    (void)number;
    void *p = malloc(0x9999);
    sink = p;
    free(p);
    handled++;
}

static void start_timer(void (*handler)(int), int flags)
{
    struct sigaction action = {.sa_handler = handler, .sa_flags = flags};
    struct itimerval every = {{0, 200}, {0, 200}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &every, NULL);
}

/*
 * A handler that allocates hits every instruction of the hooks sooner or later. (What is undefined in C works here as long as
 * the signal does not land inside libc's own malloc: a size above the mmap threshold keeps libc's part lock-free.)
 */
static void on_mapping_signal(int number)
{
    (void)number;
    void *p = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(p, 4096);
    handled++;
}

static int way_signal(void)
{
    start_timer(on_mapping_signal, SA_NODEFER);
    while (handled < 400) {
        void *p = malloc(100);
        sink = p;
        free(p);
    }
    signal(SIGALRM, SIG_IGN);
    return 0;
}

static int way_handler_allocates(void)
{
    signal(SIGUSR1, on_signal);
    raise(SIGUSR1);
    printf("%d\n", handled);
    return 0;
}

/* A handler that forks, in the middle of a call sooner or later: the child goes on with that call. */
static volatile sig_atomic_t is_child, children, failures;

static void on_fork_signal(int number)
{
    (void)number;
    if (is_child || children >= 60)
        return;
    pid_t child = fork();
    is_child = child == 0;
    children++;
    failures += child > 0 && status_of(child) != 21;
}

static int way_fork_in_handler(void)
{
    start_timer(on_fork_signal, 0);
    while (children < 60 && !is_child) {
        void *p = malloc(100);
        sink = p;
        free(p);
    }
    if (is_child)
        _exit(21);
    printf("%d\n", (int)failures);
    return 0;
}

/* A handler that leaves by siglongjmp: the call it interrupted never returns. */
static sigjmp_buf jump;

static void on_jump(int number)
{
    (void)number;
    handled++;
    siglongjmp(jump, 1);
}

static int way_longjmp(void)
{
    volatile int rounds = 0;
    struct sigaction action = {.sa_handler = on_jump};
    /* A false chunk that says it lies in a thread's arena: free looks for the arena at an address that is not mapped. */
    uint64_t *chunk = mmap((void *)0x300000001000, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    chunk[1] = 0x100005;
    sigaction(SIGSEGV, &action, NULL);
    while (rounds++ < 300) {
        if (sigsetjmp(jump, 1) == 0) {
            void *volatile block = chunk + 2;
            free(block);
        }
        sink = malloc(0x3333);
        free(sink);
    }
    printf("%d\n", (int)handled);
    return 0;
}

/* ---- threads ---- */

#define BLOCKS 20000
static void *_Atomic exchange[64];

static void *churn(void *seed)
{
    unsigned state = (unsigned)(uintptr_t)seed;
    for (int i = 0; i < BLOCKS; i++) {
        state = state * 1103515245 + 12345;
        void *p = malloc(16 + (state >> 16) % 600);
        p = __atomic_exchange_n(&exchange[(state >> 8) % 64], p, __ATOMIC_ACQ_REL);
        if (i % 7 == 0)
            p = realloc(p, 700);
        free(p);
    }
    return seed;
}

static int way_threads(void)
{
    pthread_t threads[4];
    for (uintptr_t i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, churn, (void *)(i + 1));
    uintptr_t sum = 0;
    for (int i = 0; i < 4; i++) {
        void *result;
        pthread_join(threads[i], &result);
        sum += (uintptr_t)result;
    }
    printf("%lu\n", (unsigned long)sum);
    return 0;
}

static void free_late(void *p) { free(p); }
static pthread_key_t key;

static void *by_return(void *nothing)
{
    pthread_setspecific(key, malloc(0x2222));
    return nothing;
}

static void *by_exit(void *nothing)
{
    sink = malloc(0x2223);
    pthread_exit(nothing);
}

static void *by_cancel(void *nothing)
{
    sink = malloc(0x2224);
    for (;;)
        pause();
    return nothing;
}

static int by_c11(void *nothing)
{
    (void)nothing;
    sink = malloc(0x2225);
    return -5;
}

/* Four ways a thread may end; a destructor frees after its routine has returned. */
static int way_thread_ends(void)
{
    pthread_t threads[3];
    thrd_t c11;
    void *results[3];
    int result = 0;
    pthread_key_create(&key, free_late);
    pthread_create(&threads[0], NULL, by_return, (void *)1);
    pthread_join(threads[0], &results[0]);
    pthread_create(&threads[1], NULL, by_exit, (void *)2);
    pthread_join(threads[1], &results[1]);
    pthread_create(&threads[2], NULL, by_cancel, (void *)3);
    usleep(20000);
    pthread_cancel(threads[2]);
    pthread_join(threads[2], &results[2]);
    thrd_create(&c11, by_c11, NULL);
    thrd_join(c11, &result);
    printf("%p %p %d %d\n", results[0], results[1], results[2] == PTHREAD_CANCELED, result);
    return 0;
}

static void *short_life(void *nothing)
{
    sink = malloc(0x111);
    return nothing;
}

/* Many threads, one after another: rings are used again. */
static int way_many_threads(void)
{
    for (int i = 0; i < 60; i++) {
        pthread_t thread;
        pthread_create(&thread, NULL, short_life, NULL);
        pthread_join(thread, NULL);
        usleep(5000);
    }
    return 0;
}

/* ---- errno, modules ---- */

static int way_errno(void)
{
    errno = 77;
    void *p = malloc(10);
    p = realloc(p, 20);
    free(p);
    free(calloc(1, 5));
    int kept = errno;
    volatile size_t huge = (size_t)-1 / 2;
    errno = 0;
    sink = malloc(huge);
    int of_malloc = errno;
    errno = 0;
    sink = reallocarray(NULL, huge, 9);
    int of_array = errno;
    errno = 55;
    int status = posix_memalign(&p, 3, 5);
    printf("%d %d %d %d %d\n", kept, of_malloc == ENOMEM, of_array == ENOMEM, status == EINVAL, errno);
    return 0;
}

/* argument: a shared object with a function `loaded` that allocates. */
static int way_dlopen(void)
{
    for (int i = 0; i < 2; i++) {
        void *handle = dlopen(argument, RTLD_NOW);
        if (!handle) {
            puts(dlerror());
            return 1;
        }
        void (*loaded)(void) = (void (*)(void))dlsym(handle, "loaded");
        loaded();
        dlclose(handle);
    }
    return 0;
}

/* Found only through the RUNPATH of this program, which the loader learns from the caller's address. */
static int way_dlopen_runpath(void)
{
    void *handle = dlopen("libshim_loaded.so", RTLD_NOW);
    puts(handle ? "found" : "not found");
    return 0;
}

static int way_many(void)
{
    for (int i = 0; i < 400000; i++) {
        void *p = malloc(24);
        sink = p;
        free(p);
    }
    puts("done");
    return 0;
}

static int way_limit(void)
{
    struct rlimit limit = {64 << 20, 64 << 20};
    setrlimit(RLIMIT_AS, &limit);
    pthread_t thread;
    int made = 0;
    for (int i = 0; i < 40 && pthread_create(&thread, NULL, by_cancel, NULL) == 0; i++)
        made++;
    usleep(100000);
    printf("%d\n", made > 0);
    return 0;
}

/* First calls of a thread with the smallest stack there is, and of a handler on a small alternate stack. */
static void *small_thread(void *nothing)
{
    static char stack[8192] __attribute__((aligned(64)));
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof stack};
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_ONSTACK};
    sigaltstack(&alternate, NULL);
    sigaction(SIGUSR1, &action, NULL);
    if (nothing == NULL) {
        sink = malloc(0x4444);
        free(sink);
    }
    raise(SIGUSR1);
    return nothing;
}

static int way_small_stacks(void)
{
    for (uintptr_t i = 0; i < 2; i++) {
        pthread_attr_t attributes;
        pthread_t thread;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, PTHREAD_STACK_MIN);
        pthread_create(&thread, &attributes, small_thread, (void *)i);
        pthread_join(thread, NULL);
    }
    printf("%d\n", (int)handled);
    return 0;
}

/* Longer than the short clock field of a slot can say. */
static int way_sleep(void)
{
    sink = malloc(0x4444);
    usleep(1700000);
    sink = malloc(0x5555);
    return 0;
}

/* No file can be opened any more when a thread wants its ring. */
static int way_nofile(void)
{
    struct rlimit limit = {3, 3};
    pthread_t thread;
    setrlimit(RLIMIT_NOFILE, &limit);
    pthread_create(&thread, NULL, short_life, NULL);
    pthread_join(thread, NULL);
    puts("joined");
    return 0;
}

#define WAY(name) {#name, way_##name}
static const struct {
    const char *name;
    int (*run)(void);
} ways[] = {WAY(fork), WAY(rawfork), WAY(vfork), WAY(spawn), WAY(exec), WAY(exec_bare), WAY(exec_fail), WAY(exit_thread),
            WAY(return), WAY(exit), WAY(_exit), WAY(_Exit), WAY(quick_exit), WAY(abort), WAY(kill), WAY(signal),
            WAY(handler_allocates), WAY(fork_in_handler), WAY(longjmp), WAY(threads), WAY(thread_ends), WAY(many_threads), WAY(errno),
            WAY(dlopen), WAY(dlopen_runpath), WAY(many), WAY(limit), WAY(nofile), WAY(sleep), WAY(small_stacks)};

int main(int argc, char **argv)
{
    argument = argc > 2 ? argv[2] : NULL;
    for (size_t i = 0; argc > 1 && i < sizeof ways / sizeof *ways; i++)
        if (strcmp(argv[1], ways[i].name) == 0)
            return ways[i].run();
    return 99;
}
