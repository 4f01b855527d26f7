/* drain_slots.h: one slot of a ring to one event. The layout is drawn in preload/spool.h. */
#ifndef HEAPLEDGER_DRAIN_SLOTS_H
#define HEAPLEDGER_DRAIN_SLOTS_H

#include "drain.h"

#define SLOT_WORDS 4
#define SLOT_BYTES 32
#define W0_MORE 0x40u
#define W0_LAP 0x80u
#define W0_DONE 0x100u

#define BIT(kind) (1ull << (kind))
/* Kinds of events, and those whose `excess` bits say the word at addr - 8. */
static const uint64_t KNOWN = BIT(HL_MALLOC) | BIT(HL_CALLOC) | BIT(HL_REALLOC) | BIT(HL_FREE) | BIT(HL_MEMALIGN) |
                              BIT(HL_VALLOC) | BIT(HL_PVALLOC) | BIT(HL_MALLOC_TRIM) | BIT(HL_MALLOPT) | BIT(HL_MMAP) |
                              BIT(HL_MUNMAP) | BIT(HL_MREMAP) | BIT(HL_MPROTECT) | BIT(HL_MADVISE) | BIT(HL_BRK) |
                              BIT(HL_SBRK) | BIT(HL_THREAD_START) | BIT(HL_THREAD_END) | BIT(HL_FORK) | BIT(HL_EXEC) |
                              BIT(HL_DLOPEN) | BIT(HL_DLCLOSE) | BIT(HL_EXIT);
static const uint64_t HAS_WORD = BIT(HL_MALLOC) | BIT(HL_CALLOC) | BIT(HL_REALLOC) | BIT(HL_MEMALIGN) | BIT(HL_VALLOC) |
                                 BIT(HL_PVALLOC);

static inline bool slot_is_known(unsigned kind) { return KNOWN >> kind & 1; }
static inline bool slot_has_word(unsigned kind) { return HAS_WORD >> kind & 1; }

/* The low `bits` as a signed number. */
static inline uint64_t widened(uint64_t value, int bits)
{
    return (uint64_t)((int64_t)(value << (64 - bits)) >> (64 - bits));
}

/* The number or tick near `before` that has these low bits. */
static inline uint64_t slot_seq(uint64_t w3, uint64_t before) { return before + widened(w3 - before, 40); }
static inline uint64_t slot_tick(uint64_t w3, uint64_t before) { return before + widened((w3 >> 40) - before, 24); }

/* Bit 7 of a slot that was written in the lap of `position`. */
static inline uint64_t slot_lap(uint64_t position, uint64_t capacity) { return position & capacity ? 0 : W0_LAP; }

/* Whether exit number and word are in an HL_LATE slot. */
static inline bool slot_is_late(uint64_t w0, uint64_t w1)
{
    if ((w0 >> 9 & HL_SPAN_LATE) == HL_SPAN_LATE)
        return true;
    return w1 >> 48 == HL_EXCESS_LATE && w1 << 16 && slot_has_word(w0 & 63);
}

/* Whether this is an event that says nothing of threads or of the process, and has no HL_LATE slot. */
static inline bool slot_is_plain(uint64_t w0, uint64_t w1)
{
    return (KNOWN & (BIT(HL_THREAD_START) - 1)) >> (w0 & 63) & 1 && !slot_is_late(w0, w1);
}

/* All that an event's own slot says, but for thread, time and what HL_EXT and HL_LATE slots add. */
static inline void slot_decode(struct codec_event *e, uint64_t w0, uint64_t w1, uint64_t w2, uint64_t seq)
{
    unsigned kind = w0 & 63;
    uint64_t size = w2 & HL_SIZE_EXT, span = w0 >> 9 & HL_SPAN_LATE;
    e->kind = (uint8_t)kind;
    e->stack = (uint32_t)(w0 >> 32);
    e->seq = seq;
    e->seq_exit = span ? seq + span : 0; /* 0: a call that never returned (its frame was left by longjmp) */
    e->addr = widened(w1, 48);
    e->arg = e->arg2 = 0;
    if (kind == HL_FREE) {
        e->word = size;
        e->size = 0;
        return;
    }
    e->size = size;
    e->word = slot_has_word(kind) && e->addr ? HL_CHUNK(size) + (w1 >> 48) : 0;
    if (kind == HL_CALLOC) {
        e->arg = w2 >> 48;
    } else if (kind == HL_MEMALIGN) {
        e->arg = 1ull << (w2 >> 48 & 63);
        e->arg2 = w2 >> 56;
    }
}

/* What the first HL_EXT slot behind the event brings. */
static inline void slot_extend(struct codec_event *e, const uint64_t *ext, uint64_t w2)
{
    e->arg = ext[1];
    e->arg2 = ext[2];
    if ((w2 & HL_SIZE_EXT) != HL_SIZE_EXT)
        return;
    if (e->kind == HL_FREE) {
        e->word = ext[3];
    } else {
        e->size = ext[3];
        e->word += e->word ? HL_CHUNK(e->size) - HL_CHUNK(HL_SIZE_EXT) : 0;
    }
}

/* A call that was not seen to return has no result. */
static inline void slot_blank_open(struct codec_event *e)
{
    e->seq_exit = 0;
    if (e->kind == HL_FREE)
        return;
    e->word = 0;
    if (slot_has_word(e->kind))
        e->addr = 0;
}

#endif
