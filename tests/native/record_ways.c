/* Calls whose records the tests know: record_ways WAY. It includes spool.h and plays the collector's part where a test needs that. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../preload/spool.h"

static void *volatile sink;

/* The control page of this very process. */
static volatile struct hl_control *control(void)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%d.0/control", getenv("HEAPLEDGER_SPOOL"), getpid());
    int fd = open(path, O_RDWR);
    volatile struct hl_control *page = mmap(NULL, HL_PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page == MAP_FAILED)
        exit(2);
    return page;
}

static uint64_t tsc(void)
{
    return __builtin_ia32_rdtsc();
}

/* ---- stacks of those who free ---- */

__attribute__((noinline)) static void by_free(void *block)
{
    free(block);
    __asm__ volatile("" ::: "memory");
}

__attribute__((noinline)) static void *by_realloc(void *block)
{
    void *moved = realloc(block, 0x9999);
    __asm__ volatile("" ::: "memory");
    return moved;
}

/* Prints where the two functions begin that free a block of 0x4444 bytes and one of 0x5555. */
static int way_freeing(void)
{
    sink = malloc(0x4444);
    by_free(sink);
    sink = malloc(0x5555);
    sink = by_realloc(sink);
    printf("%lx %lx\n", (unsigned long)by_free, (unsigned long)by_realloc);
    return 0;
}

/* ---- the clock ---- */

#define CALLS 200

/* Prints for each of the calls malloc(0x10000 + i) the TSC before it and after it. `goes_on`: the clock ticks every third call. */
static int clocked(int coarse, int goes_on)
{
    static uint64_t before[CALLS], after[CALLS];
    volatile struct hl_control *page = control();
    page->coarse = (uint32_t)coarse;
    sink = malloc(1);
    for (int i = 0; i < CALLS; i++) {
        if (goes_on && i % 3 == 0)
            page->coarse++;
        before[i] = tsc();
        sink = malloc(0x10000 + (size_t)i);
        after[i] = tsc();
    }
    for (int i = 0; i < CALLS; i++)
        printf("%llu %llu\n", (unsigned long long)before[i], (unsigned long long)after[i]);
    return 0;
}

int main(int argc, char **argv)
{
    const char *way = argc > 1 ? argv[1] : "";
    if (!strcmp(way, "freeing"))
        return way_freeing();
    if (!strcmp(way, "no-clock"))
        return clocked(0, 0);
    if (!strcmp(way, "still-clock"))
        return clocked(7, 0);
    if (!strcmp(way, "clock"))
        return clocked(7, 1);
    return 3;
}
