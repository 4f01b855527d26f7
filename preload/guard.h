/*
 * guard.h: what keeps the slow paths from re-entering themselves.
 *
 * The hot path needs no guard: every step of it is re-entrant (see record.h). A slow path (making an image, a ring, a
 * table entry) runs with all signals blocked and holds one small lock. There is no bootstrap arena: the real functions
 * are found by host_symbol(), which unlike dlsym allocates nothing.
 */
#ifndef HEAPLEDGER_GUARD_H
#define HEAPLEDGER_GUARD_H

#include "host.h"

struct hl_guard {
    uint64_t signals;
    uint32_t *lock;
};

static inline void host_yield(void)
{
    if (likely(!host_frugal))
        host_call0(SYS_sched_yield);
    else
        __builtin_ia32_pause();
}

/* Blocks this thread's signals and takes the lock (it lies in memory that a fork child finds zeroed). */
static inline struct hl_guard guard_enter(uint32_t *lock)
{
    struct hl_guard g = {.lock = lock};
    host_signals_block(&g.signals);
    while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))
        host_yield();
    return g;
}

static inline void guard_leave(struct hl_guard *g)
{
    __atomic_store_n(g->lock, 0, __ATOMIC_RELEASE);
    host_signals_restore(&g->signals);
}

#endif
