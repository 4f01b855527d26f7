/* ticker.c; see ticker.h. */
#define _GNU_SOURCE
#include "ticker.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <time.h>

#define PERIOD_NS 1000000
#define QUIET 16          /* so many periods without an event ... */
#define QUIET_PERIODS 4   /* ... and a period is so long, until the next */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wanted = PTHREAD_COND_INITIALIZER;
static struct hl_control **pages;
static size_t count, room;
static bool started;
static uint64_t numbers; /* sum of all processes' counters: whether anything happens */

/* Returns whether there were events since the last time. */
static bool beat(uint64_t now_ns)
{
    uint64_t before = numbers;
    numbers = 0;
    for (size_t i = 0; i < count; i++) {
        uint32_t coarse = pages[i]->coarse + 1;
        __atomic_store_n(&pages[i]->coarse, coarse ? coarse : 1, __ATOMIC_RELAXED); /* 0: nobody keeps the time */
        __atomic_store_n(&pages[i]->heartbeat_ns, now_ns, __ATOMIC_RELEASE);
        numbers += __atomic_load_n(&pages[i]->seq, __ATOMIC_RELAXED);
    }
    return numbers != before;
}

static void *tick(void *nothing)
{
    unsigned quiet = 0;
    for (;;) {
        struct timespec now, period = {.tv_nsec = PERIOD_NS};
        pthread_mutex_lock(&lock);
        while (!count)
            pthread_cond_wait(&wanted, &lock);
        clock_gettime(CLOCK_MONOTONIC, &now);
        quiet = beat((uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec) ? 0 : quiet + 1;
        pthread_mutex_unlock(&lock);
        if (quiet > QUIET)
            period.tv_nsec *= QUIET_PERIODS;
        nanosleep(&period, NULL);
    }
    return nothing;
}

/* The thread, which no signal of ours is delivered to. */
static int start(void)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    int error = pthread_attr_init(&attributes);
    if (error)
        return error;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 64 << 10);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    error = pthread_create(&thread, &attributes, tick, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    return error;
}

int ticker_add(struct hl_control *page)
{
    int error = 0;
    pthread_mutex_lock(&lock);
    if (count == room) {
        size_t more = room ? room * 2 : 16;
        struct hl_control **bigger = realloc(pages, more * sizeof *pages);
        if (bigger) {
            pages = bigger;
            room = more;
        }
    }
    if (count == room)
        error = ENOMEM;
    else if (!started)
        error = start();
    if (!error) {
        started = true;
        pages[count++] = page;
        pthread_cond_signal(&wanted);
    }
    pthread_mutex_unlock(&lock);
    return error;
}

void ticker_remove(struct hl_control *page)
{
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count; i++)
        if (pages[i] == page)
            pages[i--] = pages[--count];
    pthread_mutex_unlock(&lock);
}
