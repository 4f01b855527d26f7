/* hooks.c: the table of real functions, and the interposed functions of malloc. See also syscalls.c, threads.c, process.c, loader.c. */
#define _GNU_SOURCE
#include "hooks.h"

#include <errno.h>

#include "image.h"
#include "modules.h"
#include "sample.h"

struct hl_real hl_real;
bool hl_words;
int (*hl_find_object)(void *, struct dl_found *);
const char *(*hl_libc_version)(void);

/* glibc's malloc, or its debugging layer, keeps the chunk's size in the word before a block. */
static bool malloc_is_glibc(void)
{
    const char *here = host_object_path((const void *)hl_real.malloc);
    const char *libc = host_object_path((const void *)hl_libc_version);
    return here && libc && (here == libc || host_contains(here, "libc_malloc_debug"));
}

void hooks_resolve(void)
{
    if (hl_real.malloc && hl_real.free)
        return;
#define X(result, name, parameters) hl_real.name = (result(*) parameters)host_symbol(#name);
    HL_HOOKS(X)
#undef X
    hl_find_object = (int (*)(void *, struct dl_found *))host_symbol("_dl_find_object");
    hl_libc_version = (const char *(*)(void))host_symbol("gnu_get_libc_version");
    hl_words = malloc_is_glibc();
    const char *single = host_symbol("__libc_single_threaded");
    if (single)
        hl_single_threaded = single;
}

/* ---- what the allocator hooks share ---- */

static inline uint64_t word_before(const void *block)
{
    return block && likely(hl_words) ? ((const uint64_t *)block)[-1] : 0;
}

/* Where a hook was called from. */
struct caller {
    uintptr_t ip, sp, bp;
};

#define CALLER ((struct caller){CALLER_IP, CALLER_SP, CALLER_BP})

#define COLD __attribute__((noinline, cold))
#define HOT __attribute__((noinline, hot))

/*
 * Entry of an allocator call in any circumstances. aux: the 16 bits beside the size; exts: slots behind the first one that
 * hold `v`. A size that does not fit needs one. False: not recorded.
 */
static COLD bool alloc_begin(struct hl_event *e, unsigned kind, uint64_t size, uint64_t aux, uint32_t exts,
                             struct hl_values *v, const struct caller *from)
{
    struct hl_thread *t = record_thread();
    uint32_t stack = t && (kind != HL_FREE || hl_settings.free_stacks) ? stack_capture(from->ip, from->sp, from->bp) : 0;
    bool wide = size >= HL_SIZE_EXT;
    if (!t || !record_reserve(e, t, 1 + (wide ? 1 : exts), from->sp))
        return false;
    v->size = size;
    record_extend(e, v);
    record_open(e, kind, stack, kind == HL_FREE ? v->addr & HL_ADDR_MASK : 0, aux << 48 | (wide ? HL_SIZE_EXT : size));
    return true;
}

/* Its exit: it gave `block` (or NULL). */
static COLD void alloc_end(struct hl_event *e, uint64_t size, const void *block)
{
    uint64_t word = word_before(block);
    record_result(e, (uint64_t)block, block ? word - HL_CHUNK(size) : 0, word);
}

/* The body of a hook that records `call`, which gives a block, in any circumstances. */
#define RECORD_ANYHOW(kind, size, aux, exts, values, call)                                                             \
    do {                                                                                                               \
        struct caller from = CALLER;                                                                                   \
        struct hl_values v_ = values;                                                                                  \
        struct hl_event event_;                                                                                        \
        bool recorded = alloc_begin(&event_, kind, size, aux, exts, &v_, &from);                                       \
        void *block_ = call;                                                                                           \
        if (recorded) {                                                                                                \
            alloc_end(&event_, size, block_);                                                                          \
            if (hl_capture == HL_CAPTURE_SAMPLE && block_)                                                             \
                sample_add(block_);                                                                                    \
        }                                                                                                              \
        return block_;                                                                                                 \
    } while (0)

/*
 * The same the plain way (record.h) if it may be taken and `fits`: the fields of a slot are large enough. exts: 0, or 1 for the
 * arguments that `values` has.
 */
#define RECORD_BLOCK(kind, size, aux, fits, exts, values, call)                                                        \
    do {                                                                                                               \
        struct hl_thread *thread = record_ready();                                                                     \
        if (unlikely(!thread || !(fits)))                                                                              \
            break;                                                                                                     \
        struct hl_event event;                                                                                         \
        uint32_t stack = CALLER_STACK;                                                                                 \
        record_enter(&event, thread, 1 + (exts), CALLER_SP);                                                           \
        if (exts) {                                                                                                    \
            struct hl_values v = values;                                                                               \
            record_arguments(&event, v.arg, v.arg2);                                                                   \
        }                                                                                                              \
        record_open(&event, kind, stack, 0, (uint64_t)(aux) << 48 | (size));                                           \
        void *block = call;                                                                                            \
        uint64_t word = word_before(block);                                                                            \
        record_leave(&event, (uint64_t)block, block ? word - HL_CHUNK(size) : 0, word);                                \
        return block;                                                                                                  \
    } while (0)

#define NO_VALUES ((struct hl_values){0})

/*
 * An exported function of malloc's is a branch to one of three, by hl_capture: NAME_all, NAME_sample, NAME_new. It and what
 * passes unrecorded need no frame; all of these calls are the last thing done, so that the frame of who is branched to stands where
 * the exported function's would, and CALLER is the program. (A test has stacks of each.)
 */

/* ---- malloc ---- */

static HOT void *malloc_all(size_t size)
{
    RECORD_BLOCK(HL_MALLOC, size, 0, size < HL_SIZE_EXT, 0, NO_VALUES, hl_real.malloc(size));
    RECORD_ANYHOW(HL_MALLOC, size, 0, 0, NO_VALUES, REAL(malloc)(size));
}

static COLD void *malloc_sample(size_t size)
{
    if (!sample_passes(size) && sample_take(size))
        RECORD_ANYHOW(HL_MALLOC, size, 0, 0, NO_VALUES, REAL(malloc)(size));
    return hl_real.malloc(size);
}

static COLD void *malloc_new(size_t size)
{
    image_start();
    return hl_capture == HL_CAPTURE_SAMPLE ? malloc_sample(size) : malloc_all(size);
}

HL_EXPORT void *malloc(size_t size)
{
    if (likely(hl_capture == HL_CAPTURE_ALL))
        return malloc_all(size);
    if (unlikely(hl_capture == HL_CAPTURE_NEW))
        return malloc_new(size);
    if (likely(sample_passes(size)))
        return hl_real.malloc(size);
    return malloc_sample(size);
}

/* ---- calloc ---- */

static inline uint64_t product(size_t count, size_t size)
{
    size_t bytes;
    return __builtin_mul_overflow(count, size, &bytes) ? SIZE_MAX : bytes;
}

#define CALLOC_ANYHOW                                                                                                  \
    RECORD_ANYHOW(HL_CALLOC, bytes, count >= HL_AUX_EXT ? HL_AUX_EXT : count, count >= HL_AUX_EXT,                     \
                  ((struct hl_values){.arg = count}), REAL(calloc)(count, size))

static HOT void *calloc_all(size_t count, size_t size)
{
    uint64_t bytes = product(count, size);
    RECORD_BLOCK(HL_CALLOC, bytes, count, bytes < HL_SIZE_EXT && count < HL_AUX_EXT, 0, NO_VALUES, hl_real.calloc(count, size));
    CALLOC_ANYHOW;
}

static COLD void *calloc_sample(size_t count, size_t size)
{
    uint64_t bytes = product(count, size);
    if (!sample_passes(bytes) && sample_take(bytes))
        CALLOC_ANYHOW;
    return hl_real.calloc(count, size);
}

static COLD void *calloc_new(size_t count, size_t size)
{
    image_start();
    return hl_capture == HL_CAPTURE_SAMPLE ? calloc_sample(count, size) : calloc_all(count, size);
}

HL_EXPORT void *calloc(size_t count, size_t size)
{
    if (likely(hl_capture == HL_CAPTURE_ALL))
        return calloc_all(count, size);
    if (unlikely(hl_capture == HL_CAPTURE_NEW))
        return calloc_new(count, size);
    if (likely(sample_passes(product(count, size))))
        return hl_real.calloc(count, size);
    return calloc_sample(count, size);
}

/* ---- realloc ---- */

#define OLD_VALUES ((struct hl_values){.arg = (uint64_t)old, .arg2 = word_before(old)})

static HOT void *realloc_all(void *old, size_t size)
{
    RECORD_BLOCK(HL_REALLOC, size, 0, size < HL_SIZE_EXT, 1, OLD_VALUES, hl_real.realloc(old, size));
    RECORD_ANYHOW(HL_REALLOC, size, 0, 1, OLD_VALUES, REAL(realloc)(old, size));
}

/* Either block may be in the sample, independently: what is recorded is drawn in store/events.py. */
static COLD void *realloc_sample(void *old, size_t size)
{
    bool wanted = !sample_passes(size) && sample_take(size), known = sample_remove(old);
    if (!wanted && !known)
        return hl_real.realloc(old, size);
    struct caller from = CALLER;
    struct hl_values v = known ? OLD_VALUES : NO_VALUES;
    struct hl_event event;
    bool recorded = alloc_begin(&event, HL_REALLOC, size, 0, 1, &v, &from);
    void *block = hl_real.realloc(old, size);
    if (known && !block && size)
        sample_add(old); /* it lives on */
    if (recorded && block && wanted)
        sample_add(block);
    if (recorded && block && !wanted)
        record_result_free(&event, v.arg, v.arg2);
    else if (recorded)
        alloc_end(&event, size, block);
    return block;
}

static COLD void *realloc_new(void *old, size_t size)
{
    image_start();
    return hl_capture == HL_CAPTURE_SAMPLE ? realloc_sample(old, size) : realloc_all(old, size);
}

static HL_INLINE void *realloc_any(void *old, size_t size)
{
    if (likely(hl_capture == HL_CAPTURE_ALL))
        return realloc_all(old, size);
    if (unlikely(hl_capture == HL_CAPTURE_NEW))
        return realloc_new(old, size);
    if (likely(!sample_maybe(old)) && likely(sample_passes(size)))
        return hl_real.realloc(old, size);
    return realloc_sample(old, size);
}

HL_EXPORT void *realloc(void *old, size_t size)
{
    return realloc_any(old, size);
}

/* As libc's, which would call our realloc: so the product is checked here. */
HL_EXPORT void *reallocarray(void *old, size_t count, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    return realloc_any(old, bytes);
}

/* ---- free ---- */

/* All of these record before the real call, so that the address cannot be seen to be used again before. */

/* age: what a sample says of the block, enum sample_age; 0 in a full capture. */
static COLD void free_anyhow(void *block, unsigned age, const struct caller *from)
{
    struct hl_event event;
    struct hl_values v = {.addr = (uint64_t)block, .arg = age};
    bool recorded = alloc_begin(&event, HL_FREE, word_before(block), 0, age != 0, &v, from);
    REAL(free)(block);
    if (recorded)
        record_result(&event, (uint64_t)block, 0, 0);
}

/*
 * The block's header is often in no cache, and free needs it in any case. Its line is asked for before the stack is captured and
 * read after: a load would hold back all that comes behind it until memory answers (measured on allocbench: half of free's cost).
 */
static HOT void free_all(void *block)
{
    struct hl_thread *thread = record_ready();
    if (unlikely(!thread)) {
        struct caller from = CALLER;
        free_anyhow(block, 0, &from);
        return;
    }
    __builtin_prefetch((const uint64_t *)block - 1, 1);
    uint32_t stack = likely(hl_settings.free_stacks) ? CALLER_STACK : 0;
    uint64_t word = word_before(block);
    if (unlikely(word >= HL_SIZE_EXT)) {
        struct caller from = CALLER;
        free_anyhow(block, 0, &from);
        return;
    }
    struct hl_event event;
    record_enter(&event, thread, 1, CALLER_SP);
    record_open(&event, HL_FREE, stack, (uint64_t)block & HL_ADDR_MASK, word);
    hl_real.free(block);
    record_leave(&event, (uint64_t)block, 0, 0);
}

static COLD void free_sample(void *block)
{
    if (!sample_remove(block)) {
        hl_real.free(block);
        return;
    }
    struct caller from = CALLER;
    free_anyhow(block, sample_age(block), &from);
}

static COLD void free_new(void *block)
{
    image_start();
    if (hl_capture == HL_CAPTURE_SAMPLE)
        free_sample(block);
    else
        free_all(block);
}

static HL_INLINE void free_any(void *block)
{
    if (likely(hl_capture == HL_CAPTURE_ALL))
        free_all(block);
    else if (unlikely(hl_capture == HL_CAPTURE_NEW))
        free_new(block);
    else if (likely(!sample_maybe(block)))
        hl_real.free(block);
    else
        free_sample(block);
}

HL_EXPORT void free(void *block)
{
    free_any(block);
}

HL_EXPORT void cfree(void *block)
{
    free_any(block);
}

/* C23, in newer libcs: the same as free there, without passing through it. */
HL_EXPORT void free_sized(void *block, size_t size)
{
    (void)size;
    free_any(block);
}

HL_EXPORT void free_aligned_sized(void *block, size_t alignment, size_t size)
{
    (void)alignment;
    (void)size;
    free_any(block);
}

/* ---- aligned blocks ---- */

enum { VARIANT_MEMALIGN = 0, VARIANT_ALIGNED_ALLOC = 1, VARIANT_POSIX = 2 };

static inline bool is_power_of_two(size_t n)
{
    return n && !(n & (n - 1));
}

static inline uint64_t alignment_aux(size_t alignment, unsigned variant)
{
    return is_power_of_two(alignment) ? variant << 8 | (uint64_t)__builtin_ctzll(alignment) : HL_AUX_EXT;
}

/* Whether an allocation of the functions below is to be recorded: they are not called often enough to be worth more. */
static bool is_wanted(size_t size)
{
    if (unlikely(hl_capture == HL_CAPTURE_NEW))
        image_start();
    return hl_capture == HL_CAPTURE_ALL || (!sample_passes(size) && sample_take(size));
}

HL_EXPORT void *memalign(size_t alignment, size_t size)
{
    if (!is_wanted(size))
        return hl_real.memalign(alignment, size);
    RECORD_ANYHOW(HL_MEMALIGN, size, alignment_aux(alignment, VARIANT_MEMALIGN), !is_power_of_two(alignment),
                  ((struct hl_values){.arg = alignment, .arg2 = VARIANT_MEMALIGN}), REAL(memalign)(alignment, size));
}

HL_EXPORT void *aligned_alloc(size_t alignment, size_t size)
{
    if (!is_wanted(size))
        return hl_real.aligned_alloc(alignment, size);
    RECORD_ANYHOW(HL_MEMALIGN, size, alignment_aux(alignment, VARIANT_ALIGNED_ALLOC), !is_power_of_two(alignment),
                  ((struct hl_values){.arg = alignment, .arg2 = VARIANT_ALIGNED_ALLOC}),
                  REAL(aligned_alloc)(alignment, size));
}

HL_EXPORT int posix_memalign(void **result, size_t alignment, size_t size)
{
    if (!is_wanted(size))
        return hl_real.posix_memalign(result, alignment, size);
    struct caller from = CALLER;
    struct hl_values v = {.arg = alignment, .arg2 = VARIANT_POSIX};
    struct hl_event event;
    bool recorded = alloc_begin(&event, HL_MEMALIGN, size, alignment_aux(alignment, VARIANT_POSIX),
                                !is_power_of_two(alignment), &v, &from);
    int status = REAL(posix_memalign)(result, alignment, size);
    void *block = status == 0 ? *result : NULL;
    if (recorded)
        alloc_end(&event, size, block);
    if (recorded && block && hl_capture == HL_CAPTURE_SAMPLE)
        sample_add(block);
    return status;
}

HL_EXPORT void *valloc(size_t size)
{
    if (!is_wanted(size))
        return hl_real.valloc(size);
    RECORD_ANYHOW(HL_VALLOC, size, 0, 0, NO_VALUES, REAL(valloc)(size));
}

HL_EXPORT void *pvalloc(size_t size)
{
    if (!is_wanted(size))
        return hl_real.pvalloc(size);
    RECORD_ANYHOW(HL_PVALLOC, size, 0, 0, NO_VALUES, REAL(pvalloc)(size));
}

/* ---- the allocator's settings ---- */

HL_EXPORT int malloc_trim(size_t pad)
{
    struct hl_event event;
    struct hl_values v = {.size = pad};
    bool recorded = record_call_begin(&event, HL_MALLOC_TRIM, pad >= HL_SIZE_EXT, 0, CALLER_SP, &v);
    int result = REAL(malloc_trim)(pad);
    v.addr = (uint64_t)(int64_t)result;
    if (recorded)
        record_call_end(&event, &v);
    return result;
}

HL_EXPORT int mallopt(int param, int value)
{
    struct hl_event event;
    struct hl_values v = {.size = (uint64_t)(int64_t)value, .arg = (uint64_t)(int64_t)param};
    bool recorded = record_call_begin(&event, HL_MALLOPT, 1, 0, CALLER_SP, &v);
    int result = REAL(mallopt)(param, value);
    v.addr = (uint64_t)(int64_t)result;
    if (recorded)
        record_call_end(&event, &v);
    return result;
}
