/* The codec of node blocks; see node_codec.h for the streams. */
#include "node_codec.h"

#include <stdlib.h>
#include <string.h>

enum stream { CODE, KNOWN, NEW, PARENT, GAP, STREAMS };
enum { RANKS = 4, IS_KNOWN = 4, IS_NEW = 5, RANK_MASK = 7, PARENT_BIT = 8, GAP_BIT = 16 };
enum { SLOTS = 2 * NODE_BLOCK_NODES, SLOT_BITS = 15 };

static const struct { const char *name; unsigned most; } STREAM[STREAMS] = {
    {"code", 1}, {"known", 2}, {"new", 20}, {"parent", 10}, {"gap", 10},
};

/* An address of a module, and the numbers of what it called, latest first. */
struct entry {
    uint64_t address, module;
    uint16_t next[RANKS];
};

/* What both sides know. `number` is the number of each node's address. */
struct trie {
    size_t entries;
    struct entry entry[NODE_BLOCK_NODES];
    uint16_t number[NODE_BLOCK_NODES];
};

struct node_encoder {
    struct trie t;
    uint16_t slot[SLOTS]; /* number + 1, by hash of address and module */
    uint8_t data[STREAMS][20 * NODE_BLOCK_NODES];
    uint16_t known[NODE_BLOCK_NODES];
};

struct node_encoder *node_encoder_new(void) { return malloc(sizeof(struct node_encoder)); }

void node_encoder_free(struct node_encoder *e) { free(e); }

size_t node_stream_limit(const char *name, size_t count)
{
    for (int s = 0; s < STREAMS; s++)
        if (!strcmp(STREAM[s].name, name))
            return count * STREAM[s].most;
    return 0;
}

static inline uint64_t zigzag(uint64_t v) { return (v << 1) ^ (uint64_t)((int64_t)v >> 63); }
static inline uint64_t unzigzag(uint64_t v) { return (v >> 1) ^ (0 - (v & 1)); }

static inline uint8_t *put_varint(uint8_t *at, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        *at++ = (uint8_t)(v | 0x80);
    *at++ = (uint8_t)v;
    return at;
}

/* What the parent of a node calls; the first entry stands in for a parent that is not in the block. */
static inline struct entry *caller(struct trie *t, uint64_t first, uint64_t parent, size_t at)
{
    /* Nodes without gaps lie at node - first; with gaps this finds another node, the same one on both sides. */
    uint64_t index = parent - first;
    return &t->entry[index < at ? t->number[index] : 0];
}

static inline void learn(struct entry *e, uint16_t number)
{
    uint16_t moved = number;
    for (int i = 0; i < RANKS; i++) {
        uint16_t before = e->next[i];
        e->next[i] = moved;
        if (before == number)
            return;
        moved = before;
    }
}

static inline void entry_add(struct trie *t, uint64_t address, uint64_t module)
{
    t->entry[t->entries++] = (struct entry){.address = address, .module = module};
}

/* The number of an address; `*is_new` if it had none. */
static inline uint16_t number_of(struct node_encoder *e, uint64_t address, uint64_t module, int *is_new)
{
    struct trie *t = &e->t;
    uint64_t at = ((address ^ module << 47) * 0x9E3779B97F4A7C15u) >> (64 - SLOT_BITS);
    for (; e->slot[at]; at = (at + 1) & (SLOTS - 1)) {
        uint16_t number = (uint16_t)(e->slot[at] - 1);
        if (t->entry[number].address == address && t->entry[number].module == module) {
            *is_new = 0;
            return number;
        }
    }
    *is_new = 1;
    entry_add(t, address, module);
    e->slot[at] = (uint16_t)t->entries;
    return (uint16_t)(t->entries - 1);
}

size_t node_encode(struct node_encoder *e, const int64_t *node, const int64_t *parent, const int64_t *address,
                   const int64_t *module_id, size_t count, struct codec_stream streams[CODEC_STREAMS_MAX])
{
    struct trie *t = &e->t;
    uint8_t *out[STREAMS];
    size_t known = 0;
    uint64_t before = 0, last_address = 0, last_module = 0;

    t->entries = 0;
    t->entry[0] = (struct entry){0};
    memset(e->slot, 0, sizeof e->slot);
    for (int s = 0; s < STREAMS; s++)
        out[s] = e->data[s];
    for (size_t i = 0; i < count; i++) {
        uint64_t id = (uint64_t)node[i], up = (uint64_t)parent[i], a = (uint64_t)address[i], m = (uint64_t)module_id[i];
        int is_new;
        uint16_t number = number_of(e, a, m, &is_new);
        struct entry *from = caller(t, (uint64_t)node[0], up, i);
        unsigned code = 0;

        if (is_new) {
            code = IS_NEW;
            out[NEW] = put_varint(out[NEW], zigzag(a - last_address));
            out[NEW] = put_varint(out[NEW], zigzag(m - last_module));
            last_address = a, last_module = m;
        } else {
            while (code < RANKS && from->next[code] != number)
                code++;
            if (code == IS_KNOWN)
                e->known[known++] = number;
        }
        if (up != id - 1) {
            code |= PARENT_BIT;
            out[PARENT] = put_varint(out[PARENT], zigzag(id - up - 1));
        }
        if (id != before + 1) {
            code |= GAP_BIT;
            out[GAP] = put_varint(out[GAP], zigzag(id - before - 1));
        }
        before = id;
        t->number[i] = number;
        learn(from, number);
        *out[CODE]++ = (uint8_t)code;
    }
    for (size_t i = 0; i < known; i++) {
        e->data[KNOWN][i] = (uint8_t)e->known[i];
        e->data[KNOWN][known + i] = (uint8_t)(e->known[i] >> 8);
    }
    out[KNOWN] += 2 * known;
    for (int s = 0; s < STREAMS; s++)
        streams[s] = (struct codec_stream){STREAM[s].name, e->data[s], (size_t)(out[s] - e->data[s])};
    return STREAMS;
}

static int take_signed(const uint8_t **at, const uint8_t *end, uint64_t *value)
{
    uint64_t v = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
        if (*at == end)
            return -1;
        uint8_t byte = *(*at)++;
        v |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) {
            *value = unzigzag(v);
            return 0;
        }
    }
    return -1;
}

static int decode(struct trie *t, const uint8_t *at[STREAMS], const uint8_t *end[STREAMS], size_t count, int64_t *node,
                  int64_t *parent, int64_t *address, int64_t *module_id)
{
    size_t known = (size_t)(end[KNOWN] - at[KNOWN]) / 2, taken = 0;
    uint64_t before = 0, last_address = 0, last_module = 0, difference;

    for (size_t i = 0; i < count; i++) {
        unsigned code = at[CODE][i], rank = code & RANK_MASK;
        uint64_t id = before + 1, up;
        uint16_t number;

        if (code & GAP_BIT) {
            if (take_signed(&at[GAP], end[GAP], &difference))
                return -1;
            id += difference;
        }
        up = id - 1;
        if (code & PARENT_BIT) {
            if (take_signed(&at[PARENT], end[PARENT], &difference))
                return -1;
            up -= difference;
        }
        struct entry *from = caller(t, i ? (uint64_t)node[0] : id, up, i);
        if (rank == IS_NEW) {
            if (take_signed(&at[NEW], end[NEW], &difference))
                return -1;
            last_address += difference;
            if (take_signed(&at[NEW], end[NEW], &difference))
                return -1;
            last_module += difference;
            number = (uint16_t)t->entries;
            entry_add(t, last_address, last_module); /* at most one a node: it fits */
        } else if (rank == IS_KNOWN) {
            if (taken == known)
                return -1;
            number = (uint16_t)(at[KNOWN][taken] | at[KNOWN][known + taken] << 8);
            taken++;
        } else if (rank < RANKS) {
            number = from->next[rank];
        } else {
            return -1;
        }
        if (number >= t->entries)
            return -1;
        t->number[i] = number;
        learn(from, number);
        node[i] = (int64_t)id, parent[i] = (int64_t)up;
        address[i] = (int64_t)t->entry[number].address, module_id[i] = (int64_t)t->entry[number].module;
        before = id;
    }
    return taken == known && at[NEW] == end[NEW] && at[PARENT] == end[PARENT] && at[GAP] == end[GAP] ? 0 : -1;
}

int node_decode(const struct codec_stream *streams, size_t n, size_t count, int64_t *node, int64_t *parent,
                int64_t *address, int64_t *module_id)
{
    static const uint8_t NOTHING[1];
    const uint8_t *at[STREAMS], *end[STREAMS];

    for (int s = 0; s < STREAMS; s++)
        at[s] = end[s] = NOTHING;
    for (size_t i = 0; i < n; i++) {
        int s = 0;
        while (s < STREAMS && strcmp(STREAM[s].name, streams[i].name))
            s++;
        if (s == STREAMS)
            return -1;
        at[s] = streams[i].data;
        end[s] = at[s] + streams[i].bytes;
    }
    if (count > NODE_BLOCK_NODES || (size_t)(end[CODE] - at[CODE]) != count || (end[KNOWN] - at[KNOWN]) % 2)
        return -1;
    struct trie *t = calloc(1, sizeof *t);
    if (!t)
        return -1;
    int failed = decode(t, at, end, count, node, parent, address, module_id);
    free(t);
    return failed;
}
