/* drain_ring.h: what the parts of the drain share: rings, their owners, and where their slots lie. */
#ifndef HEAPLEDGER_DRAIN_RING_H
#define HEAPLEDGER_DRAIN_RING_H

#include <pthread.h>

#include "drain.h"
#include "drain_slots.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* Events between decoding and encoding: 20 KB stay in the first-level cache. */
enum { DRAIN_BATCH = 256 };

/* A thread that owned a ring; in a ring's queue until its last slot was read, in `changed` until it was told. */
struct owner {
    struct drain_thread row;
    struct owner *next;    /* owner of the same ring after it */
    struct owner *changed; /* in the list of those to be told */
    bool listed, over;
};

/* Slots [first, end) of a ring that were copied to a file; see drain_spill.c. */
struct segment {
    uint64_t first, end;
    const uint64_t *slots;
    void *map;
    size_t bytes;
    char *path;
    struct segment *next;
};

/* Where reading goes on, and what the short fields there are widened against. */
struct cursor {
    uint64_t position, tick, seq;
};

struct ring {
    struct hl_ring *page;
    const uint64_t *slots;
    uint64_t capacity;
    size_t bytes;
    struct cursor at; /* of the first event that was not pushed */
    uint64_t head;    /* as the pass saw it */
    uint64_t head_before, marked;
    uint64_t next_seq; /* of the event at `at` */
    bool is_open;      /* that event is a call in progress, to be taken as it stands */
    bool stalled;
    uint64_t stalled_at, stalled_since;
    uint64_t floor; /* while it is stalled: no event still to come from it has a smaller number */
    struct {        /* a group that was out of order; used up before reading goes on at `end` */
        struct codec_event *event;
        size_t count, taken, room;
        struct cursor end;
    } group;
    uint32_t generation;
    struct owner *owner, *coming; /* of the slot at `at`; of those behind it */
    struct segment *segment; /* the oldest first; each goes on where the one before ends */
    uint64_t spilled;        /* all slots from `at` to here lie in segments; 0: there are none */
    /* under drain.lock */
    struct cursor done; /* all below is committed */
    uint32_t done_thread;
    uint64_t *open; /* positions of calls that were taken in progress */
    size_t open_count, open_room;
};

struct token_ring {
    struct ring *ring;
    struct cursor at;
    uint32_t thread;
};

struct token_open {
    struct ring *ring;
    uint64_t position;
};

struct drain_token {
    struct token_open *open;
    size_t open_count, ring_count;
    struct token_ring ring[];
};

struct drain {
    char *folder, *spill_prefix;
    struct hl_control *control;
    struct codec_encoder *encoder;
    struct ring **ring; /* by number; NULL: cannot be opened */
    uint32_t ring_count, ring_room;
    struct ring **heap; /* rings that have an event to give, the smallest number first */
    uint32_t heap_count;
    uint64_t limit; /* control.seq before the heads were read */
    uint32_t nodes; /* control.nodes after it */
    uint64_t now_ns, written;
    struct drain_clock clock;
    uint64_t clock_tick, clock_ns; /* the last conversion: ticks repeat */
    bool final, crowded, trust_tail;
    struct codec_event batch[DRAIN_BATCH];
    size_t batch_count, batch_room; /* room: no more than the block takes */
    uint64_t first_seq, first_ns, block_ns;
    struct token_open *open; /* taken in progress in this block */
    size_t open_count, open_room;
    struct drain_totals totals;
    struct owner *changed, **changed_end;
    struct {
        uint32_t index;
        const char *why;
    } bad[16];
    uint32_t bad_count;
    uint64_t spilling;    /* bytes in segments now */
    pthread_mutex_t lock; /* tails, and what they depend on */
};

static inline uint64_t load(const uint64_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }
static inline uint32_t load32(const uint32_t *at) { return __atomic_load_n(at, __ATOMIC_ACQUIRE); }

/* A slot in its segment. */
const uint64_t *segment_slot(const struct ring *, uint64_t position);

static inline const uint64_t *slot_at(const struct ring *r, uint64_t position)
{
    if (unlikely(position < r->spilled))
        return segment_slot(r, position);
    return r->slots + (position & (r->capacity - 1)) * SLOT_WORDS;
}

static inline bool is_written(const struct ring *r, uint64_t position, uint64_t w0)
{
    return (w0 & W0_LAP) == slot_lap(position, r->capacity);
}

/* Rings made since the last look. */
void find_rings(struct drain *);

/* A thread has taken the ring since the last look: what its header says, before the next one takes it. */
void ring_note_owner(struct drain *, struct ring *);
/* The ring's last owner may have a name of its own by now: to be called when it is over. */
void ring_note_name(struct drain *, struct ring *);

/* The slots from here on are this thread's. */
void ring_switch(struct drain *, struct ring *, uint32_t number);

/* What an event says about its thread. */
void thread_event(struct drain *, struct ring *, const struct codec_event *);

/* NULL: no memory. */
struct owner *owner_new(uint32_t number);
void owners_free(struct owner *);

/* Gives slots back where calls that were taken in progress have returned meanwhile, and segments that are committed. */
void look_at_tails(struct drain *);

/* Under drain.lock: the tail as far as everything below is committed or in segments, and nobody will write to it. */
void ring_release(struct ring *);

/* The whole file, shared and writable; NULL and *why. */
void *map_file(const char *path, size_t least, size_t *bytes, const char **why);

/* Forgets the ring's segments; the files of those that are committed go. Under drain.lock, by the reading thread. */
void segments_drop(struct drain *, struct ring *, bool all);

#endif
