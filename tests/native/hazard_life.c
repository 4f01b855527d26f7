/*
 * Lives of processes and threads that a preloaded library easily disturbs: hazard_life WHAT [ARGUMENT]. What is printed must be
 * the same with and without the shim; 77 means that this user or kernel does not allow it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <malloc.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

extern char **environ;
static const char *self, *argument;
static volatile int stop;

#define REFUSED 77

static void churn(int rounds)
{
    void *kept[64] = {0};
    for (int i = 0; i < rounds; i++) {
        free(kept[i % 64]);
        kept[i % 64] = malloc(16 + (size_t)(i * 37) % 3000);
    }
    for (int i = 0; i < 64; i++)
        free(kept[i]);
}

/* Straight to the file: what is printed stays in order with what children print. */
static void say(const char *text) { (void)!write(1, text, strlen(text)); }

static int say_number(long number)
{
    char text[32];
    snprintf(text, sizeof text, "%ld\n", number);
    say(text);
    return 0;
}

static int status_of(pid_t child)
{
    int status = -1;
    return waitpid(child, &status, __WALL) == child ? status : -errno;
}

static void *churner(void *nothing)
{
    churn(200);
    return nothing;
}

static void *churner_for_ever(void *nothing)
{
    while (!stop) {
        churn(100);
        usleep(20);
    }
    return nothing;
}

static int run_threads(int count, void *(*routine)(void *), size_t stack_bytes)
{
    pthread_attr_t attributes;
    pthread_t threads[64];
    int made = 0;
    pthread_attr_init(&attributes);
    if (stack_bytes)
        pthread_attr_setstacksize(&attributes, stack_bytes);
    while (made < count && pthread_create(&threads[made], &attributes, routine, NULL) == 0)
        made++;
    for (int i = 0; i < made; i++)
        pthread_join(threads[i], NULL);
    return made;
}

static pthread_barrier_t all_there;

static void *meets_all(void *nothing)
{
    churn(20);
    pthread_barrier_wait(&all_there);
    churn(20);
    return nothing;
}

/* So many threads that all live at once. */
static int run_at_once(int count)
{
    pthread_barrier_init(&all_there, NULL, (unsigned)count);
    return run_threads(count, meets_all, 65536);
}

/* ---- children that libc's fork does not make */

static int in_child(int status)
{
    churn(300);
    _exit(status);
}

static int child_main(void *status)
{
    churn(300);
    return (int)(intptr_t)status;
}

static pid_t clone3_like_fork(void)
{
    struct clone_args arguments = {.exit_signal = SIGCHLD};
    return (pid_t)syscall(SYS_clone3, &arguments, sizeof arguments);
}

extern pid_t _Fork(void) __attribute__((weak));

static int raw_forks(void)
{
    static char stack[262144] __attribute__((aligned(64)));
    pid_t child;
    churn(200);
    if ((child = (pid_t)syscall(SYS_fork)) == 0)
        in_child(21);
    say_number(status_of(child));
    if ((child = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0)) == 0)
        in_child(22);
    say_number(status_of(child));
    if ((child = clone3_like_fork()) == 0)
        in_child(23);
    say_number(status_of(child));
    if ((child = _Fork ? _Fork() : fork()) == 0)
        in_child(24);
    say_number(status_of(child));
    child = clone(child_main, stack + sizeof stack, SIGCHLD, (void *)25);
    say_number(status_of(child));
    churn(200);
    return 0;
}

/* The child shares all memory with its parent, which waits (CLONE_VFORK), and starts a program. */
static int exec_in_shared_memory(void *path)
{
    execl(path, "echo", "shared", (char *)NULL);
    _exit(1);
}

static int clones_that_share_memory(void)
{
    static char stack[262144] __attribute__((aligned(64)));
    pid_t child = clone(exec_in_shared_memory, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD, "/bin/echo");
    say_number(status_of(child));
    churn(300);
    return 0;
}

/* In a raw child of a program with threads only system calls are safe: no lock of libc's is known to be free. */
static int raw_fork_while_threads_allocate(void)
{
    pthread_t threads[2];
    int bad = 0;
    for (int i = 0; i < 2; i++)
        pthread_create(&threads[i], NULL, churner_for_ever, NULL);
    for (int i = 0; i < 15; i++) {
        pid_t child = (pid_t)syscall(SYS_fork);
        if (child == 0) {
            void *p = mmap(NULL, 8192, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            munmap(p, 8192);
            _exit(3);
        }
        bad += status_of(child) != 3 << 8;
    }
    stop = 1;
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    return say_number(bad);
}

static int forks_while_threads_allocate(void)
{
    pthread_t threads[2];
    int bad = 0;
    for (int i = 0; i < 2; i++)
        pthread_create(&threads[i], NULL, churner_for_ever, NULL);
    for (int i = 0; i < 12; i++) {
        pid_t child = fork();
        if (child == 0)
            in_child(3);
        bad += status_of(child) != 3 << 8;
    }
    stop = 1;
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    return say_number(bad);
}

static int forks_without_wait(void)
{
    struct sigaction ignore = {.sa_handler = SIG_DFL, .sa_flags = SA_NOCLDWAIT};
    sigaction(SIGCHLD, &ignore, NULL);
    for (int i = 0; i < 20; i++)
        if (fork() == 0)
            in_child(0);
    while (wait(NULL) > 0)
        ;
    return say_number(errno == ECHILD);
}

static void allocates(void) { churn(50); }

static int handlers_of_fork_allocate(void)
{
    pthread_atfork(allocates, allocates, allocates);
    for (int i = 0; i < 5; i++) {
        pid_t child = fork();
        if (child == 0)
            exit(i);
        say_number(status_of(child));
    }
    return 0;
}

static void *forks_in_a_thread(void *nothing)
{
    pid_t child = fork();
    if (child == 0) {
        churn(100);
        say_number(run_threads(2, churner, 0));
        exit(8);
    }
    say_number(status_of(child));
    return nothing;
}

static int forks_in_threads(void)
{
    for (int i = 0; i < 4; i++)
        run_threads(1, forks_in_a_thread, 0);
    return 0;
}

static void start_churners(void)
{
    pthread_t thread;
    for (int i = 0; i < 3; i++)
        pthread_create(&thread, NULL, churner_for_ever, NULL);
    usleep(20000);
}

static int exits_while_threads_allocate(void)
{
    start_churners();
    say("exits\n");
    exit(5);
}

static int dies_while_threads_allocate(void)
{
    start_churners();
    say("dies\n");
    kill(getpid(), SIGTERM);
    pause();
    return 0;
}

static void *execs(void *nothing)
{
    execl("/bin/echo", "echo", "from a thread", (char *)NULL);
    return nothing;
}

static int execs_from_a_thread(void)
{
    start_churners();
    return run_threads(1, execs, 0);
}

/* Its second file is not what it was: nothing of ours may be written there. */
static int uses_stderr_for_data(void)
{
    char said[256] = "";
    close(2);
    if (open("data", O_RDWR | O_CREAT, 0600) != 2 || setgroups(0, NULL) || setgid(65534) || setuid(65534))
        return REFUSED;
    run_at_once(40); /* recording stops here, which it would like to say */
    (void)!write(2, "data\n", 5);
    say_number(pread(2, said, sizeof said - 1, 0));
    return 0;
}

/* ---- programs that are started without us */

static int spawn(char *const *environment, int search)
{
    char *const argv[] = {"echo", "spawned", NULL};
    pid_t child;
    int failed = search ? posix_spawnp(&child, "echo", NULL, NULL, argv, environment)
                        : posix_spawn(&child, "/bin/echo", NULL, NULL, argv, environment);
    return failed ? failed : status_of(child);
}

static int spawns(void)
{
    char *const nothing[] = {NULL};
    char *const argv[] = {"x", NULL};
    pid_t child;
    say_number(spawn(environ, 0));
    say_number(spawn(environ, 1));
    say_number(spawn(nothing, 0));
    say_number(posix_spawn(&child, "/nowhere/at/all", NULL, NULL, argv, nothing));
    return say_number(posix_spawnp(&child, "no-such-program-anywhere", NULL, NULL, argv, nothing));
}

static int scrubs_its_environment(void)
{
    char line[64] = "";
    unsetenv("LD_PRELOAD");
    say_number(system("echo by system"));
    FILE *pipe = popen("echo by popen", "r");
    if (pipe && fgets(line, sizeof line, pipe))
        say(line);
    say_number(pipe ? pclose(pipe) : -1);
    say_number(spawn(environ, 1));
    clearenv();
    setenv("PATH", "/usr/bin:/bin", 1);
    execlp("echo", "echo", "by", "exec", (char *)NULL);
    return 1;
}

/* argument: a program; run in every way there is. */
static int starts_in_every_way(void)
{
    char *const argv[] = {(char *)argument, NULL};
    pid_t child;
    if ((child = fork()) == 0)
        execv(argument, argv), _exit(99);
    say_number(status_of(child));
    if ((child = vfork()) == 0)
        execve(argument, argv, environ), _exit(99);
    say_number(status_of(child));
    if ((child = fork()) == 0)
        execlp(argument, argument, (char *)NULL), _exit(99);
    say_number(status_of(child));
    if ((child = fork()) == 0)
        execvpe(argument, argv, environ), _exit(99);
    say_number(status_of(child));
    if ((child = fork()) == 0)
        fexecve(open(argument, O_RDONLY | O_CLOEXEC), argv, environ), _exit(99);
    say_number(status_of(child));
    if ((child = fork()) == 0)
        execveat(AT_FDCWD, argument, argv, environ, 0), _exit(99);
    say_number(status_of(child));
    int failed = posix_spawn(&child, argument, NULL, NULL, argv, environ);
    say_number(failed ? failed : status_of(child));
    failed = posix_spawnp(&child, argument, NULL, NULL, argv, environ);
    return say_number(failed ? failed : status_of(child));
}

/* ---- daemons */

/* The way of the old books: fork, setsid, fork, close everything; the result is a file, as there is no other way out. */
static int becomes_a_daemon(void)
{
    int pipes[2];
    char byte;
    if (pipe(pipes))
        return 1;
    if (fork()) {
        close(pipes[1]);
        return (int)read(pipes[0], &byte, 1); /* ends when the last daemon's copy is closed */
    }
    setsid();
    signal(SIGHUP, SIG_IGN);
    if (fork())
        _exit(0);
    umask(0);
    for (int fd = 0; fd < 1024; fd++)
        if (fd != pipes[1])
            close(fd);
    open("/dev/null", O_RDWR);
    (void)!dup(0);
    (void)!dup(0);
    churn(2000);
    run_threads(2, churner, 0);
    int fd = open("daemon.txt", O_WRONLY | O_CREAT, 0600);
    (void)!write(fd, "was here\n", 9);
    return 0;
}

static int closes_every_file(void)
{
    churn(100);
    syscall(SYS_close_range, 3, ~0u, 0);
    churn(20000);
    say_number(run_threads(4, churner, 0));
    return say_number(open("/dev/null", O_RDONLY));
}

/* ---- threads */

static pthread_key_t key;

static void free_late(void *block)
{
    static _Thread_local int rounds;
    free(block);
    if (rounds++ < 3)
        pthread_setspecific(key, malloc(100)); /* another round of destructors, up to four */
}

static void *with_key(void *nothing)
{
    pthread_setspecific(key, malloc(300));
    return nothing;
}

static void *detached(void *counter)
{
    churn(20);
    pthread_setspecific(key, malloc(300));
    __atomic_fetch_add((int *)counter, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static int threads_of_every_kind(void)
{
    static int done;
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_key_create(&key, free_late);
    say_number(run_threads(20, with_key, 0));
    say_number(run_threads(20, with_key, 16384 + 4096)); /* PTHREAD_STACK_MIN and a page */
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    for (int i = 0; i < 200; i++)
        while (pthread_create(&thread, &attributes, detached, &done))
            usleep(100);
    while (__atomic_load_n(&done, __ATOMIC_SEQ_CST) < 200)
        usleep(1000);
    usleep(20000);
    return say_number(done);
}

static void *waits_for_all(void *nothing)
{
    free(malloc(100));
    pthread_barrier_wait(&all_there);
    free(malloc(200));
    return nothing;
}

static int thousand_threads_at_once(void)
{
    static pthread_t threads[1000];
    int made = 0;
    pthread_barrier_init(&all_there, NULL, 1001);
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, 65536);
    for (int i = 0; i < 1000; i++)
        made += pthread_create(&threads[i], &attributes, waits_for_all, NULL) == 0;
    if (made < 1000)
        return REFUSED;
    pthread_barrier_wait(&all_there);
    for (int i = 0; i < 1000; i++)
        pthread_join(threads[i], NULL);
    return say_number(made);
}

static int ten_thousand_short_threads(void)
{
    int made = 0;
    for (int i = 0; i < 10000; i++) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, with_key, NULL) == 0)
            made += pthread_join(thread, NULL) == 0;
    }
    return say_number(made);
}

static void *names_itself(void *nothing)
{
    free(malloc(100));
    prctl(PR_SET_NAME, "late-by-prctl");
    return nothing;
}

static void *names_itself_twice(void *nothing)
{
    free(malloc(100));
    pthread_setname_np(pthread_self(), "early");
    pthread_setname_np(pthread_self(), "late-by-pthread");
    return nothing;
}

static void *is_named(void *nothing)
{
    free(malloc(100));
    pthread_barrier_wait(&all_there);
    pthread_barrier_wait(&all_there);
    return nothing;
}

static int names_threads(void)
{
    pthread_t thread;
    run_threads(1, names_itself, 0);
    run_threads(1, names_itself_twice, 0);
    pthread_barrier_init(&all_there, NULL, 2);
    pthread_create(&thread, NULL, is_named, NULL);
    pthread_barrier_wait(&all_there);
    say_number(pthread_setname_np(thread, "named-by-other"));
    say_number(pthread_setname_np(thread, "a name of sixteen and more"));
    pthread_barrier_wait(&all_there);
    pthread_join(thread, NULL);
    prctl(PR_SET_NAME, "main-itself");
    return 0;
}

/* ---- coroutines */

static ucontext_t main_context, coroutines[32];

static void coroutine(int number)
{
    for (int i = 0; i < 50; i++) {
        churn(20);
        swapcontext(&coroutines[number], &main_context);
    }
}

static int runs_coroutines(void)
{
    long switches = 0;
    for (int i = 0; i < 32; i++) {
        getcontext(&coroutines[i]);
        coroutines[i].uc_stack.ss_sp = malloc(16384);
        coroutines[i].uc_stack.ss_size = 16384;
        coroutines[i].uc_link = &main_context;
        makecontext(&coroutines[i], (void (*)(void))coroutine, 1, i);
    }
    for (int round = 0; round < 51; round++)
        for (int i = 0; i < 32; i++, switches++)
            swapcontext(&main_context, &coroutines[i]);
    return say_number(switches);
}

/* ---- signals */

static volatile sig_atomic_t busy, handled, wanted;
static sigjmp_buf back;

/* Allocates unless it interrupted an allocation, which nothing would survive; mapping memory is allowed at any time. */
static void on_timer(int number)
{
    (void)number;
    if (busy) {
        void *p = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        munmap(p, 4096);
    } else {
        free(malloc(700));
    }
    handled++;
}

static int timer_at_10_khz(void)
{
    struct sigaction action = {.sa_handler = on_timer, .sa_flags = SA_RESTART};
    struct itimerval every = {{0, 100}, {0, 100}}, never = {{0, 0}, {0, 0}};
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &every, NULL);
    while (handled < 1000) {
        busy = 1;
        free(malloc(100));
        busy = 0;
    }
    setitimer(ITIMER_REAL, &never, NULL);
    return say_number(handled >= 1000);
}

static void on_overflow(int number)
{
    (void)number;
    free(malloc(64)); /* on the alternate stack */
    handled++;
    siglongjmp(back, 1);
}

static int overflow(int depth)
{
    volatile char frame[4000];
    frame[0] = (char)depth;
    return depth > 1 << 30 ? 0 : overflow(depth + 1) + frame[0];
}

/* The stack runs over again and again; a handler on an alternate stack allocates and jumps out. */
static int survives_stack_overflow(void)
{
    stack_t stack = {.ss_sp = malloc(65536), .ss_size = 65536};
    struct sigaction action = {.sa_handler = on_overflow, .sa_flags = SA_ONSTACK};
    struct rlimit limit = {1 << 20, 1 << 20};
    setrlimit(RLIMIT_STACK, &limit);
    sigaltstack(&stack, NULL);
    sigaction(SIGSEGV, &action, NULL);
    for (volatile int i = 0; i < 50; i++) {
        if (sigsetjmp(back, 1) == 0)
            overflow(0);
        churn(10);
    }
    return say_number(handled);
}

static int overflow_allocating(int depth)
{
    volatile char frame[64];
    void *volatile block = malloc(24 + (size_t)depth % 7 * 16);
    frame[0] = block != NULL;
    free(block);
    return depth > 1 << 30 ? 0 : overflow_allocating(depth + 1) + frame[0];
}

/* The same, but the overflow hits in the middle of malloc, or of a hook, and is not survived. */
static int dies_of_stack_overflow(void)
{
    struct rlimit limit = {256 << 10, 256 << 10}, none = {0, 0};
    setrlimit(RLIMIT_STACK, &limit);
    setrlimit(RLIMIT_CORE, &none);
    say("before\n");
    return overflow_allocating(0);
}

static void on_child(int number)
{
    int saved = errno;
    (void)number;
    while (waitpid(-1, NULL, WNOHANG) > 0)
        handled++;
    errno = saved;
}

static int reaps_in_a_handler(void)
{
    struct sigaction action = {.sa_handler = on_child, .sa_flags = SA_RESTART};
    sigaction(SIGCHLD, &action, NULL);
    for (int i = 0; i < 30; i++) {
        if (fork() == 0)
            in_child(0);
        churn(100);
    }
    for (int i = 0; handled < 30 && i < 1000; i++)
        usleep(5000);
    return say_number(handled);
}

static void *all_signals_blocked(void *nothing)
{
    sigset_t all, now;
    int blocked = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, NULL);
    churn(200);
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    for (int i = 1; i < 32; i++)
        blocked += sigismember(&now, i);
    wanted = blocked;
    return nothing;
}

static int keeps_signal_masks(void)
{
    sigset_t now;
    int blocked = 0;
    run_threads(1, all_signals_blocked, 0);
    say_number(wanted);
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    for (int i = 1; i < 32; i++)
        blocked += sigismember(&now, i);
    return say_number(blocked);
}

/* ---- another user, another root, another namespace */

static int afterwards(void)
{
    churn(3000);
    say_number(run_threads(4, churner, 0));
    say_number(run_at_once(40));
    pid_t child = fork();
    if (child == 0)
        in_child(5);
    return say_number(status_of(child));
}

static int becomes_another_user(void)
{
    if (setgroups(0, NULL) || setgid(65534) || setuid(65534))
        return REFUSED;
    return afterwards();
}

static int becomes_another_user_and_back(void)
{
    if (geteuid() || setresuid(-1, 65534, -1))
        return REFUSED;
    say_number(run_threads(4, churner, 0));
    if (seteuid(0))
        return 1;
    return afterwards();
}

static int changes_its_root(void)
{
    char folder[] = "jailXXXXXX";
    if (!mkdtemp(folder) || chroot(folder) || chdir("/"))
        return REFUSED;
    return afterwards();
}

static int pivots_its_root(void)
{
    if (mkdir("new", 0700) || unshare(CLONE_NEWNS) || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) ||
        mount("none", "new", "tmpfs", 0, NULL) || mkdir("new/old", 0700))
        return REFUSED;
    if (syscall(SYS_pivot_root, "new", "new/old") || chdir("/") || umount2("/old", MNT_DETACH))
        return REFUSED;
    return afterwards();
}

/* argument: a folder with a program `echo` and all it needs. */
static int starts_a_program_in_a_jail(void)
{
    char *const argv[] = {"echo", "jailed", NULL};
    pid_t child;
    if (chroot(argument) || chdir("/"))
        return REFUSED;
    int failed = posix_spawn(&child, "/echo", NULL, NULL, argv, environ);
    say_number(failed ? failed : status_of(child));
    if ((child = fork()) == 0)
        execl("/echo", "echo", "jailed too", (char *)NULL), _exit(99);
    say_number(status_of(child));
    execl("/echo", "echo", "jailed for good", (char *)NULL);
    return 1;
}

/* As su does. */
static int starts_a_program_as_another_user(void)
{
    if (setgroups(0, NULL) || setgid(65534) || setuid(65534))
        return REFUSED;
    pid_t child = fork();
    if (child == 0)
        execl("/bin/sh", "sh", "-c", "echo from a shell; /bin/echo from a child", (char *)NULL), _exit(99);
    say_number(status_of(child));
    execl("/bin/echo", "echo", "from another user", (char *)NULL);
    return 1;
}

static int lives_in_new_namespaces(void)
{
    struct clone_args arguments = {.flags = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUTS | CLONE_NEWIPC, .exit_signal = SIGCHLD};
    pid_t child = (pid_t)syscall(SYS_clone3, &arguments, sizeof arguments);
    if (child < 0)
        return REFUSED;
    if (child == 0) {
        say_number(getpid());
        exit(afterwards());
    }
    return say_number(status_of(child));
}

/* ---- limits */

static const struct {
    const char *name;
    int resource;
    rlim_t limit;
} limits[] = {
    {"address_space", RLIMIT_AS, 48 << 20}, {"data", RLIMIT_DATA, 32 << 20}, {"files", RLIMIT_NOFILE, 4},
    {"file_size", RLIMIT_FSIZE, 4096},      {"processes", RLIMIT_NPROC, 3}, {"locked", RLIMIT_MEMLOCK, 0},
    {"stack", RLIMIT_STACK, 64 << 10},      {"cpu", RLIMIT_CPU, 1000},      {"no_files", RLIMIT_NOFILE, 0},
};

static int under_a_limit(void)
{
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (argument && strcmp(argument, limits[i].name) == 0) {
            struct rlimit limit = {limits[i].limit, limits[i].limit};
            if (setrlimit(limits[i].resource, &limit))
                return REFUSED;
            churn(2000);
            say_number(run_threads(2, churner, 65536));
            execl(self, self, "under_it", (char *)NULL);
            return 0; /* no file could be opened */
        }
    return 2;
}

static int under_it(void)
{
    churn(2000);
    say_number(run_threads(2, churner, 65536));
    pid_t child = fork();
    if (child == 0)
        in_child(6);
    return child < 0 ? 0 : say_number(status_of(child));
}

/* ---- confinement: files cannot be opened any more, and that is an error or death */

#define ANSWER(nr, what) {BPF_JMP | BPF_JEQ | BPF_K, 0, 1, (nr)}, {BPF_RET | BPF_K, 0, 0, (what)}

static int confine(unsigned what)
{
    struct sock_filter filter[] = {
        {BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(struct seccomp_data, nr)},
        ANSWER(SYS_open, what), ANSWER(SYS_openat, what), ANSWER(SYS_fallocate, what), ANSWER(SYS_mkdir, what),
        {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ALLOW},
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    return prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

static int forbids_itself_files(void)
{
    churn(100);
    if (confine(SECCOMP_RET_ERRNO | EACCES))
        return REFUSED;
    return afterwards();
}

static int forbids_itself_files_on_pain_of_death(void)
{
    mallopt(M_ARENA_MAX, 1); /* with more, malloc itself reads files: how many processors, whether memory is overcommitted */
    churn(100);
    if (confine(SECCOMP_RET_KILL_PROCESS))
        return REFUSED;
    return afterwards();
}

/* Every call but the few that the rest of this needs is an error: mmap, clone and all kinds of files among them. */
static int forbids_itself_nearly_all(void)
{
    struct sock_filter filter[] = {
        {BPF_LD | BPF_W | BPF_ABS, 0, 0, offsetof(struct seccomp_data, nr)},
        ANSWER(SYS_write, SECCOMP_RET_ALLOW), ANSWER(SYS_exit_group, SECCOMP_RET_ALLOW), ANSWER(SYS_brk, SECCOMP_RET_ALLOW),
        {BPF_RET | BPF_K, 0, 0, SECCOMP_RET_ERRNO | EPERM},
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    churn(100);
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        return REFUSED;
    churn(3000);
    say_number(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED);
    return say_number(fork() == -1);
}

#define ENTRY(name) {#name, name}

static const struct {
    const char *name;
    int (*run)(void);
} table[] = {
    ENTRY(raw_forks), ENTRY(clones_that_share_memory), ENTRY(raw_fork_while_threads_allocate),
    ENTRY(forks_while_threads_allocate), ENTRY(handlers_of_fork_allocate), ENTRY(forks_in_threads),
    ENTRY(exits_while_threads_allocate), ENTRY(dies_while_threads_allocate), ENTRY(execs_from_a_thread), ENTRY(uses_stderr_for_data),
    ENTRY(forks_without_wait), ENTRY(spawns), ENTRY(scrubs_its_environment),
    ENTRY(starts_in_every_way), ENTRY(becomes_a_daemon), ENTRY(closes_every_file), ENTRY(threads_of_every_kind),
    ENTRY(thousand_threads_at_once), ENTRY(ten_thousand_short_threads), ENTRY(names_threads),
    ENTRY(runs_coroutines), ENTRY(timer_at_10_khz), ENTRY(survives_stack_overflow), ENTRY(dies_of_stack_overflow),
    ENTRY(reaps_in_a_handler), ENTRY(keeps_signal_masks), ENTRY(becomes_another_user), ENTRY(becomes_another_user_and_back),
    ENTRY(changes_its_root), ENTRY(pivots_its_root), ENTRY(starts_a_program_in_a_jail), ENTRY(starts_a_program_as_another_user),
    ENTRY(lives_in_new_namespaces), ENTRY(under_a_limit), ENTRY(under_it),
    ENTRY(forbids_itself_files), ENTRY(forbids_itself_files_on_pain_of_death), ENTRY(forbids_itself_nearly_all),
};

int main(int argc, char **argv)
{
    self = argv[0];
    argument = argc > 2 ? argv[2] : NULL;
    for (size_t i = 0; argc > 1 && i < sizeof table / sizeof *table; i++)
        if (strcmp(argv[1], table[i].name) == 0)
            return table[i].run();
    return 2;
}
