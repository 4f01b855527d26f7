/* The codec of event blocks; see codec.h. Each column is the zigzag of its differences, as LEB128 numbers. */
#include "codec.h"

#include <stdlib.h>
#include <string.h>

enum { COLUMNS = 11, LONGEST = 10 };

static const char *const NAMES[COLUMNS] = {
    "time", "seq", "seq_exit", "addr", "size", "arg", "arg2", "word", "stack", "thread", "kind",
};

struct codec_encoder {
    size_t count;
    int finished;
    uint64_t last[COLUMNS];
    uint8_t *at[COLUMNS];
    uint8_t data[COLUMNS][(size_t)CODEC_BLOCK_EVENTS * LONGEST];
};

struct codec_decoder {
    int unused;
};

static void begin(struct codec_encoder *e)
{
    e->count = 0;
    e->finished = 0;
    memset(e->last, 0, sizeof e->last);
    for (int c = 0; c < COLUMNS; c++)
        e->at[c] = e->data[c];
}

struct codec_encoder *codec_encoder_new(void)
{
    struct codec_encoder *e = malloc(sizeof *e);
    if (e)
        begin(e);
    return e;
}

void codec_encoder_free(struct codec_encoder *e) { free(e); }

static inline void put(struct codec_encoder *e, int column, uint64_t value)
{
    uint64_t difference = value - e->last[column];
    uint64_t v = (difference << 1) ^ (uint64_t)((int64_t)difference >> 63);
    uint8_t *at = e->at[column];

    e->last[column] = value;
    for (; v >= 0x80; v >>= 7)
        *at++ = (uint8_t)(v | 0x80);
    *at++ = (uint8_t)v;
    e->at[column] = at;
}

size_t codec_push(struct codec_encoder *e, const struct codec_event *event, size_t count)
{
    size_t taken;

    if (e->finished)
        begin(e);
    for (taken = 0; taken < count && e->count < CODEC_BLOCK_EVENTS; taken++, event++, e->count++) {
        const uint64_t values[COLUMNS] = {
            event->time, event->seq,  event->seq_exit, event->addr,   event->size, event->arg,
            event->arg2, event->word, event->stack,    event->thread, event->kind,
        };
        for (int c = 0; c < COLUMNS; c++)
            put(e, c, values[c]);
    }
    return taken;
}

size_t codec_count(const struct codec_encoder *e) { return e->finished ? 0 : e->count; }

size_t codec_finish(struct codec_encoder *e, struct codec_stream streams[CODEC_STREAMS_MAX])
{
    for (int c = 0; c < COLUMNS; c++)
        streams[c] = (struct codec_stream){NAMES[c], e->data[c], (size_t)(e->at[c] - e->data[c])};
    e->finished = 1;
    return COLUMNS;
}

struct codec_decoder *codec_decoder_new(void) { return calloc(1, sizeof(struct codec_decoder)); }

void codec_decoder_free(struct codec_decoder *d) { free(d); }

/* The next number, behind `*at`. -1: there is none. */
static int take(const uint8_t **at, const uint8_t *end, uint64_t *value)
{
    uint64_t v = 0;
    for (int shift = 0; shift < 70; shift += 7) {
        if (*at == end)
            return -1;
        uint8_t byte = *(*at)++;
        v |= (uint64_t)(byte & 0x7f) << (shift & 63);
        if (!(byte & 0x80)) {
            *value = (v >> 1) ^ (0 - (v & 1));
            return 0;
        }
    }
    return -1;
}

int codec_decode(struct codec_decoder *d, const struct codec_stream *streams, size_t n, size_t count,
                 const struct codec_columns *out)
{
    (void)d;
    if (count > CODEC_BLOCK_EVENTS)
        return -1;
    uint64_t *const wide[8] = {out->time, out->seq, out->seq_exit, out->addr,
                               out->size, out->arg, out->arg2,     out->word};
    for (int c = 0; c < COLUMNS; c++) {
        const uint8_t *at = NULL, *end = NULL;
        uint64_t value = 0, difference;
        for (size_t s = 0; s < n; s++)
            if (!strcmp(streams[s].name, NAMES[c]))
                at = streams[s].data, end = at + streams[s].bytes;
        for (size_t i = 0; i < count; i++) {
            if (take(&at, end, &difference))
                return -1;
            value += difference;
            if (c < 8 && wide[c])
                wide[c][i] = value;
            else if (c == 8 && out->stack)
                out->stack[i] = (uint32_t)value;
            else if (c == 9 && out->thread)
                out->thread[i] = (uint32_t)value;
            else if (c == 10 && out->kind)
                out->kind[i] = (uint8_t)value;
        }
        if (at != end)
            return -1;
    }
    return 0;
}

size_t codec_stream_limit(const char *name, size_t count)
{
    for (int c = 0; c < COLUMNS; c++)
        if (!strcmp(name, NAMES[c]))
            return count * LONGEST;
    return 0;
}
