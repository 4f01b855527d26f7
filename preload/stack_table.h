/*
 * stack_table.h: which node is a whole stack? One look-up, of one cache line, for stacks that were seen before.
 *
 * A stack's state is 128 bits, chained from the outermost frame in:
 *
 *   state(no frame) = constants                   state(stack) = state_push(state(its callers), ip)
 *
 * Each of the two lanes is a bijection of its old value for a given ip, and of the ip for a given old value. The table:
 *
 *   buckets of one cache line,                            word 1 = high half of lane 1 << 32 | node
 *   four entries of 16 bytes                              word 0 = lane 0 ^ word 1 ^ epoch * constant
 *
 * Three buckets are a stack's: that of its callers and the neighbour, so that the calls of one function lie side by side,
 * and when they are full that of the whole stack. At least 96 bits decide, then. With ten million stacks a wrong match has a probability of some
 * 2^46 pairs / 2^96, one in 10^15; frames themselves are compared only in the check build. The two words are written one
 * after the other without a lock: of words from different entries the exclusive or is no lane 0, but for one in 2^64.
 *
 * The table may forget: an entry gives way to another one, all of them to a new epoch (code came or went: the same addresses
 * may be another module's). What is true is the trie.
 */
#ifndef HEAPLEDGER_STACK_TABLE_H
#define HEAPLEDGER_STACK_TABLE_H

#include "host.h"
#include "stack.h"

struct table_bucket { _Alignas(64) struct { uint64_t word[2]; } entry[4]; };
struct table { struct table_bucket *buckets; uint64_t mask; };

/* The one in use; its `buckets` is NULL and its mask 0 when there is no memory. */
extern const struct table *stack_table;

#define STATE_EMPTY ((struct stack_state){{0x243f6a8885a308d3ull, 0x13198a2e03707344ull}})

static inline struct stack_state state_push(struct stack_state state, uint64_t ip)
{
    uint64_t a = (state.lane[0] ^ ip) * 0x9e3779b97f4a7c15ull, b = (state.lane[1] + ip) * 0xd6e8feb86659fd93ull;
    return (struct stack_state){{a << 32 | a >> 32, b << 29 | b >> 35}};
}

static inline bool state_equal(struct stack_state a, struct stack_state b)
{
    return a.lane[0] == b.lane[0] && a.lane[1] == b.lane[1];
}

static inline uint64_t table_epoch(uint32_t epoch)
{
    return epoch * 0x9fb21c651e98df25ull;
}

static inline struct table_bucket *table_bucket(const struct table *table, struct stack_state state)
{
    return &table->buckets[state.lane[1] & table->mask];
}

static inline uint32_t table_find_at(const struct table_bucket *bucket, struct stack_state state, uint32_t epoch)
{
    uint64_t wanted = state.lane[0] ^ table_epoch(epoch);
    for (unsigned i = 0; i < 4; i++) {
        uint64_t word1 = __atomic_load_n(&bucket->entry[i].word[1], __ATOMIC_RELAXED);
        uint64_t word0 = __atomic_load_n(&bucket->entry[i].word[0], __ATOMIC_RELAXED);
        if ((word0 ^ word1) == wanted && ((word1 ^ state.lane[1]) >> 32) == 0)
            return (uint32_t)word1;
    }
    return 0;
}

/* The rest of table_find: the other buckets, and where the stack was before the table grew. */
uint32_t table_find_on(struct stack_state callers, struct stack_state state, uint32_t epoch);

/* The node of a stack, or 0. Any thread, async-signal-safe, lock-free, like all of these. */
static inline uint32_t table_find(struct stack_state callers, struct stack_state state, uint32_t epoch)
{
    const struct table *table = __atomic_load_n(&stack_table, __ATOMIC_ACQUIRE);
    uint32_t node = table_find_at(table_bucket(table, callers), state, epoch);
    return likely(node != 0) ? node : table_find_on(callers, state, epoch);
}

/* Asks for the line that table_find reads first. */
static inline void table_prefetch(struct stack_state callers)
{
    __builtin_prefetch(table_bucket(__atomic_load_n(&stack_table, __ATOMIC_ACQUIRE), callers));
}

void table_add(struct stack_state callers, struct stack_state state, uint32_t epoch, uint32_t node);

/*
 * Zeroed memory for a hash table. Each look-up in a large one is in another page: where the kernel has huge ones, they save most
 * of the time. NULL: there is none.
 */
void *table_map(size_t bytes);

/* False: no memory (each look-up then finds nothing). */
bool table_init(void);

/* What the table says is not believed any more (a new epoch): makes room for what comes, if need be. */
void table_renew(void);

/* Empties the table. */
void table_forget(void);

#endif
