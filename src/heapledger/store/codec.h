/*
 * The codec of event blocks: up to 65,536 events of one process become a few streams of bytes.
 *
 * An encoder takes events one by one, predicts every field from the events before, and keeps only what was not as
 * predicted, in streams by type; each stream is then compressed by zstd (store.blocks; not here). A block starts with
 * empty predictors, so that every block decodes alone. Any 64-bit value in any field comes back exactly.
 *
 * Plain C11 without Python, threads or input and output, so that the collector's drain and the reader share it. Nothing
 * allocates but codec_encoder_new and codec_decoder_new. An encoder or decoder is used by one thread at a time.
 */
#ifndef HEAPLEDGER_CODEC_H
#define HEAPLEDGER_CODEC_H

#include <stddef.h>
#include <stdint.h>

enum { CODEC_BLOCK_EVENTS = 65536, CODEC_STREAMS_MAX = 32 };

/* An event; the fields are the columns of store/events.py. The codec looks for patterns in `time`, not for units. */
struct codec_event {
    uint64_t time, seq, seq_exit, addr, size, arg, arg2, word;
    uint32_t stack, thread;
    uint8_t kind;
};

/* A stream of a block. `name` is a constant of this file; bytes == 0: all was as predicted, nothing is stored. */
struct codec_stream {
    const char *name;
    const uint8_t *data;
    size_t bytes;
};

struct codec_encoder;

/* An encoder with an empty block; NULL: no memory. */
struct codec_encoder *codec_encoder_new(void);

/* NULL is allowed. */
void codec_encoder_free(struct codec_encoder *);

/* Adds events to the block, in the order they are to be read; returns how many it took: fewer when the block is full. */
size_t codec_push(struct codec_encoder *, const struct codec_event *events, size_t count);

/* Events in the block so far. */
size_t codec_count(const struct codec_encoder *);

/*
 * Ends the block: fills `streams` and returns how many there are (always the same number, in the same order). They
 * belong to the encoder and are valid until the next push, which begins the next block.
 */
size_t codec_finish(struct codec_encoder *, struct codec_stream streams[CODEC_STREAMS_MAX]);

/* Where decoded columns go, `count` values each. NULL: the column is not wanted, and costs as little as it can. */
struct codec_columns {
    uint64_t *time, *seq, *seq_exit, *addr, *size, *arg, *arg2, *word;
    uint32_t *stack, *thread;
    uint8_t *kind;
};

struct codec_decoder;
struct codec_decoder *codec_decoder_new(void);
void codec_decoder_free(struct codec_decoder *);

/*
 * Decodes a block of `count` events. Streams that are not given are empty. 0, or -1 where the streams are not what an
 * encoder makes of `count` events: then `out` holds nothing of use. Whatever the streams hold, nothing outside of
 * them is read and nothing outside of `out` is written.
 */
int codec_decode(struct codec_decoder *, const struct codec_stream *streams, size_t n, size_t count,
                 const struct codec_columns *out);

/* Most bytes that the stream `name` can have in a block of `count` events; 0: there is no such stream. */
size_t codec_stream_limit(const char *name, size_t count);

#endif
