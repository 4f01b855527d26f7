/* The decoder of event blocks: the mirror of codec.c, step by step. See codec.h and codec_model.h. */
#include <stdlib.h>
#include <string.h>

#include "codec.h"
#include "codec_model.h"

/* What is left of a stream. Wide values lie in planes: all lowest bytes first. */
struct cursor {
    const uint8_t *data;
    size_t at, count; /* in values; in bytes where they have various widths */
};

struct codec_decoder {
    struct cursor in[STREAMS];
    uint32_t thread[CODEC_BLOCK_EVENTS];
    uint16_t site[CODEC_BLOCK_EVENTS];
    struct model m;
};

/* calloc: no value of a hostile block may depend on what was in memory before. */
struct codec_decoder *codec_decoder_new(void) { return calloc(1, sizeof(struct codec_decoder)); }

void codec_decoder_free(struct codec_decoder *d) { free(d); }

size_t codec_stream_limit(const char *name, size_t count)
{
    for (int s = 0; s < STREAMS; s++)
        if (!strcmp(name, STREAM[s].name))
            return count * STREAM[s].most;
    return 0;
}

/* ---- values of a stream; -1: there is none left */

static inline int take8(struct cursor *c, uint8_t *v)
{
    if (c->at == c->count)
        return -1;
    *v = c->data[c->at++];
    return 0;
}

static inline int take16(struct cursor *c, uint16_t *v)
{
    size_t at = c->at;
    if (at == c->count)
        return -1;
    *v = (uint16_t)(c->data[at] | c->data[at + c->count] << 8);
    c->at++;
    return 0;
}

static int take_wide(struct codec_decoder *d, unsigned width, enum stream s, uint64_t *v)
{
    struct cursor *c = &d->in[s];
    size_t at = c->at;
    if (at == c->count)
        return -1;
    *v = 0;
    for (unsigned plane = 0; plane < width; plane++)
        *v |= (uint64_t)c->data[at + plane * c->count] << (8 * plane);
    c->at++;
    return 0;
}

static inline int take_number(struct codec_decoder *d, enum stream s, enum stream wide, uint64_t *v)
{
    uint16_t narrow;
    if (take16(&d->in[s], &narrow))
        return -1;
    *v = narrow;
    return __builtin_expect(narrow == NUMBER_WIDE, 0) ? take_wide(d, 8, wide, v) : 0;
}

static int take_varint(struct cursor *c, uint64_t *value)
{
    uint64_t v = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        uint8_t byte;
        if (take8(c, &byte))
            return -1;
        v |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) {
            *value = v;
            return 0;
        }
    }
    return -1;
}

static int take_signed(struct cursor *c, uint64_t *value)
{
    if (take_varint(c, value))
        return -1;
    *value = unzigzag(*value);
    return 0;
}

/* Moves `*next` on to the event that the next value of the stream is for; beyond every block: there is none. */
static int take_gap(struct cursor *c, size_t *next)
{
    uint8_t byte = GAP_MORE;
    if (c->at == c->count) {
        *next = SIZE_MAX;
        return 0;
    }
    while (byte == GAP_MORE) {
        if (take8(c, &byte))
            return -1;
        *next += byte;
    }
    return *next < CODEC_BLOCK_EVENTS ? 0 : -1;
}

/* Whether nothing is left in the streams from `first` to `last`. */
static int is_used_up(const struct codec_decoder *d, int first, int last)
{
    for (int s = first; s <= last; s++)
        if (d->in[s].at != d->in[s].count)
            return 0;
    return 1;
}

/* ---- clock: thread, time, seq */

static int decode_threads(struct codec_decoder *d, size_t count)
{
    struct cursor *c = &d->in[THREAD];
    size_t next = 0;
    uint64_t thread = 0;
    if (take_gap(c, &next))
        return -1;
    for (size_t i = 0; i < count; i++) {
        if (i == next && (take_varint(c, &thread) || thread > UINT32_MAX || take_gap(c, &next)))
            return -1;
        d->thread[i] = (uint32_t)thread;
    }
    return next < SIZE_MAX ? -1 : 0;
}

static int decode_times(struct codec_decoder *d, size_t count, uint64_t *out)
{
    struct model *m = &d->m;
    struct cursor *c = &d->in[GAP];
    size_t next = 0;
    uint64_t difference;
    if (take_gap(c, &next))
        return -1;
    for (size_t i = 0; i < count; i++) {
        struct lane *l = &m->lane[d->thread[i] & (LANES - 1)];
        if (i == next) {
            if (take_number(d, TIME, LEAP, &difference) || take_gap(c, &next))
                return -1;
            l->time = m->time += unzigzag(difference);
        }
        out[i] = l->time;
    }
    return next < SIZE_MAX || !is_used_up(d, GAP, LEAP) ? -1 : 0;
}

static int decode_seqs(struct codec_decoder *d, size_t count, uint64_t *out, uint64_t *out_exit)
{
    struct cursor *c = &d->in[SEQ];
    size_t next = 0;
    uint64_t seq = 0, difference;
    if (take_gap(c, &next))
        return -1;
    for (size_t i = 0; i < count; i++) {
        uint64_t exit = seq + 1;
        if (i == next) {
            if (take_signed(c, &difference))
                return -1;
            seq += difference;
            if (take_signed(c, &difference) || take_gap(c, &next))
                return -1;
            exit = seq + 1 + difference;
        }
        if (out)
            out[i] = seq;
        if (out_exit)
            out_exit[i] = exit;
        seq = seq_after(seq, exit);
    }
    return next < SIZE_MAX ? -1 : 0;
}

/* ---- sites */

static int decode_new(struct codec_decoder *d, uint16_t *at)
{
    struct model *m = &d->m;
    uint64_t difference, stack;
    uint8_t kind;
    if (take_signed(&d->in[NEW], &difference) || take8(&d->in[NEW], &kind) || m->sites == SITES)
        return -1;
    stack = m->stack + difference;
    if (stack > UINT32_MAX)
        return -1;
    m->stack = (uint32_t)stack;
    *at = site_add(m, site_key(kind, (uint32_t)stack));
    return 0;
}

static int decode_sites(struct codec_decoder *d, size_t count, uint32_t *stack, uint8_t *kind)
{
    struct model *m = &d->m;
    const uint8_t *code = d->in[CODE].data;
    for (size_t i = 0; i < count; i++) {
        struct lane *l = &m->lane[d->thread[i] & (LANES - 1)];
        struct guess g;
        unsigned rank = code[i] & STACK_OTHER;
        uint16_t at;

        guess_site(m, l->history, &g);
        if (rank != STACK_OTHER)
            at = g.site[rank];
        else if (take16(&d->in[SITE], &at) || (at == SITE_NEW && decode_new(d, &at)))
            return -1;
        if (at >= m->sites)
            return -1;
        learn_site(&g, at);
        l->history = l->history << 16 | at;
        d->site[i] = at;
        if (stack)
            stack[i] = (uint32_t)m->site[at].key;
        if (kind)
            kind[i] = (uint8_t)(m->site[at].key >> 32);
    }
    return 0;
}

/* ---- values: addr, size, arg, arg2, word */

struct values { uint64_t addr, size, arg, arg2, word; };

/* Whether this block has a block of memory with the number `x`. */
static inline int is_block(const struct model *m, uint16_t x) { return x && (x <= m->blocks || m->blocks >= BLOCKS); }

static int take_far(struct codec_decoder *d, uint64_t base, uint64_t *addr)
{
    uint64_t z;
    if (take_wide(d, 4, FAR, &z))
        return -1;
    if (z == FAR_WIDE)
        return take_wide(d, 8, WIDE, addr);
    *addr = base + (unzigzag(z) << 4);
    return 0;
}

static int take_odd(struct codec_decoder *d, struct site *s, unsigned allowed)
{
    struct cursor *c = &d->in[ODD];
    uint64_t *const field[5] = {&s->addr, &s->size, &s->arg, &s->arg2, &s->word};
    uint64_t difference;
    uint8_t mask;
    if (take8(c, &mask) || mask & ~allowed)
        return -1;
    for (int f = 0; f < 5; f++)
        if (mask & 1u << f) {
            if (take_signed(c, &difference))
                return -1;
            *field[f] += difference;
        }
    return mask;
}

static int decode_other(struct codec_decoder *d, unsigned code, struct site *s, struct values *v)
{
    if (code & ODD_BIT && take_odd(d, s, ODD_ADDR | ODD_SIZE | ODD_ARG | ODD_ARG2 | ODD_WORD) < 0)
        return -1;
    *v = (struct values){s->addr, s->size, s->arg, s->arg2, s->word};
    return 0;
}

/* Number (0: a null pointer), address and word of a block that is released at site `s`. */
static int decode_released(struct codec_decoder *d, unsigned place, int word_differs, struct site *s, struct lane *l,
                           uint64_t last_word, uint64_t *addr, uint64_t *word, uint16_t *found)
{
    struct model *m = &d->m;
    uint16_t now = (uint16_t)m->blocks, x = 0, ago;

    switch (place) {
    case LIVE:
        x = m->site[s->from].live;
        break;
    case STRIDE:
        x = (uint16_t)(now - s->distance);
        break;
    case NEWER:
        x = (uint16_t)(l->freed + 1);
        break;
    case OLDER:
        x = (uint16_t)(l->freed - 1);
        break;
    case AGO:
        if (take16(&d->in[REF], &ago))
            return -1;
        x = (uint16_t)(now - ago);
        break;
    case NONE:
        break;
    default:
        *addr = l->neighbour;
        if (place == AWAY && take_far(d, l->away, addr))
            return -1;
        x = block_add(m, *addr, last_word, 0, 0);
    }
    if (place != NONE && !is_block(m, x))
        return -1;
    *addr = m->block[x].addr;
    *word = m->block[x].word;
    *found = x;
    return word_differs ? take_number(d, WORD, WIDE, word) : 0;
}

static inline int decode_free(struct codec_decoder *d, unsigned code, struct site *s, struct lane *l, struct values *v)
{
    uint16_t x;
    if (code & ODD_BIT && take_odd(d, s, ODD_SIZE | ODD_ARG | ODD_ARG2) < 0)
        return -1;
    v->size = s->size, v->arg = s->arg, v->arg2 = s->arg2;
    if (decode_released(d, code >> PLACE_SHIFT & 7, code & WORD_BIT, s, l, s->word, &v->addr, &v->word, &x))
        return -1;
    if (x) {
        s->word = v->word;
        learn_free(&d->m, l, s, x, v->word);
    }
    return 0;
}

static int decode_old(struct codec_decoder *d, struct site *s, struct lane *l, struct values *v)
{
    uint16_t x;
    uint8_t code;
    if (take8(&d->in[OLD], &code) || code > (OLD_WORD_BIT | 7))
        return -1;
    if (decode_released(d, code & 7, code & OLD_WORD_BIT, s, l, s->arg2, &v->arg, &v->arg2, &x))
        return -1;
    if (x) {
        s->arg2 = v->arg2;
        learn_free(&d->m, l, s, x, v->arg2);
    }
    return 0;
}

/* The address of a new block in class `class`; `*word` becomes the word that is expected there. */
static inline int decode_made(struct codec_decoder *d, unsigned place, int is_realloc, struct lane *l, unsigned class,
                              struct values *v, uint64_t *word)
{
    struct model *m = &d->m;
    uint8_t depth = 0;
    uint16_t ago, x;

    switch (place) {
    case DEEPER:
        if (take8(&d->in[DEPTH], &depth))
            return -1;
        /* fall through */
    case TOP:
        x = l->ring[class][(l->count[class] - 1 - depth) & (DEPTHS - 1)];
        if (!is_block(m, x))
            return -1;
        ring_remove(l, class, m->block[x].pushed);
        *word = m->block[x].word;
        v->addr = m->block[x].addr;
        return 0;
    case SAME:
        v->addr = v->arg;
        return is_realloc ? 0 : -1;
    case BEHIND:
        v->addr = l->behind;
        return 0;
    case SPLIT:
        v->addr = l->split;
        return 0;
    case KNOWN:
        if (take16(&d->in[REF], &ago) || !is_block(m, x = (uint16_t)(m->blocks - ago)))
            return -1;
        v->addr = m->block[x].addr;
        return 0;
    case ELSEWHERE:
        if (take_far(d, m->far, &v->addr))
            return -1;
        m->far = v->addr;
        return 0;
    default:
        return -1;
    }
}

static inline int decode_allocation(struct codec_decoder *d, unsigned code, uint16_t at, struct lane *l,
                                    struct values *v)
{
    struct model *m = &d->m;
    struct site *s = &m->site[at];
    int is_realloc = s->key >> 32 == K_REALLOC, odd = 0;
    unsigned place = code >> PLACE_SHIFT & 7;
    uint64_t size = s->size;

    if (is_realloc && decode_old(d, s, l, v))
        return -1;
    if (code & SIZE_BIT && take_number(d, SIZE, WIDE, &size))
        return -1;
    if (!is_realloc) {
        uint64_t arg = expected_arg(s, size);
        if (code & ODD_BIT && (odd = take_odd(d, s, ODD_ARG | ODD_ARG2)) < 0)
            return -1;
        v->arg = s->arg = odd & ODD_ARG ? s->arg : arg;
        v->arg2 = s->arg2;
    }
    v->size = s->size = size;

    uint64_t chunk = chunk_of(size), word = chunk + l->flags;
    if (decode_made(d, place, is_realloc, l, class_of(chunk), v, &word))
        return -1;
    if (code & WORD_BIT && take_number(d, WORD, WIDE, &word))
        return -1;
    v->word = word;
    l->flags = word & 7;
    l->behind = v->addr + (word & ~(uint64_t)7);
    if (place == BEHIND || place == SPLIT || place == ELSEWHERE)
        l->split = l->behind;
    if (v->addr)
        s->live = block_add(m, v->addr, word, at, s->live);
    return 0;
}

static int decode_values(struct codec_decoder *d, size_t count, const struct codec_columns *out)
{
    struct model *m = &d->m;
    const uint8_t *code = d->in[CODE].data;
    for (size_t i = 0; i < count; i++) {
        struct lane *l = &m->lane[d->thread[i] & (LANES - 1)];
        struct site *s = &m->site[d->site[i]];
        struct values v;
        int failed;

        switch (CLASS[s->key >> 32 & 0xff]) {
        case ALLOCATION:
            failed = decode_allocation(d, code[i], d->site[i], l, &v);
            break;
        case RELEASE:
            failed = decode_free(d, code[i], s, l, &v);
            break;
        default:
            failed = decode_other(d, code[i], s, &v);
        }
        if (failed)
            return -1;
        if (out->addr)
            out->addr[i] = v.addr;
        if (out->size)
            out->size[i] = v.size;
        if (out->arg)
            out->arg[i] = v.arg;
        if (out->arg2)
            out->arg2[i] = v.arg2;
        if (out->word)
            out->word[i] = v.word;
    }
    return 0;
}

/* ---- a block */

static int open_streams(struct codec_decoder *d, const struct codec_stream *streams, size_t n, size_t count)
{
    memset(d->in, 0, sizeof d->in);
    for (size_t i = 0; i < n; i++) {
        int s = 0;
        while (s < STREAMS && strcmp(STREAM[s].name, streams[i].name))
            s++;
        if (s == STREAMS)
            return -1;
        unsigned width = STREAM[s].width > 1 ? STREAM[s].width : 1;
        if (streams[i].bytes % width || streams[i].bytes > count * STREAM[s].most)
            return -1;
        d->in[s] = (struct cursor){streams[i].data, 0, streams[i].bytes / width};
    }
    return 0;
}

int codec_decode(struct codec_decoder *d, const struct codec_stream *streams, size_t n, size_t count,
                 const struct codec_columns *out)
{
    int values = out->addr || out->size || out->arg || out->arg2 || out->word;
    int sites = values || out->stack || out->kind;

    if (count > CODEC_BLOCK_EVENTS || open_streams(d, streams, n, count) || decode_threads(d, count))
        return -1;
    model_begin(&d->m);
    if (out->thread)
        memcpy(out->thread, d->thread, count * sizeof *out->thread);
    if (out->time && decode_times(d, count, out->time))
        return -1;
    if ((out->seq || out->seq_exit) && decode_seqs(d, count, out->seq, out->seq_exit))
        return -1;
    if (sites && (d->in[CODE].count != count || decode_sites(d, count, out->stack, out->kind)))
        return -1;
    d->in[CODE].at = d->in[CODE].count;
    if (values && (decode_values(d, count, out) || !is_used_up(d, SITE, WIDE)))
        return -1;
    return 0;
}
