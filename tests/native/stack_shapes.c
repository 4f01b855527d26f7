/*
 * stack_shapes.c: stacks of many shapes, each captured repeatedly (so that the memo, the rejoining and the plain walk all
 * get their turn) and compared with libgcc's. argv: which (see main), depth limit, milliseconds of "timer".
 */
#define _GNU_SOURCE
#include <alloca.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <ucontext.h>
#include <unistd.h>

#include "stack_test.h"

#define NOINLINE __attribute__((noinline, noclone))
static volatile unsigned sink;
static __thread unsigned state = 12345;

static unsigned roll(unsigned below)
{
    state = state * 1103515245 + 12345;
    return (state >> 16) % below;
}

/* ---- random call trees --------------------------------------------------------------------------------------------- */

static NOINLINE void branch(unsigned left);

static NOINLINE void leaf(unsigned left) { stack_here(); sink += left; }
static NOINLINE void two_sites(unsigned left) { branch(left); sink++; branch(left / 2); sink++; }
static NOINLINE void big_frame(unsigned left)
{
    volatile char buffer[5000];
    buffer[left % 5000] = 1;
    branch(left);
    sink += buffer[3];
}
static NOINLINE void variable_frame(unsigned left)
{
    volatile char *buffer = alloca(16 + roll(300));
    buffer[0] = 1;
    branch(left);
    sink += buffer[0];
}
static NOINLINE void aligned_frame(unsigned left)
{
    volatile _Alignas(64) char buffer[100];
    volatile char *more = alloca(1 + roll(100));
    buffer[0] = more[0] = 1;
    branch(left);
    sink += buffer[0] + more[0];
}
static NOINLINE void aligned_only(unsigned left)
{
    volatile _Alignas(128) char buffer[100];
    buffer[left % 100] = 1;
    branch(left);
    sink += buffer[0];
}
static NOINLINE void many_registers(unsigned left)
{
    unsigned a = roll(9), b = roll(9), c = roll(9), d = roll(9), e = roll(9), f = roll(9), g = roll(9);
    branch(left);
    sink += a + b * c + d * e + f * g;
    branch(left / 3);
    sink += a * b + c * d + e * f + g;
}

static NOINLINE void branch(unsigned left)
{
    if (left == 0)
        return leaf(left);
    switch (roll(8)) {
    case 0: two_sites(left - 1); break;
    case 1: big_frame(left - 1); break;
    case 2: variable_frame(left - 1); break;
    case 3: aligned_frame(left - 1); break;
    case 4: many_registers(left - 1); break;
    case 5: aligned_only(left - 1); break;
    default: leaf(left); branch(left - 1); sink++; break;
    }
}

static void shapes(unsigned rounds)
{
    for (unsigned i = 0; i < rounds; i++) {
        state = i % 7; /* trees come again: memo hits */
        branch(roll(14));
    }
}

static NOINLINE void recurse(unsigned left)
{
    if (left % 50 == 0)
        stack_here();
    if (left > 0)
        recurse(left - 1);
    if (left % 70 == 0)
        stack_here();
    sink++;
}

/*
 * The same return address at the same rsp with another rbp: frames of alloca whose sizes add up to the same. Words of the
 * stack before are still there, in memory that nobody has written since: only rbp tells which ones count.
 */
static NOINLINE void sites(unsigned site)
{
#ifdef __OPTIMIZE__
    __asm__ volatile("" : : : "rbp"); /* saves the caller's rbp, and has no frame pointer of its own */
#endif
    switch (site % 6) {
    case 0: stack_here(); sink += 1; break;
    case 1: stack_here(); sink += 2; break;
    case 2: stack_here(); sink += 3; break;
    case 3: stack_here(); sink += 4; break;
    case 4: stack_here(); sink += 5; break;
    default: stack_here(); sink += 6; break;
    }
}

static NOINLINE void inner(unsigned bytes, unsigned site)
{
    volatile char *room = alloca(bytes);
    room[0] = 1;
    if (site < 6)
        sites(site);
    else
        stack_here();
    sink += room[0];
}

#define OUTER(name)                                              \
    static NOINLINE void name(unsigned bytes, unsigned site)     \
    {                                                            \
        volatile char *room = alloca(1024 - bytes);              \
        room[0] = 1;                                             \
        inner(bytes, site);                                      \
        sink += room[0];                                         \
    }
OUTER(outer0)
OUTER(outer1)
OUTER(outer2)
OUTER(outer3)

static void bases(void)
{
    static void (*const outer[])(unsigned, unsigned) = {outer0, outer1, outer2, outer3};
    for (unsigned round = 0; round < 3; round++)
        for (unsigned site = 0; site < 8; site++)
            for (unsigned i = 0; i < 12; i++)
                outer[i * 7 / 3 % 4](64 + i * 5 % 4 * 64, site);
}

/* ---- callbacks through libc, signals -------------------------------------------------------------------------------- */

static int compare(const void *a, const void *b)
{
    stack_here();
    return *(const int *)a - *(const int *)b;
}

static void through_libc(void)
{
    int numbers[40];
    for (int i = 0; i < 40; i++)
        numbers[i] = (int)roll(100);
    qsort(numbers, 40, sizeof *numbers, compare);
    int key = 50;
    (void)!bsearch(&key, numbers, 40, sizeof *numbers, compare);
}

static volatile sig_atomic_t ticks;
static void on_signal(int number)
{
    (void)number;
    ticks++;
    stack_here();
    if (ticks % 3 == 0)
        two_sites(2);
}

static void install(int number, int flags)
{
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = flags | SA_RESTART};
    sigaction(number, &action, NULL);
}

static NOINLINE void raise_deep(unsigned left, int number)
{
    volatile char buffer[64];
    buffer[0] = 1;
    if (left == 0)
        raise(number);
    else
        raise_deep(left - 1, number);
    sink += buffer[0];
}

static NOINLINE void fault(unsigned left)
{
    if (left == 0)
        __asm__ volatile("ud2");
    else
        fault(left - 1);
    sink++;
}

static sigjmp_buf out_of_fault;
static void on_fault(int number)
{
    (void)number;
    stack_here();
    siglongjmp(out_of_fault, 1);
}

static void signals(void)
{
    static char other[65536];
    stack_t stack = {.ss_sp = other, .ss_size = sizeof other};
    install(SIGUSR1, 0);
    sigaltstack(&stack, NULL);
    install(SIGUSR2, SA_ONSTACK);
    struct sigaction action = {.sa_handler = on_fault, .sa_flags = SA_ONSTACK | SA_NODEFER};
    sigaction(SIGILL, &action, NULL);
    for (volatile unsigned i = 0; i < 200; i++) {
        raise_deep(i % 5, i % 2 ? SIGUSR1 : SIGUSR2);
        if (sigsetjmp(out_of_fault, 1) == 0)
            fault(i % 4);
        shapes(1);
    }
}

/* Timer signals at any instruction, also inside captures. A handler's stack and the interrupted one must both be right. */
static void timer(unsigned milliseconds)
{
    static char other[65536];
    stack_t stack = {.ss_sp = other, .ss_size = sizeof other};
    sigaltstack(&stack, NULL);
    install(SIGALRM, SA_ONSTACK);
    struct itimerval every = {{0, 200}, {0, 200}}, never = {{0, 0}, {0, 0}};
    struct timespec start, now;
    clock_gettime(CLOCK_MONOTONIC, &start);
    setitimer(ITIMER_REAL, &every, NULL);
    do {
        for (unsigned i = 0; i < 50; i++)
            stack_only();
        shapes(3);
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 < milliseconds);
    setitimer(ITIMER_REAL, &never, NULL);
}

/* Handlers that leave captures behind by siglongjmp. */
static sigjmp_buf again;
static void on_leave(int number) { (void)number; ticks++; siglongjmp(again, 1); }
static void leaving(void)
{
    struct sigaction action = {.sa_handler = on_leave};
    sigaction(SIGALRM, &action, NULL);
    struct itimerval every = {{0, 300}, {0, 300}}, never = {{0, 0}, {0, 0}};
    sigset_t block;
    sigemptyset(&block);
    sigaddset(&block, SIGALRM);
    setitimer(ITIMER_REAL, &every, NULL);
    while (ticks < 2000)
        if (sigsetjmp(again, 1) == 0)
            for (;;)
                stack_only();
    setitimer(ITIMER_REAL, &never, NULL);
    sigprocmask(SIG_BLOCK, &block, NULL);
    shapes(100);
}

/* ---- threads, longjmp, coroutines ------------------------------------------------------------------------------------- */

static void *thread_body(void *argument)
{
    state = (unsigned)(uintptr_t)argument;
    shapes(60);
    through_libc();
    return NULL;
}

static void threads(void)
{
    for (unsigned round = 0; round < 20; round++) {
        pthread_t ids[6];
        for (uintptr_t i = 0; i < 6; i++)
            pthread_create(&ids[i], NULL, thread_body, (void *)(round + i));
        for (unsigned i = 0; i < 6; i++)
            pthread_join(ids[i], NULL);
    }
}

static jmp_buf back;
#pragma GCC diagnostic ignored "-Winfinite-recursion"
static NOINLINE void jump_deep(unsigned left)
{
    stack_here();
    if (left == 0)
        longjmp(back, 1);
    jump_deep(left - 1);
    sink++;
}

static void jumps(void)
{
    for (volatile unsigned i = 0; i < 300; i++) {
        if (setjmp(back) == 0)
            jump_deep(roll(10));
        stack_here();
    }
}

enum { COROUTINES = 8 };
static ucontext_t main_context, contexts[COROUTINES];
static NOINLINE void yield_at(unsigned me, unsigned left)
{
    stack_here();
    if (left > 0)
        yield_at(me, left - 1);
    swapcontext(&contexts[me], &main_context);
    stack_here();
}

static void coroutine(int me)
{
    for (unsigned i = 0; i < 20; i++) {
        yield_at((unsigned)me, roll(5));
        shapes(1);
    }
    for (;;)
        swapcontext(&contexts[me], &main_context);
}

static void coroutines(void)
{
    for (int i = 0; i < COROUTINES; i++) {
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_size = 1 << 18;
        contexts[i].uc_stack.ss_sp = mmap(NULL, 1 << 18, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        makecontext(&contexts[i], (void (*)(void))coroutine, 1, i);
    }
    for (unsigned round = 0; round < 2000; round++) {
        unsigned next = roll(COROUTINES);
        swapcontext(&main_context, &contexts[next]);
        stack_here();
    }
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "shapes";
    unsigned depth = argc > 2 ? (unsigned)atoi(argv[2]) : 128;
    stack_test_init(depth);
    if (!strcmp(what, "shapes")) shapes(600);
    else if (!strcmp(what, "recursion")) for (unsigned i = 0; i < 10; i++) recurse(700 + i % 3);
    else if (!strcmp(what, "bases")) bases();
    else if (!strcmp(what, "libc")) for (unsigned i = 0; i < 30; i++) through_libc();
    else if (!strcmp(what, "signals")) signals();
    else if (!strcmp(what, "timer")) timer(argc > 3 ? (unsigned)atoi(argv[3]) : 1500);
    else if (!strcmp(what, "leaving")) leaving();
    else if (!strcmp(what, "threads")) threads();
    else if (!strcmp(what, "jumps")) jumps();
    else if (!strcmp(what, "coroutines")) coroutines();
    else return 64;
    return stack_test_report();
}
