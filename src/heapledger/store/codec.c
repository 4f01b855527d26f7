/* The encoder of event blocks; see codec.h, and docs/trace-file.md for the layout with an example. */
#include "codec.h"

#include <stdlib.h>
#include <string.h>

#include "codec_model.h"

enum {
    BATCH = 128,       /* events that go through one step before the next: their sites and codes stay in the L1 cache */
    SITE_BITS = 14,    /* of a table of sites by stack; a site that another one displaced counts as new */
    ADDRESS_BITS = 15, /* of a table of blocks by address */
    SLACK = 64,        /* bytes behind a stream: a value that is not kept is written there */
};

struct codec_encoder {
    size_t count;
    int finished;
    size_t time_at, seq_at, thread_at; /* the event that the last value of this stream was for */
    /* Ends of the streams. Those of wide values have their type, so that the compiler need not fear aliases. */
    uint8_t *code, *new, *depth, *old, *odd, *gap, *seq, *thread;
    uint16_t *site, *size, *word, *ref, *time;
    uint32_t *far;
    uint64_t *wide, *leap;
    uint8_t *begin[STREAMS];
    uint8_t *planes;
    uint16_t by_key[1 << SITE_BITS];
    uint16_t by_address[1 << ADDRESS_BITS];
    struct model m;
    uint8_t data[];
};

static void begin(struct codec_encoder *e)
{
    e->count = 0;
    e->finished = 0;
    e->time_at = e->seq_at = e->thread_at = 0;
    e->code = e->begin[CODE], e->new = e->begin[NEW], e->depth = e->begin[DEPTH], e->old = e->begin[OLD];
    e->odd = e->begin[ODD], e->gap = e->begin[GAP], e->seq = e->begin[SEQ], e->thread = e->begin[THREAD];
    e->site = (uint16_t *)e->begin[SITE], e->size = (uint16_t *)e->begin[SIZE], e->word = (uint16_t *)e->begin[WORD];
    e->ref = (uint16_t *)e->begin[REF], e->time = (uint16_t *)e->begin[TIME];
    e->far = (uint32_t *)e->begin[FAR], e->wide = (uint64_t *)e->begin[WIDE];
    e->leap = (uint64_t *)e->begin[LEAP];
    memset(e->by_key, 0, sizeof e->by_key);
    memset(e->by_address, 0, sizeof e->by_address);
    model_begin(&e->m);
}

/* Memory that is never touched is never taken: a block of ordinary events uses a tenth of it. */
struct codec_encoder *codec_encoder_new(void)
{
    size_t total = 0;
    for (int s = 0; s < STREAMS; s++)
        total += (size_t)STREAM[s].most * CODEC_BLOCK_EVENTS + SLACK;
    struct codec_encoder *e = malloc(sizeof *e + 2 * total);
    if (!e)
        return NULL;
    uint8_t *at = e->data + (-(uintptr_t)e->data & 7);
    for (int s = 0; s < STREAMS; s++) {
        e->begin[s] = at;
        at += (size_t)STREAM[s].most * CODEC_BLOCK_EVENTS + SLACK;
    }
    e->planes = at;
    begin(e);
    return e;
}

void codec_encoder_free(struct codec_encoder *e) { free(e); }

static uint8_t *put_varint(uint8_t *at, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        *at++ = (uint8_t)(v | 0x80);
    *at++ = (uint8_t)v;
    return at;
}

static uint8_t *put_gap(uint8_t *at, size_t gap)
{
    for (; gap >= GAP_MORE; gap -= GAP_MORE)
        *at++ = GAP_MORE;
    *at++ = (uint8_t)gap;
    return at;
}

/* Writes a number, and moves the end behind it only if `kept`: no branch where there is nothing to predict. */
static inline uint16_t *put_number(uint16_t *at, uint64_t **wide, uint64_t v, int kept)
{
    int fits = v < NUMBER_WIDE;
    *at = fits ? (uint16_t)v : NUMBER_WIDE;
    if (__builtin_expect((!fits) & kept, 0))
        *(*wide)++ = v;
    return at + kept;
}

/* ---- clock: thread, time, seq */

static void put_thread(struct codec_encoder *e, size_t now, uint32_t thread)
{
    e->thread = put_gap(e->thread, now - e->thread_at);
    e->thread = put_varint(e->thread, thread);
    e->thread_at = now;
    e->m.thread = thread;
}

static void put_seq(struct codec_encoder *e, size_t now, const struct codec_event *v)
{
    e->seq = put_gap(e->seq, now - e->seq_at);
    e->seq = put_varint(e->seq, zigzag(v->seq - e->m.seq));
    e->seq = put_varint(e->seq, zigzag(v->seq_exit - v->seq - 1));
    e->seq_at = now;
}

static void put_time(struct codec_encoder *e, size_t now, uint64_t time)
{
    e->gap = put_gap(e->gap, now - e->time_at);
    e->time = put_number(e->time, &e->leap, zigzag(time - e->m.time), 1);
    e->time_at = now;
    e->m.time = time;
}

/* One event whose clock is not quite as expected. Returns the lane of its thread. */
static struct lane *push_clock_odd(struct codec_encoder *e, size_t now, const struct codec_event *v)
{
    struct model *m = &e->m;
    struct lane *l = &m->lane[v->thread & (LANES - 1)];

    if (v->thread != m->thread)
        put_thread(e, now, v->thread);
    if (v->time != l->time) {
        put_time(e, now, v->time);
        l->time = v->time;
    }
    if (v->seq != m->seq || v->seq_exit != v->seq + 1)
        put_seq(e, now, v);
    m->seq = seq_after(v->seq, v->seq_exit);
    return l;
}

static void push_clock(struct codec_encoder *e, const struct codec_event *v, size_t count)
{
    struct model *m = &e->m;
    const struct lane *l = &m->lane[m->thread & (LANES - 1)];
    uint64_t time = l->time, next = m->seq;
    uint32_t thread = m->thread;

    for (size_t i = 0; i < count; i++, v++) {
        uint64_t differs = (v->time ^ time) | (v->thread ^ thread) | (v->seq ^ next) | (v->seq_exit ^ (next + 1));
        next += 2;
        if (differs) {
            m->seq = next - 2;
            time = push_clock_odd(e, e->count + i, v)->time;
            thread = v->thread, next = m->seq;
        }
    }
    m->seq = next;
}

/* ---- sites */

static void put_new(struct codec_encoder *e, const struct codec_event *v)
{
    e->new = put_varint(e->new, zigzag((uint64_t)v->stack - e->m.stack));
    *e->new++ = v->kind;
    e->m.stack = v->stack;
}

/* The site of each event; `code` gets STACK_OTHER where it is new, else 0. */
static void find_sites(struct codec_encoder *e, const struct codec_event *v, size_t count, uint16_t site[BATCH],
                       uint8_t code[BATCH])
{
    struct model *m = &e->m;
    for (size_t i = 0; i < count; i++, v++) {
        uint64_t key = site_key(v->kind, v->stack);
        uint16_t *slot = &e->by_key[mix(key) >> (64 - SITE_BITS)];
        uint16_t at = *slot;
        int is_new = m->site[at].key != key;
        if (__builtin_expect(is_new, 0)) {
            *slot = at = site_add(m, key);
            put_new(e, v);
        }
        site[i] = at;
        code[i] = is_new ? STACK_OTHER : 0;
    }
}

static void push_sites(struct codec_encoder *e, const struct codec_event *v, size_t count, const uint16_t site[BATCH],
                       uint8_t code[BATCH])
{
    struct model *m = &e->m;
    uint16_t *out = e->site;
    for (size_t i = 0; i < count; i++) {
        struct lane *l = &m->lane[v[i].thread & (LANES - 1)];
        uint16_t at = site[i];
        struct guess g;
        unsigned rank = STACK_OTHER, is_new = code[i];

        if (__builtin_expect(context_knows(m, l->history, at, &g), 1)) {
            /* What the general way comes to, where the first guess is right and nothing is to be learnt. */
            if (g.next[0] != at)
                move_to_front(g.next, at);
            code[i] = 0;
            l->history = l->history << 16 | at;
            continue;
        }
        guess_site(m, l->history, &g);
        rank = at == g.site[2] ? 2 : rank;
        rank = at == g.site[1] ? 1 : rank;
        rank = at == g.site[0] ? 0 : rank;
        rank |= is_new;
        *out = is_new ? SITE_NEW : at;
        out += rank == STACK_OTHER;
        code[i] = (uint8_t)rank;
        learn_site(&g, at);
        l->history = l->history << 16 | at;
    }
    e->site = out;
}

/* ---- values: addr, size, arg, arg2, word */

static inline unsigned address_slot(uint64_t addr) { return (unsigned)(mix(addr) >> (64 - ADDRESS_BITS)); }

/* The latest block at an address; 0: none that is remembered. */
static inline uint16_t block_find(const struct codec_encoder *e, uint64_t addr)
{
    uint16_t x = e->by_address[address_slot(addr)];
    return e->m.block[x].addr == addr ? x : 0;
}

static inline void block_remember(struct codec_encoder *e, uint64_t addr, uint16_t x)
{
    e->by_address[address_slot(addr)] = x;
}

static void put_far(struct codec_encoder *e, uint64_t base, uint64_t addr)
{
    uint64_t d = addr - base, z = zigzag((uint64_t)((int64_t)d >> 4));
    int fits = !(d & 15) && z < FAR_WIDE;
    *e->far++ = fits ? (uint32_t)z : FAR_WIDE;
    if (!fits)
        *e->wide++ = addr;
}

static void put_odd(struct codec_encoder *e, const struct codec_event *v, struct site *s, unsigned mask)
{
    uint8_t *at = e->odd;
    *at++ = (uint8_t)mask;
    if (mask & ODD_ADDR)
        at = put_varint(at, zigzag(v->addr - s->addr)), s->addr = v->addr;
    if (mask & ODD_SIZE)
        at = put_varint(at, zigzag(v->size - s->size)), s->size = v->size;
    if (mask & ODD_ARG)
        at = put_varint(at, zigzag(v->arg - s->arg)), s->arg = v->arg;
    if (mask & ODD_ARG2)
        at = put_varint(at, zigzag(v->arg2 - s->arg2)), s->arg2 = v->arg2;
    if (mask & ODD_WORD)
        at = put_varint(at, zigzag(v->word - s->word)), s->word = v->word;
    e->odd = at;
}

static unsigned push_other(struct codec_encoder *e, const struct codec_event *v, struct site *s)
{
    unsigned mask = (v->addr != s->addr ? ODD_ADDR : 0) | (v->size != s->size ? ODD_SIZE : 0) |
                    (v->arg != s->arg ? ODD_ARG : 0) | (v->arg2 != s->arg2 ? ODD_ARG2 : 0) |
                    (v->word != s->word ? ODD_WORD : 0);
    if (!mask)
        return 0;
    put_odd(e, v, s, mask);
    return ODD_BIT;
}

/* The place of a block that is released at site `s`; `*found` is its number, 0 for a null pointer. */
static inline unsigned place_released(struct codec_encoder *e, struct site *s, struct lane *l, uint64_t addr,
                                      uint64_t last_word, uint16_t *found)
{
    struct model *m = &e->m;
    uint16_t now = (uint16_t)m->blocks, x = block_find(e, addr);
    unsigned place;

    if (__builtin_expect(x != 0, 1)) {
        place = AGO;
        place = x == (uint16_t)(l->freed - 1) ? OLDER : place;
        place = x == (uint16_t)(l->freed + 1) ? NEWER : place;
        place = x == (uint16_t)(now - s->distance) ? STRIDE : place;
        place = x == m->site[s->from].live ? LIVE : place;
        *e->ref = (uint16_t)(now - x);
        e->ref += place == AGO;
    } else if (!addr) {
        place = NONE;
    } else {
        place = addr == l->neighbour ? NEIGHBOUR : AWAY;
        if (place == AWAY)
            put_far(e, l->away, addr);
        x = block_add(m, addr, last_word, 0, 0);
        block_remember(e, addr, x);
    }
    *found = x;
    return place;
}

static inline unsigned push_free(struct codec_encoder *e, const struct codec_event *v, struct site *s, struct lane *l)
{
    struct model *m = &e->m;
    unsigned code = 0;
    uint16_t x;

    if (__builtin_expect((v->size ^ s->size) | (v->arg ^ s->arg) | (v->arg2 ^ s->arg2), 0)) {
        put_odd(e, v, s, ODD_SIZE | ODD_ARG | ODD_ARG2);
        code = ODD_BIT;
    }
    code |= place_released(e, s, l, v->addr, s->word, &x) << PLACE_SHIFT;
    int differs = v->word != m->block[x].word;
    e->word = put_number(e->word, &e->wide, v->word, differs);
    code |= differs ? WORD_BIT : 0;
    if (x) {
        s->word = v->word;
        learn_free(m, l, s, x, v->word);
    }
    return code;
}

/* The block that realloc releases. Its place has a stream of its own: it is one event with two addresses. */
static void push_old(struct codec_encoder *e, const struct codec_event *v, struct site *s, struct lane *l)
{
    struct model *m = &e->m;
    uint16_t x;
    unsigned code = place_released(e, s, l, v->arg, s->arg2, &x);
    int differs = v->arg2 != m->block[x].word;

    e->word = put_number(e->word, &e->wide, v->arg2, differs);
    *e->old++ = (uint8_t)(code | (differs ? OLD_WORD_BIT : 0));
    if (x) {
        s->arg2 = v->arg2;
        learn_free(m, l, s, x, v->arg2);
    }
}

/* The place of a new block in class `class`; `*word` becomes the word that is expected there. */
static inline unsigned place_made(struct codec_encoder *e, const struct codec_event *v, struct lane *l, unsigned class,
                                  uint64_t *word)
{
    struct model *m = &e->m;
    uint64_t addr = v->addr, end = addr + (v->word & ~(uint64_t)7);
    uint16_t x = block_find(e, addr);
    const struct block *b = &m->block[x];

    if (x && l->ring[class][b->pushed & (DEPTHS - 1)] == x) {
        unsigned depth = (uint8_t)(l->count[class] - 1 - b->pushed);
        *word = b->word;
        *e->depth = (uint8_t)depth;
        e->depth += depth != 0;
        ring_remove(l, class, b->pushed);
        return depth ? DEEPER : TOP;
    }
    if (v->kind == K_REALLOC && addr == v->arg)
        return SAME;
    if (addr == l->behind) {
        l->split = end;
        return BEHIND;
    }
    if (addr == l->split) {
        l->split = end;
        return SPLIT;
    }
    if (x) {
        *e->ref++ = (uint16_t)(m->blocks - x);
        return KNOWN;
    }
    put_far(e, m->far, addr);
    m->far = addr;
    l->split = end;
    return ELSEWHERE;
}

static inline unsigned push_allocation(struct codec_encoder *e, const struct codec_event *v, uint16_t at,
                                       struct lane *l)
{
    struct model *m = &e->m;
    struct site *s = &m->site[at];
    unsigned code = 0;
    uint64_t addr = v->addr, size = v->size;

    if (__builtin_expect(v->kind == K_REALLOC, 0)) {
        push_old(e, v, s, l);
    } else {
        uint64_t arg = expected_arg(s, size);
        if (__builtin_expect((v->arg ^ arg) | (v->arg2 ^ s->arg2), 0)) {
            put_odd(e, v, s, ODD_ARG | ODD_ARG2);
            code = ODD_BIT;
        }
        s->arg = v->arg;
    }
    int differs = size != s->size;
    e->size = put_number(e->size, &e->wide, size, differs);
    code |= differs ? SIZE_BIT : 0;
    s->size = size;

    uint64_t chunk = chunk_of(size), word = chunk + l->flags;
    code |= place_made(e, v, l, class_of(chunk), &word) << PLACE_SHIFT;
    differs = v->word != word;
    e->word = put_number(e->word, &e->wide, v->word, differs);
    code |= differs ? WORD_BIT : 0;
    l->flags = v->word & 7;
    l->behind = addr + (v->word & ~(uint64_t)7);
    if (addr) {
        uint16_t x = block_add(m, addr, v->word, at, s->live);
        s->live = x;
        block_remember(e, addr, x);
    }
    return code;
}

static void push_values(struct codec_encoder *e, const struct codec_event *v, size_t count, const uint16_t site[BATCH],
                        uint8_t code[BATCH])
{
    struct model *m = &e->m;
    for (size_t i = 0; i < count; i++, v++) {
        struct lane *l = &m->lane[v->thread & (LANES - 1)];
        switch (CLASS[v->kind]) {
        case ALLOCATION:
            code[i] |= (uint8_t)push_allocation(e, v, site[i], l);
            break;
        case RELEASE:
            code[i] |= (uint8_t)push_free(e, v, &m->site[site[i]], l);
            break;
        default:
            code[i] |= (uint8_t)push_other(e, v, &m->site[site[i]]);
        }
    }
}

size_t codec_push(struct codec_encoder *e, const struct codec_event *event, size_t count)
{
    uint16_t site[BATCH];
    size_t taken = 0;

    if (e->finished)
        begin(e);
    if (count > CODEC_BLOCK_EVENTS - e->count)
        count = CODEC_BLOCK_EVENTS - e->count;
    while (taken < count) {
        size_t n = count - taken < BATCH ? count - taken : BATCH;
        push_clock(e, event, n);
        find_sites(e, event, n, site, e->code);
        push_sites(e, event, n, site, e->code);
        push_values(e, event, n, site, e->code);
        e->code += n;
        e->count += n;
        event += n;
        taken += n;
    }
    return taken;
}

size_t codec_count(const struct codec_encoder *e) { return e->finished ? 0 : e->count; }

/* All lowest bytes first, then all second bytes ... The width is a constant where it matters: then this is vectors. */
static inline void split(uint8_t *restrict out, const uint8_t *restrict in, size_t count, unsigned width)
{
    for (unsigned plane = 0; plane < width; plane++, out += count)
        for (size_t i = 0; i < count; i++)
            out[i] = in[i * width + plane];
}

static void split_planes(uint8_t *out, const uint8_t *in, size_t count, unsigned width)
{
    switch (width) {
    case 2:
        split(out, in, count, 2);
        break;
    case 4:
        split(out, in, count, 4);
        break;
    default:
        split(out, in, count, width);
    }
}

size_t codec_finish(struct codec_encoder *e, struct codec_stream streams[CODEC_STREAMS_MAX])
{
    if (e->finished)
        begin(e);
    const uint8_t *const end[STREAMS] = {
        [CODE] = e->code, [NEW] = e->new, [DEPTH] = e->depth, [OLD] = e->old, [ODD] = e->odd, [GAP] = e->gap,
        [SEQ] = e->seq, [THREAD] = e->thread, [SITE] = (uint8_t *)e->site, [SIZE] = (uint8_t *)e->size,
        [WORD] = (uint8_t *)e->word, [REF] = (uint8_t *)e->ref, [TIME] = (uint8_t *)e->time,
        [FAR] = (uint8_t *)e->far, [WIDE] = (uint8_t *)e->wide, [LEAP] = (uint8_t *)e->leap,
    };
    uint8_t *planes = e->planes;

    for (int s = 0; s < STREAMS; s++) {
        size_t bytes = (size_t)(end[s] - e->begin[s]);
        streams[s] = (struct codec_stream){STREAM[s].name, e->begin[s], bytes};
        if (STREAM[s].width > 1) {
            split_planes(planes, e->begin[s], bytes / STREAM[s].width, STREAM[s].width);
            streams[s].data = planes;
            planes += bytes;
        }
    }
    e->finished = 1;
    return STREAMS;
}
