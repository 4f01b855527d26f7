/*
 * stack_bench.c: ns per call stack of 20 frames without frame pointers, of the shim's stack capture and of glibc's
 * backtrace(). Built and run by stack_bench.py with tests/native/stack_host.c as the rest of the shim.
 *
 *   same      one stack again and again: every capture a memo hit
 *   mixed     random leaves of a tree of calls, skewed: hits, and walks that rejoin the stack before
 *   distinct  131072 paths, uniform: the memo is of no use, walks rejoin or not, nodes miss the caches
 *   walk      what was learned of the stack is forgotten before each capture (rules stay): a whole walk by cached rules
 *   cold      rules forgotten too: .eh_frame is read for each frame
 */
#include <execinfo.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "../preload/stack.h"
#include "../tests/native/stack_test.h"

#define NOINLINE __attribute__((noinline, noclone))
enum { FRAMES = 20 };
typedef void action(unsigned n);
static volatile unsigned sink;
static unsigned long state = 88172645463325252ul, captured;
static void *buffer[64];

static double now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t); /* others may be using the machine */
    return (double)t.tv_sec * 1e9 + (double)t.tv_nsec;
}

static unsigned roll(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (unsigned)(state >> 20);
}

static NOINLINE void one(unsigned n) { sink += stack_only(); captured++; sink += n; }
static NOINLINE void one_backtrace(unsigned n) { sink += (unsigned)backtrace(buffer, FRAMES); captured++; sink += n; }
static NOINLINE void nothing(unsigned n) { captured++; sink += n; }

static void many(action *what, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        what(i);
}

/* A tree: at each level one of four functions, with frames of different size. */
static void turn(action *what, unsigned left, unsigned turns);

#define TURN(name, bytes)                                             \
    static NOINLINE void name(action *what, unsigned left, unsigned turns) \
    {                                                                 \
        volatile char room[bytes];                                    \
        room[0] = 1;                                                  \
        if (left == 0)                                                \
            what(turns);                                              \
        else                                                          \
            turn(what, left - 1, turns);                              \
        sink += room[0];                                              \
    }
TURN(turn0, 24)
TURN(turn1, 56)
TURN(turn2, 120)
TURN(turn3, 248)

static inline __attribute__((always_inline)) void turn(action *what, unsigned left, unsigned turns)
{
    switch (turns & 3) {
    case 0: turn0(what, left, turns >> 2); break;
    case 1: turn1(what, left, turns >> 2); break;
    case 2: turn2(what, left, turns >> 2); break;
    default: turn3(what, left, turns >> 2); break;
    }
}

static NOINLINE void mixed(action *what, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        unsigned r = roll();
        turn(what, 6, roll() % 4 ? r % 16 * 1021 : r % 16384); /* 3/4 of them on 16 paths */
    }
}

static NOINLINE void distinct(action *what, unsigned n)
{
    for (unsigned i = 0; i < n; i++)
        turn(what, 9, roll() & 0x1ffff);
}

static NOINLINE void walked(action *what, unsigned n)
{
    for (unsigned i = 0; i < n; i++) {
        stack_forget();
        what(i);
    }
}

static NOINLINE void cold(action *what, unsigned n)
{
    for (unsigned i = 0; i < n / 100; i++) {
        stack_flush();
        what(i);
    }
}

typedef void runner(action *what, unsigned n);

/* Goes down to the wanted depth and runs there. */
static NOINLINE void down(runner *run, action *what, unsigned n, unsigned left)
{
    volatile char room[24];
    room[0] = 1;
    if (left > 0)
        down(run, what, n, left - 1);
    else
        run(what, n);
    sink += room[0];
}

static double measure(runner *run, action *what, unsigned n, unsigned frames)
{
    double best = 1e18;
    for (unsigned round = 0; round < 5; round++) {
        captured = 0;
        double start = now_ns();
        down(run, what, n, frames);
        double each = (now_ns() - start) / (double)captured;
        best = each < best ? each : best;
    }
    return best;
}

static void report(const char *name, runner *run, action *what, unsigned n, unsigned frames)
{
    struct stack_counters before = {0}, after = {0};
    double base = measure(run, nothing, n, frames);
    stack_counters(&before);
    double ns = measure(run, what, n, frames) - base;
    stack_counters(&after);
    double all = (double)(after.captures - before.captures) + 1e-9;
    printf("%s\t%.1f\t%.3f\t%.2f\n", name, ns, (double)(after.hits - before.hits) / all,
           (double)(after.frames - before.frames) / all);
}

int main(int argc, char **argv)
{
    unsigned n = argc > 1 ? (unsigned)atoi(argv[1]) : 1000000;
    stack_test_init(128);
    /* one + run + down's + main + 3 of libc's start = 20 frames */
    report("same", many, one, n, FRAMES - 7);
    report("mixed", mixed, one, n, FRAMES - 14);
    report("distinct", distinct, one, n, FRAMES - 17);
    report("walk", walked, one, n / 4, FRAMES - 7);
    report("cold", cold, one, n, FRAMES - 7);
    report("backtrace", many, one_backtrace, n / 20, FRAMES - 7);
    return 0;
}
