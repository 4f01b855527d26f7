/*
 * record.h: one thread's ring, sequence numbers, the clock; the hot path, inline.
 *
 * No lock and no system call unless the ring is full or new. Every step is re-entrant: a signal handler of the same thread may
 * record at any point, because slots are reserved by one xadd instruction and the state is put back on the way out.
 * The layout of a slot and the ordering rules are drawn in spool.h.
 */
#ifndef HEAPLEDGER_RECORD_H
#define HEAPLEDGER_RECORD_H

#include "host.h"

#define HL_TICK_SHIFT 8 /* 2^8 TSC cycles: 64 to 128 ns at 2 to 4 GHz */
#define HL_OPEN_CALLS 8
#define HL_ADDR_MASK 0xffffffffffffull
#define HL_DONE (1ull << 8)
#define HL_MORE (1ull << 6)
#define HL_ROOM_OUTER 128 /* slots that an outer call leaves free for signal handlers */
#define HL_ROOM_NESTED 32
#define HL_INLINE inline __attribute__((always_inline))

/* From which span on an exit number goes into an HL_LATE slot. Smaller only in a build that tests those. */
#ifndef HL_SPAN_FITS
#define HL_SPAN_FITS HL_SPAN_LATE
#endif

/*
 * A ring as its owner sees it; one for each ring file. Fork copies it: in a child it counts for nothing (see hl_live). What a
 * plain call touches is in the first cache line.
 */
struct hl_thread {
    uint32_t depth;       /* calls in progress: above 1 only inside a signal handler */
    uint32_t coarse_seen; /* control.coarse when last_tick was read; where that is 0, something else */
    struct hl_ring *ring;
    uint64_t *slots;
    uint64_t capacity;
    uint64_t limit; /* ring.head may come so far, and HL_ROOM_OUTER farther, before ring.tail must be looked at again */
    uint64_t last_tick;
    struct {
        uint64_t *slot;
        uintptr_t sp;
    } open[HL_OPEN_CALLS]; /* the calls in progress, outermost first */
    uint64_t flood_tail;   /* ring.tail when waiting for room was given up; no second wait until it moves. ~0: none */
    uint64_t tail_seen;
    int tid;
    uint32_t index;
} __attribute__((aligned(64)));
_Static_assert(offsetof(struct hl_thread, open[1]) == 64, "a plain call touches one line");

/* The columns of store/events.py that a call fills. */
struct hl_values {
    uint64_t addr, size, arg, arg2, word;
};

/* A call between its entry and its exit; lives on the hook's stack. */
struct hl_event {
    struct hl_thread *thread;
    uint64_t head; /* its first slot */
    uint64_t *slot;
    uint64_t seq;
    uint64_t w0;
    uint32_t slots;
    uint32_t depth;
};

extern HL_HIDDEN __thread struct hl_thread *hl_self;

/* 1 while this process image records. Lies in memory that fork wipes: 0 in a child until it has an image of its own. */
extern HL_HIDDEN const uint32_t *hl_live;

extern HL_HIDDEN const char *hl_single_threaded; /* libc's flag, or a constant 0 */

/* This thread's ring, made or taken if need be. NULL: nothing is recorded. */
struct hl_thread *record_thread_slow(void);

/* Makes sure that n slots are free beyond `margin`; waits for the collector if need be. False: the event is lost (counted). */
bool record_room(struct hl_thread *t, uint32_t n, uint32_t margin);

/* Writes the HL_TIME slot that must stand before an event at this tick. */
void record_time(struct hl_thread *t, uint64_t tick);

/* Called when a call is in progress already: finishes the calls that a longjmp has left for good. */
void record_nested(struct hl_thread *t, uintptr_t sp);

/* Writes the HL_EXT slots behind the event's first slot. */
void record_extend(const struct hl_event *e, const struct hl_values *v);

/* Writes an HL_LATE slot. False when there is no room (the event then stays one that never returned). */
bool record_late(const struct hl_event *e, uint64_t word, uint64_t seq_exit);

/* Whole events for everything that is not hot. exts: how many HL_EXT slots (0, 1, 2). The end gives all values anew. */
bool record_call_begin(struct hl_event *e, unsigned kind, uint32_t exts, uint32_t stack, uintptr_t sp,
                       const struct hl_values *v);
void record_call_end(struct hl_event *e, const struct hl_values *v);
void record_instant(unsigned kind, uint32_t exts, const struct hl_values *v);

/* The thread is about to end: HL_THREAD_END, and the ring is marked as left (it may still record frees). */
void record_thread_end(void);

/*
 * In a fork child, before its image is made: the parent's rings are forgotten. Where they were mapped lies memory of the child's
 * own then: should a handler have forked in the middle of a hook, the child finishes that hook without harm.
 */
void record_forget(void);

/*
 * The spool will be out of reach soon (image_leave): makes sure that this thread has a ring, and that some are there that new threads
 * can take.
 */
void record_prepare(void);

/* The thread whose structure is at `thread_pointer` has a new name: so its ring says. */
void record_thread_name(uintptr_t thread_pointer, const char *name);

/* Notes what the thread's creator knew about its stack, before its first event. 0 if not known. */
void record_thread_stack(uintptr_t low, uintptr_t high);

static inline struct hl_thread *record_thread(void)
{
    struct hl_thread *t = hl_self;
    if (likely(t != NULL) && likely(*hl_live))
        return t;
    return record_thread_slow();
}

/* xadd without the lock prefix: atomic against signal handlers of this thread, which is all that a ring's head needs. */
static inline uint64_t xadd_local(uint64_t *at, uint64_t n)
{
    __asm__ volatile("xaddq %0, %1" : "+r"(n), "+m"(*at) : : "memory", "cc");
    return n;
}

static inline uint64_t record_seq(void)
{
    uint64_t *seq = &hl_control_page->seq;
    if (*(const volatile char *)hl_single_threaded)
        return xadd_local(seq, 1);
    return __atomic_fetch_add(seq, 1, __ATOMIC_SEQ_CST);
}

static inline uint64_t *record_slot(const struct hl_thread *t, uint64_t head)
{
    return t->slots + (head & (t->capacity - 1)) * 4;
}

/* Bit 7 of w0: 1 while the ring is filled for the first time, then 0, 1, ... */
static inline uint64_t record_lap(const struct hl_thread *t, uint64_t head)
{
    return head & t->capacity ? 0 : 0x80;
}

static inline void put(uint64_t *at, uint64_t value)
{
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
}

/* The tick of an event of `slots` slots from `head` on: "Time" in spool.h. Writes the HL_TIME slot before it. */
static HL_INLINE uint64_t record_tick(struct hl_thread *t, uint64_t head, uint32_t slots)
{
    uint32_t coarse = __atomic_load_n(&hl_control_page->coarse, __ATOMIC_RELAXED);
    if (likely(coarse == t->coarse_seen) && likely(!((head ^ (head + slots)) & 8)))
        return t->last_tick;
    t->coarse_seen = coarse ? coarse : ~0u;
    uint64_t tick = host_tsc() >> HL_TICK_SHIFT;
    if (unlikely(tick - t->last_tick + (1 << 20) >= 1 << 23))
        record_time(t, tick);
    return t->last_tick = tick;
}

/*
 * A call in two ways. The plain one, record_enter and record_leave, is inlined into the hooks: no other call is in progress, there
 * is room, no more than HL_PLAIN_SLOTS slots. record_ready says whether it may be taken; a signal handler that comes in
 * between changes nothing of that, since all it opened it has closed when it returns, and the margin is for its slots. Its event never
 * leaves the registers. The other, record_reserve and record_result, does everything, and is not inlined.
 */
#define HL_PLAIN_SLOTS 2

/* This thread's ring if the plain way may be taken, else NULL. */
static HL_INLINE struct hl_thread *record_ready(void)
{
    struct hl_thread *t = hl_self;
    if (likely(t != NULL) && likely(*hl_live) && likely(t->depth == 0) && likely(t->ring->head <= t->limit - HL_PLAIN_SLOTS))
        return t;
    return NULL;
}

/* The first half of an entry: reserves the slots and takes the numbers. */
static HL_INLINE void record_number(struct hl_event *e, struct hl_thread *t, uint32_t slots, uint32_t depth, uintptr_t sp,
                                 uint64_t tick)
{
    e->thread = t;
    e->depth = depth;
    e->slots = slots;
    e->head = xadd_local(&t->ring->head, slots);
    e->slot = record_slot(t, e->head);
    if (likely(depth < HL_OPEN_CALLS)) {
        t->open[depth].slot = e->slot;
        t->open[depth].sp = sp;
    }
    t->depth = depth + 1;
    e->seq = record_seq();
    put(&e->slot[3], tick << 40 | (e->seq & 0xffffffffffull));
}

/* Its last store. */
static HL_INLINE void record_open(struct hl_event *e, unsigned kind, uint32_t stack, uint64_t w1, uint64_t w2)
{
    e->w0 = (uint64_t)stack << 32 | record_lap(e->thread, e->head) | (e->slots > 1 ? HL_MORE : 0) | kind;
    put(&e->slot[1], w1);
    put(&e->slot[2], w2);
    put(&e->slot[0], e->w0);
}

/* Writes the one HL_EXT slot of a plain call that has one. */
static HL_INLINE void record_arguments(const struct hl_event *e, uint64_t arg, uint64_t arg2)
{
    uint64_t *slot = record_slot(e->thread, e->head + 1);
    put(&slot[1], arg);
    put(&slot[2], arg2);
    put(&slot[3], 0);
    put(&slot[0], record_lap(e->thread, e->head + 1) | HL_DONE | HL_EXT);
}

/* Entry of a call, the plain way; record_open comes next. */
static HL_INLINE void record_enter(struct hl_event *e, struct hl_thread *t, uint32_t slots, uintptr_t sp)
{
    record_number(e, t, slots, 0, sp, record_tick(t, t->ring->head, slots));
}

/* The same, whatever the circumstances. False: not recorded (e is not used then). */
bool record_reserve(struct hl_event *e, struct hl_thread *t, uint32_t slots, uintptr_t sp);

/*
 * Whether the exit of a call may still be written. Not when recording has stopped, not in the child of a fork that a signal
 * handler made while the call was in progress, and not when the collector gave up waiting for this call and its slots are
 * in use again.
 */
static inline bool record_may_close(const struct hl_event *e)
{
    const struct hl_thread *t = e->thread;
    return likely(*hl_live) && likely(t->ring->head - e->head <= t->capacity);
}

/* The exit of such a call. */
void record_abandon(const struct hl_event *e);

/* Exit of a call whose other words are final. seq_exit must be below seq + HL_SPAN_FITS, or HL_SPAN_LATE is stored. */
static HL_INLINE void record_close(const struct hl_event *e, uint64_t span)
{
    put(&e->slot[0], e->w0 | span << 9 | HL_DONE);
    e->thread->depth = e->depth;
}

/* Exit of an allocator call that has a number already, with an HL_LATE slot. */
void record_result_late(const struct hl_event *e, uint64_t addr, uint64_t excess, uint64_t word, uint64_t seq_exit);

/* Exit of an allocator call: the result and the word before it. */
static HL_INLINE void record_leave(const struct hl_event *e, uint64_t addr, uint64_t excess, uint64_t word)
{
    if (unlikely(!record_may_close(e))) {
        struct hl_event left = *e; /* so that only here it has an address */
        record_abandon(&left);
        return;
    }
    uint64_t seq_exit = record_seq();
    uint64_t span = seq_exit - e->seq;
    if (unlikely(span >= HL_SPAN_FITS || excess >= HL_EXCESS_LATE)) {
        struct hl_event late = *e;
        record_result_late(&late, addr, excess, word, seq_exit);
        return;
    }
    put(&e->slot[1], excess << 48 | (addr & HL_ADDR_MASK));
    record_close(e, span);
}

/* The same for an event of record_reserve. */
void record_result(const struct hl_event *e, uint64_t addr, uint64_t excess, uint64_t word);

/* The same for a realloc, with one HL_EXT slot, that is to stand as the free of its old block. */
void record_result_free(struct hl_event *e, uint64_t addr, uint64_t word);

#endif
