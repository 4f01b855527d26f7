/* stack_table.c: the table of whole stacks (stack_table.h): adding, growing. */
#include "stack_table.h"

#include "host.h"

#include <stddef.h>
#include <string.h>

/* <sys/mman.h> would declare the functions that the shim defines. */
enum { MADV_DONTNEED_NUMBER = 4, MADV_HUGEPAGE_NUMBER = 14 };
enum { HUGE_PAGE = 2 << 20 };

enum { LEVELS = 7, FIRST_BITS = 10, LEVEL_BITS = 2 };

/* 4 K entries in 64 KB, then four times as many each; 16 M in the last. Made when first needed. */
static struct table levels[LEVELS];
static uint64_t added; /* since the table in use was empty */
static struct table_bucket nowhere;
static const struct table none = {&nowhere, 0};
const struct table *stack_table = &none;

static void level_empty(const struct table *table)
{
    size_t bytes = (table->mask + 1) * sizeof(struct table_bucket);
    if (host_frugal)
        memset(table->buckets, 0, bytes);
    else
        host_call3(SYS_madvise, table->buckets, bytes, MADV_DONTNEED_NUMBER);
}

void *table_map(size_t bytes)
{
    if (bytes < HUGE_PAGE)
        return host_map_private(bytes);
    char *start = host_map_private(bytes + HUGE_PAGE);
    if (start == NULL)
        return NULL;
    start += -(uintptr_t)start % HUGE_PAGE;
    if (!host_frugal)
        host_call3(SYS_madvise, start, bytes, MADV_HUGEPAGE_NUMBER);
    return start;
}

static bool level_make(unsigned level)
{
    struct table *table = &levels[level];
    uint64_t buckets = 1ull << (FIRST_BITS + LEVEL_BITS * level);
    struct table_bucket *made, *missing = NULL;
    if (__atomic_load_n(&table->buckets, __ATOMIC_ACQUIRE) != NULL)
        return true;
    made = table_map(buckets * sizeof *made);
    if (made == NULL)
        return false;
    __atomic_store_n(&table->mask, buckets - 1, __ATOMIC_RELEASE); /* the same from each thread that comes here */
    if (!__atomic_compare_exchange_n(&table->buckets, &missing, made, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        host_unmap(made, buckets * sizeof *made); /* but for what the alignment took */
    return true;
}

bool table_init(void)
{
    if (!level_make(0))
        return false;
    __atomic_store_n(&stack_table, &levels[0], __ATOMIC_RELEASE);
    return true;
}

/* Half full: the next one takes over, and is filled from the old one by and by. */
static __attribute__((noinline)) void grow(const struct table *table)
{
    unsigned level = (unsigned)(table - levels) + 1;
    if (table == &none || level >= LEVELS || !level_make(level))
        return;
    if (__atomic_compare_exchange_n(&stack_table, &table, &levels[level], false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        __atomic_store_n(&added, 0, __ATOMIC_RELAXED);
}

static struct table_bucket *table_neighbour(struct table_bucket *bucket)
{
    return (struct table_bucket *)((uintptr_t)bucket ^ sizeof *bucket);
}

static bool bucket_add(struct table_bucket *bucket, uint64_t word0, uint64_t word1, unsigned victim)
{
    unsigned at = 0;
    while (at < 4 && __atomic_load_n(&bucket->entry[at].word[1], __ATOMIC_RELAXED) != 0)
        at++;
    at = at < 4 ? at : victim;
    if (at >= 4)
        return false;
    __atomic_store_n(&bucket->entry[at].word[0], word0, __ATOMIC_RELAXED);
    __atomic_store_n(&bucket->entry[at].word[1], word1, __ATOMIC_RELAXED);
    return true;
}

void table_add(struct stack_state callers, struct stack_state state, uint32_t epoch, uint32_t node)
{
    const struct table *table = __atomic_load_n(&stack_table, __ATOMIC_ACQUIRE);
    uint64_t word1 = state.lane[1] >> 32 << 32 | node, word0 = state.lane[0] ^ table_epoch(epoch) ^ word1;
    if (table == &none)
        return;
    struct table_bucket *bucket = table_bucket(table, callers);
    if (!bucket_add(bucket, word0, word1, 4) && !bucket_add(table_neighbour(bucket), word0, word1, 4))
        bucket_add(table_bucket(table, state), word0, word1, state.lane[0] & 3);
    if (unlikely(__atomic_add_fetch(&added, 1, __ATOMIC_RELAXED) > 2 * (table->mask + 1)))
        grow(table);
}

uint32_t table_find_on(struct stack_state callers, struct stack_state state, uint32_t epoch)
{
    const struct table *table = __atomic_load_n(&stack_table, __ATOMIC_ACQUIRE);
    if (table == &none)
        return 0;
    uint32_t node = table_find_at(table_neighbour(table_bucket(table, callers)), state, epoch);
    if (node == 0)
        node = table_find_at(table_bucket(table, state), state, epoch);
    if (node != 0 || table == &levels[0])
        return node;
    struct table_bucket *bucket = table_bucket(--table, callers);
    node = table_find_at(bucket, state, epoch);
    if (node == 0)
        node = table_find_at(table_neighbour(bucket), state, epoch);
    if (node == 0)
        node = table_find_at(table_bucket(table, state), state, epoch);
    if (node != 0)
        table_add(callers, state, epoch, node);
    return node;
}

void table_renew(void)
{
    if (__atomic_load_n(&added, __ATOMIC_RELAXED) > levels[0].mask)
        table_forget();
}

void table_forget(void)
{
    for (unsigned level = 0; level < LEVELS; level++)
        if (levels[level].buckets != NULL)
            level_empty(&levels[level]);
    __atomic_store_n(&added, 0, __ATOMIC_RELAXED);
}
