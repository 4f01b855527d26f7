/* Blocks of events and nodes whose streams are changed at random: prints how many of them decoded, and how many were refused. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "codec.h"
#include "node_codec.h"

enum { EVENTS = 600, NODES = 300 };

static uint64_t state = 88172645463325252u;

static uint64_t rnd(uint64_t below)
{
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state % below;
}

/* Exactly as long as it says, on the heap: the sanitizer sees one byte too far. */
static uint8_t *copy(const uint8_t *data, size_t bytes)
{
    uint8_t *c = malloc(bytes ? bytes : 1);
    if (bytes)
        memcpy(c, data, bytes);
    return c;
}

static void change(struct codec_stream *s)
{
    uint8_t *data = (uint8_t *)s->data;
    if (s->bytes && rnd(4))
        data[rnd(s->bytes)] = rnd(3) ? (uint8_t)rnd(256) : 0xff;
    else
        s->bytes = rnd(s->bytes + 1);
}

static struct codec_event event(size_t i)
{
    static const uint8_t kinds[] = {1, 1, 2, 3, 4, 4, 4, 16};
    struct codec_event e = {.seq = 2 * i + 1, .seq_exit = rnd(20) ? 2 * i + 2 : 0, .time = i / 8 * 300};
    e.kind = kinds[rnd(8)];
    e.stack = (uint32_t)(e.kind * 8 + rnd(4));
    e.thread = (uint32_t)(rnd(10) ? 0 : rnd(40));
    e.addr = rnd(30) ? 0x5000 + 32 * rnd(40) : rnd(UINT64_MAX);
    e.size = e.kind == 4 ? 0 : rnd(20) ? 24 : rnd(1 << 20);
    e.word = rnd(20) ? 0x21 : rnd(UINT64_MAX);
    e.arg = e.kind == 3 ? 0x5000 + 32 * rnd(40) : 0;
    return e;
}

/* A block in which nothing can be predicted fits where the encoder keeps it, and comes back. */
static void full_block(struct codec_encoder *encoder, struct codec_decoder *decoder)
{
    static const uint8_t kinds[] = {1, 2, 3, 3, 3, 4, 16, 200};
    static struct codec_event events[CODEC_BLOCK_EVENTS];
    static uint64_t wide[8][CODEC_BLOCK_EVENTS];
    static uint32_t narrow[2][CODEC_BLOCK_EVENTS];
    static uint8_t kind[CODEC_BLOCK_EVENTS];
    const struct codec_columns out = {wide[0], wide[1], wide[2], wide[3], wide[4],  wide[5],
                                      wide[6], wide[7], narrow[0], narrow[1], kind};
    struct codec_stream streams[CODEC_STREAMS_MAX];

    for (size_t i = 0; i < CODEC_BLOCK_EVENTS; i++) {
        struct codec_event *e = &events[i];
        uint64_t *const fields[] = {&e->time, &e->seq, &e->seq_exit, &e->addr, &e->size, &e->arg, &e->arg2, &e->word};
        for (int f = 0; f < 8; f++)
            *fields[f] = rnd(UINT64_MAX);
        e->stack = (uint32_t)rnd(UINT32_MAX), e->thread = (uint32_t)rnd(UINT32_MAX), e->kind = kinds[rnd(8)];
    }
    if (codec_push(encoder, events, CODEC_BLOCK_EVENTS) != CODEC_BLOCK_EVENTS || codec_push(encoder, events, 1))
        abort();
    size_t n = codec_finish(encoder, streams);
    for (size_t s = 0; s < n; s++)
        if (streams[s].bytes > codec_stream_limit(streams[s].name, CODEC_BLOCK_EVENTS))
            abort();
    if (codec_decode(decoder, streams, n, CODEC_BLOCK_EVENTS, &out))
        abort();
    for (size_t i = 0; i < CODEC_BLOCK_EVENTS; i++) {
        const struct codec_event *e = &events[i];
        if (wide[0][i] != e->time || wide[1][i] != e->seq || wide[2][i] != e->seq_exit || wide[3][i] != e->addr ||
            wide[4][i] != e->size || wide[5][i] != e->arg || wide[6][i] != e->arg2 || wide[7][i] != e->word ||
            narrow[0][i] != e->stack || narrow[1][i] != e->thread || kind[i] != e->kind)
            abort();
    }
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 1000, kept = 0, refused = 0;
    struct codec_encoder *encoder = codec_encoder_new();
    struct codec_decoder *decoder = codec_decoder_new();
    struct node_encoder *nodes = node_encoder_new();

    full_block(encoder, decoder);
    for (int round = 0; round < rounds; round++) {
        struct codec_stream streams[CODEC_STREAMS_MAX];
        struct codec_event e;
        size_t n, count = 1 + rnd(EVENTS);
        int failed, of_nodes = round % 3 == 0;
        int64_t *column[4] = {0};
        uint64_t *wide[8];
        uint32_t *narrow[2];
        uint8_t *kind = malloc(count);

        if (of_nodes) {
            count = 1 + count % NODES;
            for (int c = 0; c < 4; c++)
                column[c] = malloc(count * sizeof(int64_t));
            for (size_t i = 0; i < count; i++) {
                column[0][i] = (int64_t)i + 1, column[1][i] = (int64_t)rnd(i + 1);
                column[2][i] = (int64_t)rnd(60), column[3][i] = (int64_t)rnd(2);
            }
            n = node_encode(nodes, column[0], column[1], column[2], column[3], count, streams);
        } else {
            for (size_t i = 0; i < count; i++)
                e = event(i), codec_push(encoder, &e, 1);
            n = codec_finish(encoder, streams);
        }
        for (size_t s = 0; s < n; s++)
            streams[s].data = copy(streams[s].data, streams[s].bytes);
        for (uint64_t changes = 1 + rnd(3); changes; changes--)
            change(&streams[rnd(n)]);
        if (of_nodes) {
            failed = node_decode(streams, n, count, column[0], column[1], column[2], column[3]);
        } else {
            for (int c = 0; c < 8; c++)
                wide[c] = malloc(count * sizeof(uint64_t));
            for (int c = 0; c < 2; c++)
                narrow[c] = malloc(count * sizeof(uint32_t));
            struct codec_columns out = {wide[0], wide[1], wide[2], wide[3], wide[4], wide[5],
                                        wide[6], wide[7], narrow[0], narrow[1], kind};
            failed = codec_decode(decoder, streams, n, count, &out);
            for (int c = 0; c < 8; c++)
                free(wide[c]);
            free(narrow[0]), free(narrow[1]);
        }
        for (int c = 0; c < 4; c++)
            free(column[c]);
        free(kind);
        for (size_t s = 0; s < n; s++)
            free((void *)streams[s].data);
        failed ? refused++ : kept++;
    }
    printf("%d %d\n", kept, refused);
    codec_encoder_free(encoder), codec_decoder_free(decoder), node_encoder_free(nodes);
    return 0;
}
