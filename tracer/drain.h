/*
 * drain.h: from the rings of one process image to blocks of encoded events, in one pass.
 *
 *   ring slots ──decode──▶ struct codec_event ──merge by seq──▶ codec_push ──▶ (block full) streams
 *
 * Slots are read where they lie (preload/spool.h draws them; spill.c those that were copied to disk). Nothing is kept
 * of an event but its place in the encoder, so the rings stay the durable store of all that is not in the trace file: a
 * ring's `tail` moves only when the block that holds the events below it was committed (drain_commit).
 *
 * Order. Sequence numbers come from one counter of the process, events lie in per-thread rings. control.seq = S is read
 * before the heads of the rings, so every event with a smaller number lies below a head: all that is smaller than S
 * and than the call in progress a ring waits at can be merged and encoded. In one ring numbers ascend, except where
 * a signal handler ran between the reservation of an event's slot and the taking of its number; such a group is
 * sorted.
 *
 * One thread calls everything but drain_commit, which another may.
 */
#ifndef HEAPLEDGER_DRAIN_H
#define HEAPLEDGER_DRAIN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../preload/spool.h"
#include "../src/heapledger/store/codec.h"

/* What a ring or a control page may at most claim: a damaged header must not make us take memory. */
enum { DRAIN_RINGS_MAX = 1 << 16, DRAIN_SLOTS_MAX = 1 << 24 };

/* Ticks of the shim to ns since the session began. */
struct drain_clock {
    uint64_t start_tsc;
    unsigned tick_shift;
    double ns_per_cycle, offset_ns; /* of start_tsc; may be negative */
};

/* What is known of a thread that recorded; a row of `thread`. */
struct drain_thread {
    uint32_t number, tid;
    uint64_t thread_pointer, stack_low, stack_high;
    uint64_t start_ns, end_ns; /* valid where started, ended */
    char name[16];
    bool described; /* tid and what follows it are known */
    bool named;     /* the name is known */
    bool started, ended;
};

/* The block that drain_finish ended. */
struct drain_block {
    size_t count, streams;
    uint64_t first_seq, last_seq, first_ns, last_ns;
    struct codec_stream stream[CODEC_STREAMS_MAX];
};

/* Sums over all events pushed so far. */
struct drain_totals {
    uint64_t events, returned; /* returned: those with an exit number */
    uint64_t damaged;          /* slots and events that cannot be */
    uint64_t unmade;           /* calls that have a number, and were cut off by the end before they were written down or made */
    uint64_t last_seq, last_ns;
    uint64_t slots;            /* read */
    uint64_t spilled_bytes;    /* ever */
    uint64_t spilling_bytes;   /* now */
};

enum drain_state {
    DRAIN_IDLE, /* nothing more can be encoded now */
    DRAIN_FULL  /* the block is full: drain_finish, then go on */
};

struct drain;

/*
 * The image in `folder`. NULL and errno: no control page, no memory. `trust_tail`: rings are read from their tails on;
 * else from their beginning, where they were never filled up (a recovery that has no trace file to go on with).
 * Events up to number `written` are in the trace file already and are skipped.
 */
struct drain *drain_new(const char *folder, bool trust_tail, uint64_t written);
void drain_free(struct drain *);

/*
 * One look at the rings. `final`: the process is dead, nothing is waited for. A call in progress is waited for as long
 * as nothing lies behind it in its ring, and for `patience_ns` from then on; shorter where a ring is getting full.
 */
enum drain_state drain_run(struct drain *, const struct drain_clock *, uint64_t now_ns, bool final);

/* Events in the block so far. */
size_t drain_pending(const struct drain *);

/* Slots read so far. */
uint64_t drain_slots(const struct drain *);

/* The share of its slots that the fullest ring has in use now: those that are not committed (or spilled). */
double drain_used(const struct drain *);

/* The same in `*used`; `*fresh`: the largest share that one ring got since the call before. */
void drain_fill(struct drain *, double *used, double *fresh);

/*
 * Ends the block. `token` has to be committed (drain_commit), in the order of the blocks, when the block is safe; NULL:
 * no memory, nothing was done. The streams are valid until the next drain_run.
 */
struct drain_token;
struct drain_token *drain_finish(struct drain *, struct drain_block *);

/* The events of that block are in the trace file: their slots go back to their owners. Any thread. Frees the token. */
void drain_commit(struct drain *, struct drain_token *);

/* Frees a token whose block was never written. */
void drain_token_free(struct drain_token *);

/*
 * Where the encoder is behind: copies the slots of rings that have at least this share in use to files PREFIX.*
 * (drain_spill.c), as long as there are fewer than `limit` bytes in them, and makes room in the rings. False: nothing was
 * copied. They are read from there later, in their order.
 */
bool drain_spill(struct drain *, double least, uint64_t limit);
int drain_set_spill(struct drain *, const char *prefix); /* 0 or ENOMEM */

/* Before the first drain_run: a file that another collector left, those of a ring in their order. False: it is of no use. */
bool drain_add_segment(struct drain *, const char *path);

/*
 * Gives rings whose owners said goodbye back to the shim, once the kernel says that the thread is gone. What lies in
 * them is read later. Costs a system call a ring that waits for it.
 */
void drain_reap(struct drain *, int pid);

/* The same for an owner that ended without a word (killed): the ring with this thread, if it holds nothing unread. */
void drain_reap_silent(struct drain *, uint32_t thread);

/* Takes the next thread of which something new is known. False: there is none. */
bool drain_next_thread(struct drain *, struct drain_thread *);

/* Takes the number and the error of the next ring that could not be opened. False: there is none. */
bool drain_next_bad_ring(struct drain *, uint32_t *index, const char **why);

void drain_get_totals(const struct drain *, struct drain_totals *);
struct hl_control *drain_control(struct drain *);

#endif
