/* drain.c: decodes and merges the rings of an image into blocks. See drain.h. */
#define _GNU_SOURCE
#include "drain_ring.h"

#include <stdlib.h>

/* Events of a group that is sorted. */
enum { GROUP_MAX = 1 << 16 };
/* Slots that are asked for before they are read: the processor's own guesses end at each page. */
enum { AHEAD = 64 };
#define PATIENCE_NS 100000000ull        /* for a call in progress that has slots behind it */
#define PATIENCE_CROWDED_NS 20000000ull /* for any call in progress, where a ring is half full meanwhile */

/* ---- events to the encoder ---- */

static void flush_batch(struct drain *d)
{
    codec_push(d->encoder, d->batch, d->batch_count);
    d->batch_count = 0;
    size_t left = CODEC_BLOCK_EVENTS - codec_count(d->encoder);
    d->batch_room = left < DRAIN_BATCH ? left : DRAIN_BATCH;
}

static inline uint64_t time_of(struct drain *d, uint64_t tick)
{
    if (tick == d->clock_tick)
        return d->clock_ns;
    double cycles = (double)(int64_t)((tick << d->clock.tick_shift) - d->clock.start_tsc);
    double ns = cycles * d->clock.ns_per_cycle + d->clock.offset_ns;
    d->clock_tick = tick;
    d->clock_ns = ns > 0 ? (uint64_t)ns : 0; /* never before the session */
    return d->clock_ns;
}

/* Whether the event can be: its number was handed out, and was not seen before. */
static inline bool is_possible(struct drain *d, uint64_t seq)
{
    if (likely(seq > d->totals.last_seq && seq < d->limit))
        return true;
    if (seq > d->written)
        d->totals.damaged++;
    return false;
}

/* Takes the event that was decoded into the batch's next place; `thread` and `time` are filled already. */
static inline void batch_take(struct drain *d, struct codec_event *e)
{
    if (unlikely(e->stack >= d->nodes)) {
        d->totals.damaged += e->stack != 0;
        e->stack = 0;
    }
    if (unlikely(d->first_seq == 0)) {
        d->first_seq = e->seq;
        d->first_ns = d->block_ns = e->time;
    }
    d->totals.last_seq = e->seq;
    d->totals.events++;
    d->totals.returned += e->seq_exit != 0;
    d->block_ns = e->time > d->block_ns ? e->time : d->block_ns;
    d->first_ns = e->time < d->first_ns ? e->time : d->first_ns;
    d->batch_count++;
}

static inline bool has_room(const struct drain *d) { return d->batch_count < d->batch_room; }

/* Makes room in the batch; false: the block is full. */
static inline bool make_room(struct drain *d)
{
    if (likely(has_room(d)))
        return true;
    flush_batch(d);
    return has_room(d);
}

/* ---- slots ---- */

/* The HL_LATE slot of the event with this number, somewhere behind it; NULL if its owner found no room for one. */
static const uint64_t *late_slot(const struct ring *r, uint64_t position, uint64_t seq)
{
    uint64_t head = load(&r->page->head); /* it was written before its event was done: the pass may not have seen it */
    uint64_t base = position > r->spilled ? position : r->spilled;
    if (head - base > r->capacity)
        head = base + r->capacity;
    for (; position < head; position++) {
        const uint64_t *slot = slot_at(r, position);
        if (is_written(r, position, slot[0]) && (slot[0] & 63) == HL_LATE && !((slot[3] ^ seq) & 0xffffffffffull))
            return slot;
    }
    return NULL;
}

/* The event at `at`, which is written, with all that belongs to it; moves `at` behind. */
static void read_event(struct drain *d, const struct ring *r, struct cursor *at, bool open, struct codec_event *e)
{
    const uint64_t *slot = slot_at(r, at->position);
    uint64_t w0 = slot[0], w1 = slot[1], w2 = slot[2], w3 = slot[3];
    at->tick = slot_tick(w3, at->tick);
    at->seq = slot_seq(w3, at->seq);
    at->position++;
    slot_decode(e, w0, w1, w2, at->seq);
    e->thread = r->owner ? r->owner->row.number : 0;
    e->time = time_of(d, at->tick);
    bool more = w0 & W0_MORE;
    for (int i = 0; more && at->position < r->head; i++, at->position++) {
        const uint64_t *ext = slot_at(r, at->position);
        if ((ext[0] & 63) != HL_EXT)
            break;
        more = ext[0] & W0_MORE;
        if (i == 0)
            slot_extend(e, ext, w2);
        else if (i == 1)
            e->word = ext[1];
    }
    if (slot_is_late(w0, w1)) {
        const uint64_t *late = late_slot(r, at->position, at->seq);
        e->seq_exit = late ? late[2] : 0;
        if (slot_has_word(e->kind))
            e->word = late ? late[1] : 0;
    }
    if (open)
        slot_blank_open(e);
}

/* Whether an event behind `position` has a smaller number: a handler ran before this one's number was taken. */
static bool is_overtaken(const struct ring *r, uint64_t position, uint64_t seq)
{
    for (; position < r->head; position++) {
        const uint64_t *slot = slot_at(r, position);
        uint64_t w0 = load(slot);
        if (!is_written(r, position, w0))
            return false;
        if ((w0 & 63) < HL_TIME)
            return (int64_t)(slot_seq(slot[3], seq) - seq) < 0;
    }
    return false;
}

/* Whether anything was written behind this slot but the HL_EXT slots of its own event (which are written before it). */
static bool written_behind(const struct ring *r, uint64_t position)
{
    for (position++; position < r->head; position++) {
        uint64_t w0 = load(slot_at(r, position));
        if (is_written(r, position, w0) && (w0 & 63) != HL_EXT)
            return true;
    }
    return false;
}

/*
 * Goes on behind a slot that was reserved and never written (it holds another lap's event). The last that a thread reserved before
 * the process died is no damage: that call's number was handed out, and the call not made.
 */
static void pass_unwritten(struct drain *d, struct ring *r)
{
    if (written_behind(r, r->at.position)) {
        d->totals.damaged++;
        r->at.position++;
    } else {
        d->totals.unmade++;
        r->at.position = r->head;
    }
}

/* ---- a group that is out of order ---- */

static int by_seq(const void *a, const void *b)
{
    uint64_t x = ((const struct codec_event *)a)->seq, y = ((const struct codec_event *)b)->seq;
    return x < y ? -1 : x > y;
}

static struct codec_event *group_room(struct ring *r)
{
    if (r->group.count == r->group.room) {
        size_t room = r->group.room ? r->group.room * 2 : 64;
        struct codec_event *event = room > GROUP_MAX ? NULL : realloc(r->group.event, room * sizeof *event);
        if (!event)
            return NULL;
        r->group.event = event;
        r->group.room = room;
    }
    return &r->group.event[r->group.count];
}

/* Reads on until numbers ascend again, and sorts what was read. Without memory the order stays as it is. */
static void gather(struct drain *d, struct ring *r)
{
    struct cursor at = r->at;
    uint64_t highest = 0;
    r->group.count = r->group.taken = 0;
    while (at.position < r->head) {
        const uint64_t *slot = slot_at(r, at.position);
        uint64_t w0 = load(slot);
        unsigned kind = w0 & 63;
        if (!is_written(r, at.position, w0) || (kind < HL_TIME && !(w0 & W0_DONE) && r->group.count))
            break;
        if (kind == HL_TIME) {
            if (r->owner && r->owner->row.number != slot[3])
                break;
            at.tick = slot[1];
        }
        if (!slot_is_known(kind)) {
            d->totals.damaged += kind < HL_TIME;
            at.position++;
            continue;
        }
        if (r->group.count && (int64_t)(slot_seq(slot[3], highest) - highest) > 0)
            break;
        struct codec_event *e = group_room(r);
        if (!e)
            break;
        bool open = !(w0 & W0_DONE);
        read_event(d, r, &at, open, e);
        r->group.count++;
        highest = e->seq > highest ? e->seq : highest;
    }
    r->group.end = at;
    qsort(r->group.event, r->group.count, sizeof *r->group.event, by_seq);
}

/* ---- what a ring has to give ---- */

enum peek { PEEK_EMPTY, PEEK_WAIT, PEEK_READY };

/* Notes the slot that reading waits at, and the least number that may still come from the ring. */
static enum peek stall(struct drain *d, struct ring *r, bool written)
{
    if (!r->stalled || r->stalled_at != r->at.position) {
        r->stalled = true;
        r->stalled_at = r->at.position;
        r->stalled_since = d->now_ns;
    }
    r->floor = r->at.seq + 1;
    if (written) {
        uint64_t seq = slot_seq(slot_at(r, r->at.position)[3], r->at.seq);
        if (seq > r->at.seq && !is_overtaken(r, r->at.position + 1, seq))
            r->floor = seq;
    }
    return PEEK_WAIT;
}

/* Whether the slot at `at` has been waited for long enough. */
static bool is_patience_over(struct drain *d, const struct ring *r, bool written)
{
    if (d->final)
        return true;
    if (!r->stalled || r->stalled_at != r->at.position)
        return false;
    uint64_t waited = d->now_ns - r->stalled_since;
    if (d->crowded && written && waited >= PATIENCE_CROWDED_NS)
        return true;
    return waited >= PATIENCE_NS && written_behind(r, r->at.position);
}

/* Moves to the ring's next event; its number goes to next_seq. */
static enum peek peek(struct drain *d, struct ring *r)
{
    if (r->group.count) {
        r->next_seq = r->group.event[r->group.taken].seq;
        return PEEK_READY;
    }
    while (r->at.position < r->head) {
        const uint64_t *slot = slot_at(r, r->at.position);
        uint64_t w0 = load(slot);
        unsigned kind = w0 & 63;
        if (!is_written(r, r->at.position, w0)) {
            if (!is_patience_over(d, r, false))
                return stall(d, r, false);
            pass_unwritten(d, r);
            continue;
        }
        if (kind == HL_TIME) {
            r->at.tick = slot[1];
            if (slot[2] && slot[2] <= d->limit)
                r->at.seq = slot[2] - 1; /* the next event may have that very number */
            ring_switch(d, r, (uint32_t)slot[3]);
            r->at.position++;
            continue;
        }
        if (!slot_is_known(kind)) {
            d->totals.damaged += kind < HL_TIME;
            r->at.position++;
            continue;
        }
        r->is_open = !(w0 & W0_DONE);
        if (r->is_open && !is_patience_over(d, r, true))
            return stall(d, r, true);
        r->stalled = false;
        r->next_seq = slot_seq(slot[3], r->at.seq);
        if (unlikely(is_overtaken(r, r->at.position + 1, r->next_seq))) {
            gather(d, r);
            if (r->group.count)
                r->next_seq = r->group.event[0].seq;
        }
        return PEEK_READY;
    }
    r->stalled = false;
    return PEEK_EMPTY;
}

/* The owner of this slot will still write to it: it must not get it back before. */
static void note_open(struct drain *d, struct ring *r, uint64_t position)
{
    if (d->open_count == d->open_room) {
        size_t room = d->open_room ? d->open_room * 2 : 16;
        struct token_open *open = realloc(d->open, room * sizeof *open);
        if (!open)
            return;
        d->open = open;
        d->open_room = room;
    }
    d->open[d->open_count++] = (struct token_open){r, position};
}

static void take_event(struct drain *d, struct ring *r, const struct codec_event *event)
{
    if (!is_possible(d, event->seq))
        return;
    struct codec_event *e = &d->batch[d->batch_count];
    *e = *event;
    batch_take(d, e);
    d->totals.last_ns = e->time > d->totals.last_ns ? e->time : d->totals.last_ns;
    thread_event(d, r, e);
}

/* Events of the ring's group that are below `bound`. */
static void run_group(struct drain *d, struct ring *r, uint64_t bound)
{
    while (r->group.taken < r->group.count && r->group.event[r->group.taken].seq < bound && make_room(d))
        take_event(d, r, &r->group.event[r->group.taken++]);
    if (r->group.taken == r->group.count) {
        r->at = r->group.end;
        r->group.count = 0;
    }
}

/* The one event at r->at, whatever it is. */
static void run_one(struct drain *d, struct ring *r)
{
    struct codec_event e;
    uint64_t position = r->at.position;
    bool open = r->is_open;
    read_event(d, r, &r->at, open, &e);
    if (open && !d->final)
        note_open(d, r, position);
    take_event(d, r, &e);
}

/* What run_plain found: kept apart so that it lies in registers meanwhile. */
struct found { uint64_t first_ns, last_ns, returned; };

/* Events from `first` up to batch_count were taken. */
static void note_found(struct drain *d, size_t first, const struct found *f)
{
    size_t count = d->batch_count - first;
    if (!count)
        return;
    if (d->first_seq == 0) {
        d->first_seq = d->batch[first].seq;
        d->first_ns = f->first_ns;
        d->block_ns = f->last_ns;
    }
    d->first_ns = f->first_ns < d->first_ns ? f->first_ns : d->first_ns;
    d->block_ns = f->last_ns > d->block_ns ? f->last_ns : d->block_ns;
    d->totals.last_ns = f->last_ns > d->totals.last_ns ? f->last_ns : d->totals.last_ns;
    d->totals.last_seq = d->batch[d->batch_count - 1].seq;
    d->totals.events += count;
    d->totals.returned += f->returned;
}

/* Plain events below `bound`, as long as there are and the batch has room; most events of most programs. */
static void run_plain(struct drain *d, struct ring *r, uint64_t bound)
{
    uint64_t mask = r->capacity - 1, head = r->head;
    const uint64_t capacity = r->capacity, *slots = r->slots;
    if (unlikely(r->at.position < r->spilled)) { /* as far as its segment goes; whole events lie in one */
        const struct segment *s = r->segment;
        while (s->end <= r->at.position)
            s = s->next;
        mask = ~0ull;
        slots = s->slots - s->first * SLOT_WORDS;
        head = s->end < head ? s->end : head;
    }
    const uint32_t thread = r->owner ? r->owner->row.number : 0, nodes = d->nodes;
    const uint64_t limit = d->limit, written = d->written;
    const size_t first = d->batch_count;
    struct codec_event *e = &d->batch[first], *end = &d->batch[d->batch_room];
    struct found f = {UINT64_MAX, 0, 0};
    struct cursor at = r->at;
    uint64_t last_seq = d->totals.last_seq, known_tick = 0, ns = 0, w0 = 0, w3 = 0;
    bool is_known = false; /* `ns` is the time of known_tick, and in `f` */
    if (at.position < head) {
        const uint64_t *slot = slots + (at.position & mask) * SLOT_WORDS;
        w0 = load(slot);
        w3 = slot[3];
    }
    while (at.position < head && e < end) {
        const uint64_t *slot = slots + (at.position & mask) * SLOT_WORDS;
        if (unlikely((w0 & (W0_LAP | W0_DONE)) != (slot_lap(at.position, capacity) | W0_DONE)))
            break;
        uint64_t w1 = slot[1], w2 = slot[2], seq = slot_seq(w3, at.seq), next = at.position + 1;
        if (unlikely(!slot_is_plain(w0, w1)) || seq >= bound)
            break; /* threads' ends and the like: run_one */
        __builtin_prefetch(slots + ((at.position + AHEAD) & mask) * SLOT_WORDS);
        slot_decode(e, w0, w1, w2, seq);
        if (w0 & W0_MORE && next < head) {
            const uint64_t *ext = slots + (next & mask) * SLOT_WORDS;
            if ((ext[0] & 63) == HL_EXT) {
                slot_extend(e, ext, w2);
                next++;
                if (ext[0] & W0_MORE && next < head) {
                    ext = slots + (next & mask) * SLOT_WORDS;
                    if ((ext[0] & 63) == HL_EXT) {
                        e->word = ext[1];
                        next++;
                    }
                }
            }
        }
        uint64_t tick = slot_tick(w3, at.tick);
        if (likely(next < head)) {
            slot = slots + (next & mask) * SLOT_WORDS;
            w0 = load(slot);
            w3 = slot[3];
            if (unlikely((w0 & 63) >= HL_TIME ? is_overtaken(r, next, seq)
                                              : (w0 & W0_LAP) == slot_lap(next, capacity) &&
                                                    (int64_t)(slot_seq(w3, seq) - seq) < 0))
                break;
        }
        at.position = next;
        at.seq = seq;
        at.tick = tick;
        if (unlikely(seq <= last_seq || seq >= limit)) { /* as is_possible has it */
            d->totals.damaged += seq > written;
            continue;
        }
        last_seq = seq;
        if (tick != known_tick || !is_known) {
            is_known = true;
            known_tick = tick;
            ns = time_of(d, tick);
            f.first_ns = ns < f.first_ns ? ns : f.first_ns;
            f.last_ns = ns > f.last_ns ? ns : f.last_ns;
        }
        if (unlikely(e->stack >= nodes)) {
            d->totals.damaged += e->stack != 0;
            e->stack = 0;
        }
        f.returned += e->seq_exit != 0;
        e->thread = thread;
        e->time = ns;
        e++;
    }
    d->batch_count = (size_t)(e - d->batch);
    note_found(d, first, &f);
    r->at = at;
}

static void run_ring(struct drain *d, struct ring *r, uint64_t bound)
{
    if (unlikely(r->group.count)) {
        run_group(d, r, bound);
        return;
    }
    uint64_t before = r->at.position;
    if (likely(!r->is_open && r->owner && r->owner->row.started)) {
        do
            run_plain(d, r, bound);
        while (!has_room(d) && make_room(d));
    }
    if (r->at.position == before && make_room(d))
        run_one(d, r);
}

/* ---- the merge ---- */

static void heap_down(struct drain *d, uint32_t at)
{
    struct ring **heap = d->heap, *r = heap[at];
    for (;;) {
        uint32_t child = at * 2 + 1;
        if (child >= d->heap_count)
            break;
        if (child + 1 < d->heap_count && heap[child + 1]->next_seq < heap[child]->next_seq)
            child++;
        if (r->next_seq <= heap[child]->next_seq)
            break;
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = r;
}

/* The smallest number behind the first ring's. */
static uint64_t heap_second(const struct drain *d)
{
    uint64_t second = UINT64_MAX;
    for (uint32_t i = 1; i < 3 && i < d->heap_count; i++)
        second = d->heap[i]->next_seq < second ? d->heap[i]->next_seq : second;
    return second;
}

/* What lies in a ring is at most its capacity; a damaged header may claim anything. */
static void bound_head(struct ring *r)
{
    uint64_t base = r->at.position > r->spilled ? r->at.position : r->spilled, tail = r->page->tail;
    if (likely(r->head - base <= r->capacity))
        return;
    if (tail > base && r->head - tail <= r->capacity)
        r->at.position = tail; /* copies of what was in between are gone (recovery): it is lost */
    else
        r->head = r->head < base ? base : base + r->capacity;
}

/* Reads the heads and fills the heap; returns the number below which events can be taken. */
static uint64_t look_at_rings(struct drain *d)
{
    d->limit = load(&d->control->seq);
    find_rings(d);
    uint64_t bound = d->final ? UINT64_MAX : d->limit;
    d->heap_count = 0;
    d->crowded = false;
    for (uint32_t i = 0; i < d->ring_count; i++) {
        struct ring *r = d->ring[i];
        if (!r)
            continue;
        r->head = load(&r->page->head);
        ring_note_owner(d, r);
        if (d->final)
            ring_note_name(d, r);
        bound_head(r);
        d->crowded |= r->head - r->page->tail > r->capacity / 2;
    }
    d->nodes = load32(&d->control->nodes);
    if (d->final)
        d->limit = load(&d->control->seq); /* it may run on untraced: what was recorded meanwhile counts */
    for (uint32_t i = 0; i < d->ring_count; i++) {
        struct ring *r = d->ring[i];
        if (!r || (r->head == r->at.position && !r->group.count))
            continue;
        enum peek found = peek(d, r);
        if (found == PEEK_READY)
            d->heap[d->heap_count++] = r;
        else if (found == PEEK_WAIT)
            bound = r->floor < bound ? r->floor : bound;
    }
    for (uint32_t i = d->heap_count; i-- > 0;)
        heap_down(d, i);
    return bound;
}

enum drain_state drain_run(struct drain *d, const struct drain_clock *clock, uint64_t now_ns, bool final)
{
    d->clock = *clock;
    d->clock_tick = ~0ull;
    d->now_ns = now_ns;
    d->final = final;
    look_at_tails(d);
    uint64_t bound = look_at_rings(d);
    flush_batch(d);
    while (d->heap_count && make_room(d)) {
        struct ring *r = d->heap[0];
        if (r->next_seq >= bound)
            break;
        uint64_t second = heap_second(d), before = r->at.position;
        second = second > r->next_seq ? second : r->next_seq + 1; /* a number used twice (damage) is taken from both */
        run_ring(d, r, second < bound ? second : bound);
        d->totals.slots += r->at.position - before;
        enum peek found = peek(d, r);
        if (found == PEEK_WAIT)
            bound = r->floor < bound ? r->floor : bound;
        if (found != PEEK_READY && --d->heap_count)
            d->heap[0] = d->heap[d->heap_count];
        if (d->heap_count)
            heap_down(d, 0);
    }
    flush_batch(d);
    return d->batch_room ? DRAIN_IDLE : DRAIN_FULL;
}

uint64_t drain_slots(const struct drain *d) { return d->totals.slots; }

size_t drain_pending(const struct drain *d) { return codec_count(d->encoder); }

double drain_used(const struct drain *d)
{
    double used = 0;
    for (uint32_t i = 0; i < d->ring_count; i++) {
        const struct ring *r = d->ring[i];
        double share = r ? (double)(load(&r->page->head) - load(&r->page->tail)) / (double)r->capacity : 0;
        used = share > used ? share : used;
    }
    return used;
}

void drain_fill(struct drain *d, double *used, double *fresh)
{
    *used = drain_used(d);
    *fresh = 0;
    for (uint32_t i = 0; i < d->ring_count; i++) {
        struct ring *r = d->ring[i];
        if (!r)
            continue;
        uint64_t head = load(&r->page->head);
        double share = (double)(head - r->head_before) / (double)r->capacity;
        *fresh = share > *fresh ? share : *fresh;
        r->head_before = head;
    }
}

void drain_get_totals(const struct drain *d, struct drain_totals *totals)
{
    *totals = d->totals;
    totals->spilling_bytes = d->spilling;
}

struct hl_control *drain_control(struct drain *d) { return d->control; }

/* ---- blocks, and the slots they hold ---- */

struct drain_token *drain_finish(struct drain *d, struct drain_block *block)
{
    size_t rings = 0;
    for (uint32_t i = 0; i < d->ring_count; i++)
        rings += d->ring[i] && d->ring[i]->at.position != d->ring[i]->marked;
    struct drain_token *t = malloc(sizeof *t + rings * sizeof *t->ring);
    if (!t)
        return NULL;
    t->ring_count = 0;
    for (uint32_t i = 0; i < d->ring_count; i++) {
        struct ring *r = d->ring[i];
        if (!r || r->at.position == r->marked)
            continue;
        t->ring[t->ring_count++] = (struct token_ring){r, r->at, r->owner ? r->owner->row.number : 0};
        r->marked = r->at.position;
    }
    t->open = d->open;
    t->open_count = d->open_count;
    d->open = NULL;
    d->open_count = d->open_room = 0;
    block->count = codec_count(d->encoder);
    block->first_seq = d->first_seq;
    block->last_seq = d->totals.last_seq;
    block->first_ns = d->first_ns;
    block->last_ns = d->block_ns;
    block->streams = codec_finish(d->encoder, block->stream);
    d->first_seq = 0;
    return t;
}
