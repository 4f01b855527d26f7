/*
 * sample.h: which allocations are recorded when only a sample is (HEAPLEDGER_OPTIONS sample=BYTES).
 *
 * Poisson by bytes: points lie on the line of all bytes that a thread requests, at distances drawn from the exponential
 * distribution with mean BYTES; an allocation with a point in it is recorded, as in a full capture. So a block of s bytes is in the
 * trace with probability p = 1 - exp(-s/BYTES), whatever came before it, and stands for 1/p blocks of its kind. A block of no bytes
 * never is. The distribution has no memory: behind a sampled block, however large, the next distance is drawn anew.
 * The blocks that were sampled are kept in a set of addresses, so that free knows them.
 */
#ifndef HEAPLEDGER_SAMPLE_H
#define HEAPLEDGER_SAMPLE_H

#include "host.h"

enum hl_capture {
    HL_CAPTURE_ALL = 0,    /* also where nothing is recorded */
    HL_CAPTURE_SAMPLE = 1, /* the allocator's calls by sample.h, all others as ever */
    HL_CAPTURE_NEW = 2     /* the environment was not read yet */
};

extern HL_HIDDEN uint8_t hl_capture;

/* Bytes that this thread may request before the next point. */
extern HL_HIDDEN __thread uint64_t hl_sample_left;

/*
 * The set of sampled blocks that are alive. Buckets of one cache line; a counter for each sixteenth of a bucket's addresses
 * says in one load that a block is not there. Lock-free: slots change from 0 to an address and back by compare-and-swap.
 * When a bucket is full a set four times as large is put in front, and the smaller ones stay behind it.
 */
struct sample_set {
    struct sample_set *older;
    uint8_t *counters; /* sticky at 255 */
    uint64_t (*buckets)[8];
    uint32_t shift; /* of a hash to a counter's number; 4 more to a bucket's */
};

extern HL_HIDDEN struct sample_set *hl_samples;

static inline uint64_t sample_hash(const void *block)
{
    return ((uint64_t)block >> 4) * 0x9e3779b97f4a7c15ull;
}

/* False: the block was not sampled. True: perhaps it was. */
static inline bool sample_maybe(const void *block)
{
    uint64_t hash = sample_hash(block);
    for (const struct sample_set *set = __atomic_load_n(&hl_samples, __ATOMIC_ACQUIRE); set; set = set->older)
        if (unlikely(__atomic_load_n(&set->counters[hash >> set->shift], __ATOMIC_RELAXED)))
            return true;
    return false;
}

/* Counts an allocation. True: it has no point in it. False: ask sample_take. */
static inline bool sample_passes(uint64_t size)
{
    uint64_t left = hl_sample_left;
    if (unlikely(size > left))
        return false;
    hl_sample_left = left - size;
    return true;
}

/* For an allocation of more than hl_sample_left bytes: whether it is to be recorded. (Not when it is a thread's first one.) */
bool sample_take(uint64_t size);

/* The mean distance in bytes, above 0; and what the random numbers begin with, 0: something else each time. Once. */
void sample_init(uint64_t mean_bytes, uint64_t seed);

/* In a fork child: its random numbers must not be its parent's. */
void sample_fork_child(void);

/* Adds a block that was recorded. Without memory for it its free will not be recorded. Async-signal-safe, any thread. */
void sample_add(const void *block);

/* Whether this thread requested nothing since it was given this sampled block (blocks of no bytes aside), for HL_FREE. */
enum sample_age { SAMPLE_TEMPORARY = 1, SAMPLE_OLDER = 2 };
enum sample_age sample_age(const void *block);

/* Takes a block out that is about to be freed. False: it was not sampled. Async-signal-safe, any thread. */
bool sample_remove(const void *block);

#endif
