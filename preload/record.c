/* record.c: rings and what is not hot about them; the hot path is in record.h. */
#define _GNU_SOURCE
#include "record.h"

#include <errno.h>
#include <signal.h>
#include <sys/prctl.h>

#include "guard.h"
#include "image.h"
#include "spool_files.h"
#include "stack.h"

__thread struct hl_thread *hl_self;
static __thread uintptr_t thread_stack_low, thread_stack_high;

#define SPARE_RINGS 16
#define SPARE_SLOTS 4096

#define HL_RING_GROUPS 256
#define HL_RING_GROUP 64
static struct hl_thread *groups[HL_RING_GROUPS]; /* by ring number; under ring_lock */

static const uint32_t not_live = 0;
const uint32_t *hl_live = &not_live;

static const char never_single = 0;
const char *hl_single_threaded = &never_single;

#define NS 1000000000ull
#define WAIT_FIRST (5 * NS)  /* for a collector that has not come yet */
#define WAIT_STALE (2 * NS)  /* a heartbeat older than this: the collector is gone */
#define WAIT_BUSY (3 * NS)   /* for a collector that lives but does not drain this ring */
#define WAIT_STEP 200000ull  /* ns */

static void count_lost(uint64_t n)
{
    __atomic_fetch_add(&hl_control_page->lost, n, __ATOMIC_RELAXED);
}

/* ---- taking a ring ---- */

static struct hl_thread *thread_at(uint32_t index)
{
    struct hl_thread *group = groups[index / HL_RING_GROUP];
    return group ? &group[index % HL_RING_GROUP] : NULL;
}

/* A ring whose owner is gone and whose events the collector has taken. NULL if there is none. */
static struct hl_thread *ring_reuse(void)
{
    for (uint32_t i = 0; i < hl_control_page->rings; i++) {
        struct hl_thread *t = thread_at(i);
        uint32_t wanted = HL_RING_FREE;
        if (t && t->ring && __atomic_compare_exchange_n(&t->ring->state, &wanted, HL_RING_OWNED, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return t;
    }
    return NULL;
}

static struct hl_thread *thread_slot(uint32_t index)
{
    if (index >= HL_RING_GROUPS * HL_RING_GROUP)
        return NULL;
    struct hl_thread **group = &groups[index / HL_RING_GROUP];
    if (!*group)
        *group = host_map_private(HL_RING_GROUP * sizeof(struct hl_thread));
    return *group ? &(*group)[index % HL_RING_GROUP] : NULL;
}

/* The more rings there are the smaller the new ones: a program that starts thousands of threads must not fill the disk. */
static uint32_t ring_capacity(uint32_t index)
{
    uint32_t slots = hl_settings.ring_slots >> (index < 4 ? 0 : index < 32 ? 2 : index < 128 ? 4 : 6);
    return slots < 1024 ? 1024 : slots;
}

/* A new ring file in a state (HL_RING_OWNED or _FREE). NULL and *error on failure. */
static struct hl_thread *ring_make(uint32_t capacity, uint32_t state, int *error)
{
    uint32_t index = hl_control_page->rings;
    struct hl_thread *t = thread_slot(index);
    *error = ENOMEM;
    if (!t)
        return NULL;
    size_t bytes = HL_PAGE + (size_t)capacity * 32;
    struct hl_ring *ring = spool_make("ring.", index, bytes, error);
    if (!ring)
        return NULL;
    __builtin_memcpy(ring->magic, HL_MAGIC_RING, 8);
    ring->index = index;
    ring->capacity = capacity;
    ring->state = state;
    ring->tid = state == HL_RING_OWNED ? (uint32_t)host_tid() : 0;
    t->ring = ring;
    t->index = index;
    t->capacity = capacity;
    t->slots = (uint64_t *)((char *)ring + HL_PAGE);
    spool_publish("ring.", index);
    __atomic_store_n(&hl_control_page->rings, index + 1, __ATOMIC_SEQ_CST);
    *error = 0;
    return t;
}

void record_forget(void)
{
    for (uint32_t i = 0; i < HL_RING_GROUPS && groups[i]; i++) {
        for (uint32_t j = 0; j < HL_RING_GROUP && groups[i][j].ring; j++)
            host_blank(groups[i][j].ring, HL_PAGE + (size_t)groups[i][j].capacity * 32);
        groups[i] = NULL;
    }
    hl_self = NULL;
}

/* Sees how far the collector is. */
static void tail_look(struct hl_thread *t)
{
    t->tail_seen = __atomic_load_n(&t->ring->tail, __ATOMIC_ACQUIRE);
    t->limit = t->tail_seen + t->capacity - HL_ROOM_OUTER;
}

static void thread_describe(struct hl_thread *t)
{
    struct hl_ring *ring = t->ring;
    t->tid = host_tid();
    t->depth = 0;
    t->last_tick = 0;
    t->coarse_seen = __atomic_load_n(&hl_control_page->coarse, __ATOMIC_RELAXED) - 1;
    t->flood_tail = ~0ull;
    tail_look(t);
    ring->tid = (uint32_t)t->tid;
    ring->thread = hl_image->threads++;
    ring->thread_pointer = (uint64_t)__builtin_thread_pointer();
    ring->stack_low = thread_stack_low;
    ring->stack_high = thread_stack_high;
    if (!host_frugal)
        host_call2(SYS_prctl, PR_GET_NAME, ring->name);
    __atomic_store_n(&ring->generation, ring->generation + 1, __ATOMIC_SEQ_CST);
}

static void thread_announce(struct hl_thread *t)
{
    struct hl_values v = {.addr = t->ring->thread_pointer, .size = thread_stack_high - thread_stack_low,
                          .arg = thread_stack_low, .arg2 = (uint64_t)t->tid};
    record_instant(HL_THREAD_START, 1, &v);
}

static void ring_failed(int error)
{
    if (error == EACCES || error == EPERM || error == ENOENT)
        image_stop(HL_STOP_DENIED, error, "the spool is out of reach (another user or root, or files are forbidden)");
    else
        image_stop(error == ENOMEM ? HL_STOP_NO_MEMORY : HL_STOP_NO_SPACE, error, "no room for a thread's ring");
}

static struct hl_thread *thread_take(void)
{
    int error = 0;
    struct hl_guard g = guard_enter(&hl_image->ring_lock);
    struct hl_thread *t = hl_image->mode == HL_MODE_ON ? ring_reuse() : NULL;
    if (!t && hl_image->mode == HL_MODE_ON)
        t = ring_make(ring_capacity(hl_control_page->rings), HL_RING_OWNED, &error);
    if (t) {
        thread_describe(t);
        hl_self = t;
        stack_thread_init();
        thread_announce(t);
    }
    guard_leave(&g);
    if (error)
        ring_failed(error);
    return t;
}

void record_prepare(void)
{
    int error = 0;
    uint32_t capacity = hl_settings.ring_slots < SPARE_SLOTS ? hl_settings.ring_slots : SPARE_SLOTS;
    if (!record_thread())
        return;
    struct hl_guard g = guard_enter(&hl_image->ring_lock);
    for (uint32_t i = 0; i < SPARE_RINGS && !error && hl_image->mode == HL_MODE_ON; i++)
        ring_make(capacity, HL_RING_FREE, &error);
    guard_leave(&g);
}

void record_thread_name(uintptr_t thread_pointer, const char *name)
{
    uint32_t rings = hl_image->mode == HL_MODE_ON ? hl_control_page->rings : 0;
    for (uint32_t i = 0; i < rings; i++) {
        struct hl_thread *t = thread_at(i);
        if (t && t->ring && t->ring->thread_pointer == thread_pointer && t->ring->state == HL_RING_OWNED)
            text_put(t->ring->name, sizeof t->ring->name, name);
    }
}

struct hl_thread *record_thread_slow(void)
{
    if (hl_image->mode == HL_MODE_OFF || !image_start())
        return NULL;
    struct hl_thread *t = hl_self;
    return t ? t : thread_take();
}

void record_thread_stack(uintptr_t low, uintptr_t high)
{
    thread_stack_low = low;
    thread_stack_high = high;
}

void record_thread_end(void)
{
    struct hl_thread *t = hl_self;
    if (!t || !*hl_live)
        return;
    struct hl_values v = {.arg2 = (uint64_t)t->tid};
    record_instant(HL_THREAD_END, 1, &v);
    __atomic_store_n(&t->ring->state, HL_RING_LEFT, __ATOMIC_RELEASE);
}

/* ---- a full ring ---- */

/* Why waiting for room must end now: 0 go on waiting, 1 this event is lost, 2 recording was stopped. */
static int wait_verdict(uint64_t waited_ns, uint64_t now_ns)
{
    uint64_t beat = __atomic_load_n(&hl_control_page->heartbeat_ns, __ATOMIC_ACQUIRE);
    if (hl_control_page->told) {
        image_stop(HL_STOP_TOLD, 0, "the collector asked for it");
        return 2;
    }
    if (beat == 0 ? waited_ns > WAIT_FIRST : (now_ns > beat && now_ns - beat > WAIT_STALE)) {
        image_stop(HL_STOP_COLLECTOR_GONE, 0, "nobody collects the events");
        return 2;
    }
    return beat && waited_ns > WAIT_BUSY;
}

static bool room_now(struct hl_thread *t, uint32_t n, uint32_t margin)
{
    tail_look(t);
    return t->ring->head + n + margin - t->tail_seen <= t->capacity;
}

bool record_room(struct hl_thread *t, uint32_t n, uint32_t margin)
{
    if (unlikely(hl_control_page->told) && hl_image->mode == HL_MODE_ON) {
        image_stop(HL_STOP_TOLD, 0, "the collector asked for it");
        return false;
    }
    uint64_t began = 0;
    while (!room_now(t, n, margin)) {
        uint64_t now = host_now_ns();
        began = began ? began : now;
        int verdict = t->flood_tail == t->tail_seen ? 1 : wait_verdict(now - began, now);
        if (verdict == 1) {
            t->flood_tail = t->tail_seen;
            count_lost(1);
        }
        if (verdict || !*hl_live)
            return false;
        host_sleep_ns(WAIT_STEP);
    }
    if (began) {
        __atomic_fetch_add(&hl_control_page->waits, 1, __ATOMIC_RELAXED);
        __atomic_fetch_add(&hl_control_page->waited_ns, host_now_ns() - began, __ATOMIC_RELAXED);
    }
    t->flood_tail = ~0ull;
    return true;
}

/* ---- slots that are not a plain call ---- */

/* A slot of its own, without the margin kept for handlers. NULL when there is no room. */
static uint64_t *take_slot(struct hl_thread *t, uint64_t *w0, unsigned kind)
{
    if (t->ring->head + 1 - t->tail_seen > t->capacity && !record_room(t, 1, 0))
        return NULL;
    uint64_t head = xadd_local(&t->ring->head, 1);
    *w0 = record_lap(t, head) | HL_DONE | kind;
    return record_slot(t, head);
}

void record_time(struct hl_thread *t, uint64_t tick)
{
    uint64_t w0, *slot = take_slot(t, &w0, HL_TIME);
    if (!slot)
        return;
    put(&slot[1], tick);
    put(&slot[2], __atomic_load_n(&hl_control_page->seq, __ATOMIC_SEQ_CST));
    put(&slot[3], t->ring->thread);
    put(&slot[0], w0);
}

bool record_late(const struct hl_event *e, uint64_t word, uint64_t seq_exit)
{
    uint64_t w0, *slot = take_slot(e->thread, &w0, HL_LATE);
    if (!slot) {
        count_lost(1);
        return false;
    }
    put(&slot[1], word);
    put(&slot[2], seq_exit);
    put(&slot[3], e->seq);
    put(&slot[0], w0);
    return true;
}

void record_extend(const struct hl_event *e, const struct hl_values *v)
{
    for (uint32_t i = 1; i < e->slots; i++) {
        uint64_t head = e->head + i, *slot = record_slot(e->thread, head);
        put(&slot[1], i == 1 ? v->arg : v->word);
        put(&slot[2], i == 1 ? v->arg2 : 0);
        put(&slot[3], i == 1 ? v->size : 0);
        put(&slot[0], record_lap(e->thread, head) | HL_DONE | (i + 1 < e->slots ? HL_MORE : 0) | HL_EXT);
    }
}

/* True when this thread runs on its alternate signal stack, where stack addresses say nothing about nesting. */
static bool on_alternate_stack(void)
{
    stack_t now;
    return host_frugal || host_call2(SYS_sigaltstack, NULL, &now) != 0 || (now.ss_flags & SS_ONSTACK);
}

/*
 * A call in progress whose stack frame lies below ours (sp is above it) was left by longjmp out of a signal handler: it will
 * never return. Its slot is closed with span 0, so that the reader does not wait for it for ever.
 */
void record_nested(struct hl_thread *t, uintptr_t sp)
{
    uint32_t depth = t->depth < HL_OPEN_CALLS ? t->depth : HL_OPEN_CALLS;
    if (depth == 0 || sp <= t->open[depth - 1].sp || on_alternate_stack())
        return;
    while (depth && sp > t->open[depth - 1].sp) {
        uint64_t *slot = t->open[--depth].slot;
        uint64_t w0 = __atomic_load_n(slot, __ATOMIC_RELAXED);
        if (!(w0 & HL_DONE))
            put(slot, w0 | HL_DONE);
    }
    t->depth = depth;
}

bool record_reserve(struct hl_event *e, struct hl_thread *t, uint32_t slots, uintptr_t sp)
{
    if (t->depth)
        record_nested(t, sp);
    if (t->ring->head + slots > t->limit && !record_room(t, slots, t->depth ? HL_ROOM_NESTED : HL_ROOM_OUTER))
        return false;
    uint64_t tick = record_tick(t, t->ring->head, slots);
    record_number(e, t, slots, t->depth, sp, tick);
    return true;
}

void record_result_late(const struct hl_event *e, uint64_t addr, uint64_t excess, uint64_t word, uint64_t seq_exit)
{
    if (!record_late(e, word, seq_exit)) {
        record_close(e, 0);
        return;
    }
    uint64_t span = seq_exit - e->seq;
    excess = excess >= HL_EXCESS_LATE ? HL_EXCESS_LATE : excess;
    put(&e->slot[1], excess << 48 | (addr & HL_ADDR_MASK));
    record_close(e, span >= HL_SPAN_FITS ? HL_SPAN_LATE : span);
}

void record_result(const struct hl_event *e, uint64_t addr, uint64_t excess, uint64_t word)
{
    record_leave(e, addr, excess, word);
}

void record_result_free(struct hl_event *e, uint64_t addr, uint64_t word)
{
    struct hl_values v = {.size = word};
    if (!record_may_close(e)) {
        record_abandon(e);
        return;
    }
    record_extend(e, &v);
    put(&e->slot[2], word >= HL_SIZE_EXT ? HL_SIZE_EXT : word);
    e->w0 = (e->w0 & ~63ull) | HL_FREE;
    record_leave(e, addr, 0, 0);
}

/* ---- whole events ---- */

static uint64_t short_size(uint64_t size, uint32_t exts)
{
    return size >= HL_SIZE_EXT && exts ? HL_SIZE_EXT : size & HL_ADDR_MASK;
}

bool record_call_begin(struct hl_event *e, unsigned kind, uint32_t exts, uint32_t stack, uintptr_t sp,
                       const struct hl_values *v)
{
    struct hl_thread *t = record_thread();
    if (!t || !record_reserve(e, t, 1 + exts, sp))
        return false;
    record_extend(e, v);
    record_open(e, kind, stack, v->addr & HL_ADDR_MASK, short_size(v->size, exts));
    return true;
}

void record_abandon(const struct hl_event *e)
{
    if (!*hl_live)
        return;
    count_lost(1);
    e->thread->depth = e->depth;
}

void record_call_end(struct hl_event *e, const struct hl_values *v)
{
    if (!record_may_close(e)) {
        record_abandon(e);
        return;
    }
    uint64_t seq_exit = record_seq(), span = seq_exit - e->seq;
    if (span >= HL_SPAN_FITS)
        span = record_late(e, 0, seq_exit) ? HL_SPAN_LATE : 0;
    record_extend(e, v);
    put(&e->slot[1], v->addr & HL_ADDR_MASK);
    put(&e->slot[2], short_size(v->size, e->slots - 1));
    record_close(e, span);
}

void record_instant(unsigned kind, uint32_t exts, const struct hl_values *v)
{
    struct hl_event e;
    if (record_call_begin(&e, kind, exts, 0, (uintptr_t)__builtin_frame_address(0), v))
        record_call_end(&e, v);
}
