/* sample.c: distances between sampled bytes, and the set of sampled blocks; see sample.h. */
#include "sample.h"

uint8_t hl_capture = HL_CAPTURE_NEW;
__thread uint64_t hl_sample_left;

/* ---- distances ---- */

enum { NUMBERS_NEW = 0, NUMBERS_READY = 1, NUMBERS_STALE = 2 /* a fork child has its parent's */ };

static __thread uint64_t numbers;
static __thread uint8_t numbers_state;
static uint64_t mean, first_number, threads_seen;

void sample_init(uint64_t mean_bytes, uint64_t seed)
{
    mean = mean_bytes;
    first_number = seed;
}

void sample_fork_child(void)
{
    if (numbers_state == NUMBERS_READY)
        numbers_state = NUMBERS_STALE;
}

/* splitmix64 (Steele, Lea, Flood 2014): any state will do to begin with. */
static uint64_t number_next(void)
{
    uint64_t z = numbers += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

static void numbers_begin(void)
{
    uint64_t thread = __atomic_fetch_add(&threads_seen, 1, __ATOMIC_RELAXED);
    uint64_t chance = host_tsc() ^ (uint64_t)__builtin_thread_pointer();
    numbers = first_number ? first_number + (thread << 32) : chance ^ thread << 40;
    numbers = number_next();
    numbers_state = NUMBERS_READY;
}

/*
 * log2 of u > 0, 32 bits behind the point: each squaring of the mantissa brings one. In integers, because what the program sees
 * of the floating-point unit (flags, traps, rounding) is its own.
 */
static uint64_t log2_fixed(uint64_t u)
{
    unsigned zeros = (unsigned)__builtin_clzll(u);
    uint64_t result = 63 - zeros, m = u << zeros; /* m / 2^63 is in [1, 2) */
    for (int i = 0; i < 32; i++) {
        unsigned __int128 square = (unsigned __int128)m * m;
        unsigned carry = (unsigned)(square >> 127);
        m = (uint64_t)(square >> (63 + carry));
        result = result << 1 | carry;
    }
    return result;
}

/* -ln(u) * mean for u uniform in (0, 1]. */
static uint64_t distance_draw(void)
{
    const uint64_t ln2 = 0xb17217f7d1cf79acull; /* ln 2 * 2^64 */
    uint64_t log = (64ull << 32) - log2_fixed(number_next() | 1);
    uint64_t natural = (uint64_t)(((unsigned __int128)log * ln2) >> 64);
    return (uint64_t)(((unsigned __int128)natural * mean) >> 32);
}

bool sample_take(uint64_t size)
{
    uint8_t state = numbers_state;
    if (state != NUMBERS_READY)
        numbers_begin();
    if (state == NUMBERS_NEW) {
        hl_sample_left = distance_draw();
        if (sample_passes(size))
            return false;
    }
    hl_sample_left = distance_draw();
    return true;
}

/* ---- the set ---- */

enum { WAYS = 8, COUNTERS_A_BUCKET = 16, FIRST_BITS = 13, MOST_BITS = 31 };

static uint8_t first_counters[1 << FIRST_BITS];
static uint64_t first_buckets[(1 << FIRST_BITS) / COUNTERS_A_BUCKET][WAYS] __attribute__((aligned(64)));
static struct sample_set first_set = {.counters = first_counters, .buckets = first_buckets, .shift = 64 - FIRST_BITS};
struct sample_set *hl_samples = &first_set;

/* Adds 1 or -1; a counter that was ever full stays so. */
static void counter_add(uint8_t *counter, int change)
{
    uint8_t now = __atomic_load_n(counter, __ATOMIC_RELAXED);
    while (now != 255 && !__atomic_compare_exchange_n(counter, &now, (uint8_t)(now + change), false, __ATOMIC_SEQ_CST,
                                                      __ATOMIC_RELAXED))
        ;
}

/* Puts `to` in a slot of the block's bucket that holds `from`. */
static bool bucket_swap(struct sample_set *set, uint64_t hash, uint64_t from, uint64_t to)
{
    uint64_t *bucket = set->buckets[hash >> (set->shift + 4)];
    for (int i = 0; i < WAYS; i++) {
        uint64_t expected = from;
        if (__atomic_load_n(&bucket[i], __ATOMIC_RELAXED) == from &&
            __atomic_compare_exchange_n(&bucket[i], &expected, to, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return true;
    }
    return false;
}

/* Puts a larger set before `newest`, unless somebody else has. False: no memory. */
static bool set_grow(struct sample_set *newest)
{
    uint32_t bits = 64 - newest->shift + 2;
    size_t counters = (size_t)1 << bits, buckets = counters / COUNTERS_A_BUCKET * WAYS * sizeof(uint64_t);
    if (bits > MOST_BITS)
        return false;
    char *memory = host_map_private(buckets + counters + sizeof(struct sample_set));
    if (!memory)
        return false;
    struct sample_set *set = (struct sample_set *)(memory + buckets + counters);
    set->older = newest;
    set->buckets = (uint64_t(*)[WAYS])memory;
    set->counters = (uint8_t *)memory + buckets;
    set->shift = 64 - bits;
    if (!__atomic_compare_exchange_n(&hl_samples, &newest, set, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
        host_unmap(memory, buckets + counters + sizeof *set);
    return true;
}

/* The block this thread was given last of those in the sample, and hl_sample_left right after: each request lowers it. */
static __thread const void *newest;
static __thread uint64_t newest_left;

enum sample_age sample_age(const void *block)
{
    return block == newest && hl_sample_left == newest_left ? SAMPLE_TEMPORARY : SAMPLE_OLDER;
}

void sample_add(const void *block)
{
    newest = block;
    newest_left = hl_sample_left;
    uint64_t hash = sample_hash(block);
    if (sample_maybe(block))
        (void)sample_remove(block); /* it was freed where we do not see it */
    for (;;) {
        struct sample_set *largest = __atomic_load_n(&hl_samples, __ATOMIC_ACQUIRE);
        for (struct sample_set *set = largest; set; set = set->older) {
            counter_add(&set->counters[hash >> set->shift], 1);
            if (bucket_swap(set, hash, 0, (uint64_t)block))
                return;
            counter_add(&set->counters[hash >> set->shift], -1);
        }
        if (!set_grow(largest))
            return;
    }
}

bool sample_remove(const void *block)
{
    uint64_t hash = sample_hash(block);
    for (struct sample_set *set = __atomic_load_n(&hl_samples, __ATOMIC_ACQUIRE); block && set; set = set->older) {
        uint8_t *counter = &set->counters[hash >> set->shift];
        if (__atomic_load_n(counter, __ATOMIC_RELAXED) && bucket_swap(set, hash, (uint64_t)block, 0)) {
            counter_add(counter, -1);
            return true;
        }
    }
    return false;
}
