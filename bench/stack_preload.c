/*
 * stack_preload.c: the shim's stack capture alone, under a real program: a malloc, calloc, realloc and free that capture
 * their caller's stack, record nothing, and go on to glibc's. Built by stack_bench.py with tests/native/stack_host.c as
 * the rest of the shim; with STACKS=0 in the environment they capture nothing, which is what to compare with.
 * At its end the main thread's counters go to stderr, as one line.
 */
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "../preload/stack.h"
#include "../tests/native/stack_test.h"

void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
void __libc_free(void *);
static int capturing;
static __thread unsigned long events;
static volatile uint32_t sink;

#define CAPTURE()                                                                                              \
    do {                                                                                                       \
        events++;                                                                                              \
        if (capturing)                                                                                         \
            sink = stack_capture((uintptr_t)__builtin_return_address(0), (uintptr_t)__builtin_frame_address(0) + 16, \
                                 *(const uintptr_t *)__builtin_frame_address(0));                              \
    } while (0)

void *malloc(size_t size) { CAPTURE(); return __libc_malloc(size); }
void *calloc(size_t count, size_t size) { CAPTURE(); return __libc_calloc(count, size); }
void *realloc(void *block, size_t size) { CAPTURE(); return __libc_realloc(block, size); }
void free(void *block) { CAPTURE(); __libc_free(block); }

static __attribute__((constructor)) void begin(void)
{
    const char *stacks = getenv("STACKS");
    stack_test_init(128);
    capturing = stacks == NULL || stacks[0] != '0';
}

static __attribute__((destructor)) void end(void)
{
    struct stack_counters c = {0};
    struct timespec t;
    capturing = 0;
    stack_counters(&c);
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    fprintf(stderr, "STACKS cpu_ns=%ld events=%lu captures=%lu hits=%lu rejoined=%lu walked=%lu full=%lu lost=%lu frames=%lu added=%lu\n",
            t.tv_sec * 1000000000 + t.tv_nsec, events, c.captures, c.hits, c.rejoined, c.walked, c.full, c.lost, c.frames, c.added);
}
