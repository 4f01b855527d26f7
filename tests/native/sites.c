/* Blocks of several call sites, for the tests of lifetimes and of samples.
 *
 *   sites ROUNDS      a round: 5 scratch (temporary, 24 bytes), 4 small (16 to 271), 2 medium (1,000 to 9,999), and every
 *                     8th round a large one (200,000 or more). Kept in tables, random ones dropped by whoever owns them.
 *
 * At the end every third block that is still in a table is lost for good; the others are dropped.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SLOTS = 2000 };

static void *volatile smalls[SLOTS], *volatile mediums[SLOTS], *volatile larges[SLOTS];
static uint64_t state = 88172645463325252u;

static unsigned below(unsigned limit)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (unsigned)(state >> 33) % limit;
}

__attribute__((noinline)) static void scratch(int byte)
{
    char *volatile buffer = malloc(24);
    memset(buffer, byte, 24);
    free(buffer);
}

__attribute__((noinline)) static void *make_small(void)
{
    return malloc(16 + below(256));
}

__attribute__((noinline)) static void *make_medium(void)
{
    return calloc(1, 1000 + below(9000));
}

__attribute__((noinline)) static void *make_large(void)
{
    size_t size = 200000 + below(1000000);
    return memset(malloc(size), 1, size);
}

__attribute__((noinline)) static void drop_small(void *block)
{
    free(block);
}

__attribute__((noinline)) static void drop_other(void *block)
{
    free(block);
}

static void put(void *volatile *table, void *block, void (*drop)(void *), unsigned slots)
{
    unsigned at = below(slots);
    if (table[at])
        drop(table[at]);
    table[at] = block;
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 10000;
    for (int round = 0; round < rounds; round++) {
        for (int i = 0; i < 5; i++)
            scratch(round);
        for (int i = 0; i < 4; i++)
            put(smalls, make_small(), drop_small, SLOTS);
        for (int i = 0; i < 2; i++)
            put(mediums, make_medium(), drop_other, SLOTS);
        if (round % 8 == 0)
            put(larges, make_large(), drop_other, 20);
    }
    for (int i = 0; i < SLOTS; i++) {
        if (i % 3 == 0)
            continue;
        drop_small(smalls[i]);
        drop_other(mediums[i]);
        drop_other(larges[i]);
    }
    return 0;
}
