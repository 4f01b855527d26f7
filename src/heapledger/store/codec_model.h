/* What encoder and decoder of event blocks share: the streams, and what both know of the events so far. See codec.h. */
#ifndef HEAPLEDGER_CODEC_MODEL_H
#define HEAPLEDGER_CODEC_MODEL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* ---- streams */

enum stream {
    CODE,       /* a byte an event: which predictions were right */
    SITE, NEW,  /* sites that were not predicted; sites that were not seen before */
    SIZE, WORD, /* sizes; words at p-8 */
    REF,        /* blocks, as how many blocks ago */
    DEPTH, OLD, /* of a reused block; of realloc's old block */
    FAR,        /* addresses, as distances in 16 bytes */
    ODD, WIDE,  /* fields of rare events; numbers too large elsewhere */
    GAP, TIME,  /* events between two changes of time; the changes */
    LEAP,       /* changes of time that are too large for `time` */
    SEQ, THREAD,
    STREAMS
};

/* Name, bytes a value (0: various), most bytes an event. */
static const struct { const char *name; unsigned width, most; } STREAM[STREAMS] = {
    [CODE] = {"code", 1, 1},   [SITE] = {"site", 2, 2}, [NEW] = {"new", 0, 6},   [SIZE] = {"size", 2, 2},
    [WORD] = {"word", 2, 4},   [REF] = {"ref", 2, 4},   [DEPTH] = {"depth", 1, 1}, [OLD] = {"old", 1, 1},
    [FAR] = {"far", 4, 8},     [ODD] = {"odd", 0, 51},  [WIDE] = {"wide", 8, 48}, [GAP] = {"gap", 1, 2},
    [TIME] = {"time", 2, 2},   [LEAP] = {"leap", 8, 8},   [SEQ] = {"seq", 0, 23},  [THREAD] = {"thread", 0, 8},
};

/* ---- what encoder and decoder both know of the events so far */

enum {
    SITES = 65536, BLOCKS = 65536, LANES = 16, CLASSES = 128, DEPTHS = 8,
    CONTEXT_BITS = 14,
};

/*
 * A code:   7     6      5     4 3 2   1 0
 *           odd   word   size  place   stack      bits 5 to 7: 1 where the field is in its stream
 *
 * stack     which guess it was; 3: none, its site is in `site`
 * odd       other fields of the event are in `odd`: a mask of them, and their differences to the site's last ones
 */
enum { STACK_OTHER = 3, PLACE_SHIFT = 2, SIZE_BIT = 0x20, WORD_BIT = 0x40, ODD_BIT = 0x80 };
enum { ODD_ADDR = 1, ODD_SIZE = 2, ODD_ARG = 4, ODD_ARG2 = 8, ODD_WORD = 16 };

/* Where a new block is. */
enum {
    TOP,       /* where the block was that was freed last, of those of this size that were not taken again */
    SPLIT,     /* behind the last block that did not take the place of another one */
    BEHIND,    /* behind the last block */
    DEEPER,    /* where an earlier one was that was freed: `depth` */
    KNOWN,     /* where any earlier block was: `ref` blocks ago */
    ELSEWHERE, /* `far` */
    SAME,      /* realloc: where it was */
};

/* Which block is released. `old` has this for realloc's old block, and a bit that its word is not as expected. */
enum {
    LIVE,      /* the newest one of the site that the block came from that was released here last */
    STRIDE,    /* as many blocks ago as last time */
    NEWER,     /* the one made after, */
    OLDER,     /* or before the one released last */
    AGO,       /* `ref` blocks ago */
    NONE,      /* a null pointer */
    AWAY,      /* one from before this block of events: `far` */
    NEIGHBOUR, /* the same; it is behind the one released last */
};
enum { OLD_WORD_BIT = 8 };

/* In `site`: a new one, it is in `new`. In `size`, `word` and `time`, in `far`, in gaps: more is to come. */
enum { SITE_NEW = 0xffff, NUMBER_WIDE = 0xffff, GAP_MORE = 0xff };
#define FAR_WIDE 0xffffffffu

/* A kind of call from a stack. 64 bytes. */
struct site {
    uint64_t key;       /* kind << 32 | stack */
    uint16_t next[3];   /* the sites that came after it, latest first */
    uint16_t live;      /* newest block made here that is not known to be freed */
    uint16_t from;      /* where the block was made that was freed here last */
    uint16_t distance;  /* how many blocks ago that was */
    uint16_t pad[2];
    uint64_t addr, size, arg, arg2, word;
};

struct block {
    uint64_t addr, word;
    uint16_t site, older;
    uint8_t pushed, pad[3];
};

/* What is kept of each thread (threads that share a lane only predict worse). */
struct lane {
    uint64_t history; /* the last four sites, latest lowest */
    uint64_t time;
    uint64_t split, behind, away, neighbour;
    uint64_t flags;
    uint16_t freed;
    uint8_t count[CLASSES];
    uint16_t ring[CLASSES][DEPTHS];
};

struct model {
    uint32_t sites, blocks;
    uint64_t far;
    uint64_t time, seq;
    uint32_t thread, stack;
    struct lane lane[LANES];
    uint32_t context[1 << CONTEXT_BITS];
    struct site site[SITES];
    struct block block[BLOCKS];
};

static inline void model_begin(struct model *m)
{
    m->sites = m->blocks = 0;
    m->far = 0;
    m->time = 0, m->seq = 0;
    m->thread = m->stack = 0;
    memset(m->lane, 0, sizeof m->lane);
    memset(m->context, 0, sizeof m->context);
    memset(m->site, 0, sizeof m->site[0]);
    m->site[0].key = ~(uint64_t)0;
    memset(m->block, 0, sizeof m->block[0]);
}

static inline uint64_t mix(uint64_t x) { return x * 0x9E3779B97F4A7C15u; }

static inline uint64_t chunk_of(uint64_t size)
{
    uint64_t chunk = (size + 23) & ~(uint64_t)15;
    return chunk < 32 ? 32 : chunk;
}

static inline unsigned class_of(uint64_t chunk)
{
    uint64_t units = chunk >> 4;
    return units < 64 ? (unsigned)units : 64 + (unsigned)(mix(units) >> 58);
}

static inline uint16_t site_add(struct model *m, uint64_t key)
{
    struct site *s = &m->site[m->sites];
    memset(s, 0, sizeof *s);
    s->key = key;
    return (uint16_t)m->sites++;
}

/* The three sites that may come next, and where the context is kept. */
struct guess { uint16_t site[3]; uint32_t *slot; uint32_t tag; uint16_t *next; };

static inline void find_context(struct model *m, uint64_t history, struct guess *g)
{
    uint64_t h = mix(history);
    g->next = m->site[history & 0xffff].next;
    g->slot = &m->context[h >> (64 - CONTEXT_BITS)];
    g->tag = ((uint32_t)(h >> 16) & 0xffff0000u) | 0x10000u;
}

/* Whether the first guess is this site, because it followed the same four before. */
static inline int context_knows(struct model *m, uint64_t history, uint16_t site, struct guess *g)
{
    find_context(m, history, g);
    return *g->slot == (g->tag | site);
}

static inline void guess_site(struct model *m, uint64_t history, struct guess *g)
{
    find_context(m, history, g);
    const uint16_t *next = g->next;
    uint32_t found = *g->slot;
    uint16_t first = (found & 0xffff0000u) == g->tag ? (uint16_t)found : next[0];
    g->site[0] = first;
    g->site[1] = first == next[0] ? next[1] : next[0];
    g->site[2] = first == next[0] || first == next[1] ? next[2] : next[1];
}

static inline void move_to_front(uint16_t next[3], uint16_t site)
{
    uint16_t first = next[0], second = next[1], third = next[2];
    next[0] = site;
    next[1] = site == first ? second : first;
    next[2] = site == first || site == second ? third : second;
}

static inline void learn_site(const struct guess *g, uint16_t site)
{
    *g->slot = g->tag | site;
    move_to_front(g->next, site);
}

static inline uint16_t block_add(struct model *m, uint64_t addr, uint64_t word, uint16_t site, uint16_t older)
{
    if (!(++m->blocks & 0xffff))
        m->blocks++;
    uint16_t at = (uint16_t)m->blocks;
    struct block *b = &m->block[at];
    b->addr = addr, b->word = word, b->site = site, b->older = older, b->pushed = 0;
    return at;
}

/* Takes the block that was pushed as number `pushed` out of its ring. */
static inline void ring_remove(struct lane *l, unsigned class, uint8_t pushed)
{
    uint16_t *ring = l->ring[class];
    uint8_t count = l->count[class];
    ring[pushed & (DEPTHS - 1)] = 0;
    if ((uint8_t)(pushed + 1) == count) {
        count--;
        for (int i = 0; i < DEPTHS - 1 && !ring[(count - 1) & (DEPTHS - 1)]; i++)
            count--;
        l->count[class] = count;
    }
}

/* Block `x` is freed at site `s`. */
static inline void learn_free(struct model *m, struct lane *l, struct site *s, uint16_t x, uint64_t word)
{
    struct block *b = &m->block[x];
    struct site *owner = &m->site[b->site];
    unsigned class = class_of(word & ~(uint64_t)7);
    uint8_t count = l->count[class]++;

    owner->live = owner->live == x ? b->older : owner->live;
    s->from = b->site;
    s->distance = (uint16_t)(m->blocks - x);
    l->freed = x;
    l->away = b->addr;
    l->neighbour = b->addr + (word & ~(uint64_t)7);
    b->word = word;
    b->pushed = count;
    l->ring[class][count & (DEPTHS - 1)] = x;
}

static inline uint64_t zigzag(uint64_t v) { return (v << 1) ^ (uint64_t)((int64_t)v >> 63); }
static inline uint64_t unzigzag(uint64_t v) { return (v >> 1) ^ (0 - (v & 1)); }

/* Kinds whose result is a block, kinds that release one (store/events.py), all others. */
enum { OTHER, ALLOCATION, RELEASE };
enum { K_REALLOC = 3 };
static const uint8_t CLASS[256] = {[1] = 1, [2] = 1, [3] = 1, [5] = 1, [6] = 1, [7] = 1, [4] = 2};

static inline uint64_t site_key(uint8_t kind, uint32_t stack) { return (uint64_t)kind << 32 | stack; }

/* What seq is expected behind a call that nothing overlaps. */
static inline uint64_t seq_after(uint64_t seq, uint64_t exit) { return (exit > seq ? exit : seq) + 1; }

/* calloc's first argument: its second one hardly ever changes at a site. */
static inline uint64_t expected_arg(const struct site *s, uint64_t size)
{
    return size == s->size || !s->arg || !(s->size / s->arg) ? s->arg : size / (s->size / s->arg);
}

#endif
