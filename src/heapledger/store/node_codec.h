/*
 * The codec of node blocks: up to 16,384 nodes of a process's trie of call stacks become a few streams of bytes.
 *
 * A node is a return address called from its parent. Most nodes continue the stack of the node before them, and what an
 * address calls is mostly one of the four addresses it called last: then a node is a byte that zstd finds often.
 *
 *   code    a byte a node:   7..5   4     3       2 1 0
 *                            0      gap   parent  address     1 in bit 4, 3: in the stream of that name
 *           address          0 to 3: what the parent's address called last, second last ...; 4: any that the block had
 *                            before, its number is in `known`; 5: one that it had not, it is in `new`
 *   known   numbers of addresses, in the order they came up: two planes, all low bytes first
 *   new     zigzag(address - the new one before), zigzag(module - that of the new one before): LEB128
 *   parent  zigzag(node - parent - 1), where that is not 0: LEB128
 *   gap     zigzag(node - the node before - 1), where that is not 0: LEB128. The node before the first one is 0.
 *
 * A parent outside of the block counts as number 0, the first address. All arithmetic is modulo 2**64.
 */
#ifndef HEAPLEDGER_NODE_CODEC_H
#define HEAPLEDGER_NODE_CODEC_H

#include <stddef.h>
#include <stdint.h>

#include "codec.h"

enum { NODE_BLOCK_NODES = 16384 };

struct node_encoder;

/* NULL: no memory. */
struct node_encoder *node_encoder_new(void);
void node_encoder_free(struct node_encoder *);

/* Encodes a block; returns how many streams there are. They are the encoder's, and valid until the next block. */
size_t node_encode(struct node_encoder *, const int64_t *node, const int64_t *parent, const int64_t *address,
                   const int64_t *module_id, size_t count, struct codec_stream streams[CODEC_STREAMS_MAX]);

/*
 * Fills four columns of `count` values. 0, or -1 where the streams are not what an encoder makes, or there is no memory.
 * Nothing outside of the streams is read and nothing outside of the columns is written.
 */
int node_decode(const struct codec_stream *streams, size_t n, size_t count, int64_t *node, int64_t *parent,
                int64_t *address, int64_t *module_id);

/* Most bytes that the stream `name` can have in a block of `count` nodes; 0: there is no such stream. */
size_t node_stream_limit(const char *name, size_t count);

#endif
