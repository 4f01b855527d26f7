/* Known calls, for the collector's tests: argv[1] chooses, argv[2] is a number. Prints what the test has to find. */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static void nap(long ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&t, &t) && errno == EINTR)
        ;
}

/* n blocks of growing size; each address and size printed; every second one freed. */
static int blocks(int n)
{
    static char line[64];
    setvbuf(stdout, malloc(1 << 16), _IOFBF, 1 << 16);
    for (int i = 0; i < n; i++) {
        char *p = malloc(1000 + i);
        snprintf(line, sizeof line, "%d %p\n", 1000 + i, (void *)p);
        fputs(line, stdout);
        if (i % 2)
            free(p);
    }
    return 0;
}

static void *churn(void *number)
{
    void *held[32] = {0};
    char name[16];
    snprintf(name, sizeof name, "churn-%d", (int)(intptr_t)number);
    pthread_setname_np(pthread_self(), name);
    for (int i = 0; i < 20000; i++) {
        free(held[i % 32]);
        held[i % 32] = malloc(16 + i % 200);
    }
    for (int i = 0; i < 32; i++)
        free(held[i]);
    return NULL;
}

/* n threads at once, twice (the second lot may reuse rings): 2 * n * 40,000 allocator calls in `churn`. */
static int threads(int n)
{
    for (int lot = 0; lot < 2; lot++) {
        pthread_t id[64];
        for (int i = 0; i < n; i++)
            pthread_create(&id[i], NULL, churn, (void *)(intptr_t)(lot * n + i));
        for (int i = 0; i < n; i++)
            pthread_join(id[i], NULL);
        nap(300);
    }
    return 0;
}

/* A peak of n MiB in the middle of the run. */
static int peak(int n)
{
    nap(150);
    char *p = malloc((size_t)n << 20);
    memset(p, 1, (size_t)n << 20);
    nap(300);
    free(p);
    nap(100);
    return 0;
}

/* Waits in epoll_wait for n ms with nothing to come. Fails if it is ever interrupted. */
static int waits(int n)
{
    struct epoll_event event;
    int set = epoll_create1(EPOLL_CLOEXEC), failed = 0;
    for (int i = 0; i < n / 20; i++)
        failed += epoll_wait(set, &event, 1, 20) != 0;
    printf("interrupted %d\n", failed);
    return failed != 0;
}

static void on_signal(int number)
{
    static const char text[] = "caught\n";
    (void)number;
    if (write(1, text, sizeof text - 1) < 0)
        _exit(9);
    _exit(40);
}

/* Handles SIGTERM, SIGINT, SIGHUP, SIGUSR2 with exit status 40; says "ready" first. */
static int handles(int n)
{
    signal(SIGTERM, on_signal);
    signal(SIGINT, on_signal);
    signal(SIGHUP, on_signal);
    signal(SIGUSR2, on_signal);
    puts("ready");
    fflush(stdout);
    nap(n);
    return 1;
}

/* Pages of every kind, then sleeps. */
static int pages(int n)
{
    size_t huge = 4 << 20, size = 1 << 20;
    volatile char sum = 0;
    char *thp = mmap(NULL, 2 * huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(thp, 2 * huge, MADV_HUGEPAGE);
    for (size_t i = 0; i < 2 * huge; i += 4096)
        thp[i] = 1;
    madvise(thp + huge + 8192, 4096, MADV_DONTNEED);
    char *zero = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (size_t i = 0; i < size; i += 8192)
        sum += zero[i];
    zero[4096] = 1;
    char *hugezero = mmap(NULL, 2 * huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    madvise(hugezero, 2 * huge, MADV_HUGEPAGE);
    for (size_t i = 0; i < 2 * huge; i += 4096)
        sum += hugezero[i];
    char *shared = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (size_t i = 0; i < size; i += 12288)
        shared[i] = 1;
    FILE *file = fopen("/proc/self/exe", "rb");
    char *map = mmap(NULL, 16384, PROT_READ | PROT_WRITE, MAP_PRIVATE, fileno(file), 0);
    sum += map[0];
    map[8192] = 1;
    mmap(NULL, (size_t)1 << 40, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    puts("ready");
    fflush(stdout);
    nap(n);
    return sum == 77;
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        int (*run)(int);
    } table[] = {{"blocks", blocks}, {"threads", threads}, {"peak", peak}, {"waits", waits}, {"handles", handles}, {"pages", pages}};
    for (size_t i = 0; argc > 2 && i < sizeof table / sizeof *table; i++)
        if (!strcmp(argv[1], table[i].name))
            return table[i].run(atoi(argv[2]));
    return 99;
}
