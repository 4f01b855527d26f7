/* Random calls of every allocator function, logged to fd 1: the oracle for the malloc model.
 *
 *   randops SEED COUNT FLAGS      FLAGS: 1 mallopt, 2 foreign sbrk, 4 malloc_trim, 8 many small blocks, 16 nasty sizes
 *
 * Runs under any glibc: it has its own _start (the ordinary one needs GLIBC_2.34 when linked there), and uses no symbol newer
 * than 2.17. Build: gcc -O1 -fno-builtin -nostartfiles. Nothing here allocates but the calls that are logged.
 *
 * The log is records of six little-endian 64-bit words, named as the columns of heapledger.store.events:
 *
 *   kind | addr | size | arg | arg2 | word          first record: kind 0, addr the initial break
 *                                                   last record:  kind 255, addr the final break
 */
#include <malloc.h>
#include <stdint.h>
#include <stdlib.h>
#include <unistd.h>

enum { MALLOC = 1, CALLOC, REALLOC, FREE, MEMALIGN, VALLOC, PVALLOC, MALLOC_TRIM, MALLOPT, SBRK = 22, END = 255 };
enum { F_MALLOPT = 1, F_SBRK = 2, F_TRIM = 4, F_MANY = 8, F_NASTY = 16 };
enum { MAX_SLOTS = 1 << 17, BUFFERED = 1 << 14 };

struct record {
    uint64_t kind, addr, size, arg, arg2, word;
};

static struct record buffer[BUFFERED];
static unsigned buffered;
static void *slots[MAX_SLOTS];
static uint64_t rng;
static unsigned n_slots = 1 << 12, flags, phase;

/* Writes the buffer out; gives up loudly, as a log with a gap is worth nothing. */
static void flush(void)
{
    const char *at = (const char *)buffer;
    size_t left = buffered * sizeof buffer[0];
    while (left > 0) {
        ssize_t n = write(1, at, left);
        if (n <= 0)
            _exit(3);
        at += n;
        left -= (size_t)n;
    }
    buffered = 0;
}

static void record(uint64_t kind, uint64_t addr, uint64_t size, uint64_t arg, uint64_t arg2, uint64_t word)
{
    if (buffered == BUFFERED)
        flush();
    buffer[buffered++] = (struct record){kind, addr, size, arg, arg2, word};
}

static uint64_t word_of(const void *p)
{
    return p ? ((const volatile uint64_t *)p)[-1] : 0;
}

/* xorshift64*: good enough, and the same everywhere. */
static uint64_t next(void)
{
    rng ^= rng >> 12;
    rng ^= rng << 25;
    rng ^= rng >> 27;
    return rng * 2685821657736338717ULL;
}

static uint64_t below(uint64_t n)
{
    return (next() >> 16) % n;
}

/* Sizes at the edges of malloc's classes, and ones it must refuse. */
static uint64_t nasty(void)
{
    static const uint64_t edges[] = {0,     1,      23,     24,       25,      120,      121,          1007,      1008,   1009,
                                     1016,  1023,   1024,   1032,     1033,    1040,     4072,         4088,      65504,  65528,
                                     65536, 131040, 131048, 131056,   131064,  131072,   131073,       135144,    135145, 262144,
                                     33554400, 33554408, 33554432, 33558528};
    static const uint64_t refused[] = {UINT64_MAX, UINT64_MAX - 40, (uint64_t)INT64_MAX, (uint64_t)INT64_MAX + 1, 1ULL << 60,
                                       1ULL << 47, 1ULL << 46};
    if (below(8) == 0)
        return refused[below(sizeof refused / sizeof refused[0])];
    return edges[below(sizeof edges / sizeof edges[0])];
}

static uint64_t any_size(void)
{
    unsigned r = (unsigned)below(1000);
    if ((flags & F_NASTY) && r < 30)
        return nasty();
    if (flags & F_MANY)
        return r < 990 ? below(1200) : below(40000);
    if (phase == 1)
        return r < 900 ? below(150) : below(3000);
    if (r < 550)
        return below(200);
    if (r < 780)
        return below(2000);
    if (r < 920)
        return below(20000);
    if (r < 985)
        return below(200000);
    return below(2000000);
}

static uint64_t any_alignment(void)
{
    static const uint64_t odd[] = {0, 1, 3, 24, 48, 100, 4097, 1ULL << 20, 1ULL << 21};
    if (below(12) == 0)
        return odd[below(sizeof odd / sizeof odd[0])];
    return 8ULL << below(11);
}

static void put(unsigned slot, void *p)
{
    if (slots[slot]) {
        record(FREE, (uint64_t)slots[slot], 0, 0, 0, word_of(slots[slot]));
        free(slots[slot]);
    }
    slots[slot] = p;
}

static void do_memalign(unsigned slot)
{
    uint64_t alignment = any_alignment(), size = any_size(), how = below(3);
    void *p = NULL;
    if (how == 0)
        p = memalign(alignment, size);
    else if (how == 1)
        p = aligned_alloc(alignment, size);
    else if (posix_memalign(&p, alignment, size) != 0)
        p = NULL;
    record(MEMALIGN, (uint64_t)p, size, alignment, how, word_of(p));
    put(slot, p);
}

static void do_realloc(unsigned slot)
{
    void *old = slots[slot];
    uint64_t old_word = word_of(old);
    uint64_t size = below(40) == 0 ? 0 : any_size();
    /* Often a small change, as programs do. */
    if (old && below(2) && old_word < 1 << 20)
        size = (old_word & ~7ULL) + below(200) > 120 ? (old_word & ~7ULL) + below(200) - 120 : 1;
    void *p = realloc(old, size);
    record(REALLOC, (uint64_t)p, size, (uint64_t)old, old_word, word_of(p));
    if (p || size == 0)
        slots[slot] = p;
}

static void do_mallopt(void)
{
    static const int params[] = {M_MXFAST, M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_PERTURB, -100};
    static const int values[] = {0, 8, 64, 80, 128, 160, 161, 4096, 65536, 131072, 1 << 20, 32 << 20, (32 << 20) + 1, -1};
    int param = params[below(7)], value = values[below(14)];
    if (param == M_TOP_PAD && value < 0)
        value = 8192;
    /* Anything at all would be mapped, and the log would be about little else. */
    if (param == M_MMAP_THRESHOLD && value >= 0 && value < 4096)
        value = 65536;
    int result = mallopt(param, value);
    record(MALLOPT, (uint64_t)(int64_t)result, (uint64_t)(int64_t)value, (uint64_t)(int64_t)param, 0, 0);
}

static void do_sbrk(void)
{
    intptr_t by = below(3) ? (intptr_t)below(9000) : (intptr_t)(below(4) * 4096);
    void *p = sbrk(by);
    record(SBRK, (uint64_t)p, (uint64_t)by, 0, 0, 0);
}

static void do_trim(void)
{
    uint64_t pad = below(3) ? 0 : below(200000);
    record(MALLOC_TRIM, (uint64_t)malloc_trim(pad), pad, 0, 0, 0);
}

static void rare(unsigned slot)
{
    unsigned r = (unsigned)below(100);
    void *p;
    uint64_t size;
    if (r < 3 && (flags & F_MALLOPT)) {
        do_mallopt();
    } else if (r < 8 && (flags & F_SBRK)) {
        do_sbrk();
    } else if (r < 16 && (flags & F_TRIM)) {
        do_trim();
    } else if (r < 50) {
        size = any_size();
        p = valloc(size);
        record(VALLOC, (uint64_t)p, size, 0, 0, word_of(p));
        put(slot, p);
    } else if (r < 80) {
        size = any_size();
        p = pvalloc(size);
        record(PVALLOC, (uint64_t)p, size, 0, 0, word_of(p));
        put(slot, p);
    } else if (r < 90) {
        record(FREE, 0, 0, 0, 0, 0);
        free(NULL);
    } else {
        do_memalign(slot);
    }
}

static void one(void)
{
    unsigned slot = (unsigned)below(n_slots), r = (unsigned)below(1000);
    void *p;
    uint64_t size;
    /* Phases 2 and 3 give back more than they take, so that top shrinks and large holes come about. */
    if (r < (phase >= 2 ? 620u : 330u)) {
        put(slot, NULL);
    } else if (r < 780) {
        size = any_size();
        p = malloc(size);
        record(MALLOC, (uint64_t)p, size, 0, 0, word_of(p));
        put(slot, p);
    } else if (r < 860) {
        uint64_t count = 1 + below(16);
        size = any_size() / count;
        p = calloc(count, size);
        record(CALLOC, (uint64_t)p, size * count, count, 0, word_of(p));
        put(slot, p);
    } else if (r < 960) {
        do_realloc(slot);
    } else if (r < 990) {
        do_memalign(slot);
    } else {
        rare(slot);
    }
}

static uint64_t number(const char *text)
{
    uint64_t value = 0;
    while (*text >= '0' && *text <= '9')
        value = 10 * value + (uint64_t)(*text++ - '0');
    return value;
}

__attribute__((used, noreturn)) static void start(const uintptr_t *stack)
{
    if (stack[0] < 4)
        _exit(2);
    const char *const *argv = (const char *const *)(stack + 1);
    uint64_t count = number(argv[2]);
    rng = 88172645463325252ULL + number(argv[1]) * 0x9E3779B97F4A7C15ULL;
    flags = (unsigned)number(argv[3]);
    if (flags & F_MANY)
        n_slots = MAX_SLOTS;
    record(0, (uint64_t)sbrk(0), 0, 0, 0, 0);
    for (uint64_t i = 0; i < count; i++) {
        if (i % 8192 == 0)
            phase = (unsigned)below(4);
        one();
    }
    record(END, (uint64_t)sbrk(0), 0, 0, 0, 0);
    flush();
    _exit(0);
}

__asm__(".globl _start\n_start:\n\txor %ebp, %ebp\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall start\n\thlt\n");
