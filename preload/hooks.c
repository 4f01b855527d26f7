/* hooks.c: the table of real functions, and the interposed functions of malloc. See also syscalls.c, threads.c, process.c, loader.c. */
#define _GNU_SOURCE
#include "hooks.h"

#include <errno.h>

#include "image.h"
#include "modules.h"

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
    return block && hl_words ? ((const uint64_t *)block)[-1] : 0;
}

/*
 * Entry of an allocator call. aux: the 16 bits beside the size; exts: slots behind the first one that hold `v`. A size that
 * does not fit needs one. False: not recorded.
 */
static inline __attribute__((always_inline)) bool alloc_begin(struct hl_event *e, unsigned kind, uint64_t size, uint64_t aux,
                                                              uint32_t exts, struct hl_values *v, uint32_t stack,
                                                              struct hl_thread *t, uintptr_t sp)
{
    if (unlikely(size >= HL_SIZE_EXT))
        exts = 1;
    if (!record_reserve(e, t, 1 + exts, sp))
        return false;
    if (unlikely(exts)) {
        v->size = size;
        record_extend(e, v);
    }
    record_open(e, kind, stack, 0, aux << 48 | (size >= HL_SIZE_EXT ? HL_SIZE_EXT : size));
    return true;
}

/* Exit of an allocator call that gave `block` (or NULL). */
static inline __attribute__((always_inline)) void alloc_end(struct hl_event *e, uint64_t size, const void *block)
{
    uint64_t word = word_before(block);
    record_result(e, (uint64_t)block, block ? word - HL_CHUNK(size) : 0, word);
}

/* Records `call`, which gives a block. Used in a function of hooks; `recorded` is its event's begin. */
#define RECORD_BLOCK(kind, size, aux, exts, values, call)                                                              \
    struct hl_event event;                                                                                             \
    struct hl_thread *thread = record_thread();                                                                        \
    bool recorded = thread && alloc_begin(&event, kind, size, aux, exts, values, CALLER_STACK, thread, CALLER_SP);     \
    void *block = call;                                                                                                \
    if (likely(recorded))                                                                                              \
        alloc_end(&event, size, block);                                                                                \
    return block

/* ---- malloc and its kin ---- */

HL_EXPORT void *malloc(size_t size)
{
    struct hl_values v = {0};
    RECORD_BLOCK(HL_MALLOC, size, 0, 0, &v, REAL(malloc)(size));
}

HL_EXPORT void *calloc(size_t count, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes))
        bytes = SIZE_MAX;
    struct hl_values v = {.arg = count};
    bool wide = count >= HL_AUX_EXT;
    RECORD_BLOCK(HL_CALLOC, bytes, wide ? HL_AUX_EXT : count, wide, &v, REAL(calloc)(count, size));
}

HL_EXPORT void *realloc(void *old, size_t size)
{
    struct hl_values v = {.arg = (uint64_t)old, .arg2 = word_before(old)};
    RECORD_BLOCK(HL_REALLOC, size, 0, old != NULL, &v, REAL(realloc)(old, size));
}

/* As libc's, which would call our realloc: so the product is checked here. */
HL_EXPORT void *reallocarray(void *old, size_t count, size_t size)
{
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    struct hl_values v = {.arg = (uint64_t)old, .arg2 = word_before(old)};
    RECORD_BLOCK(HL_REALLOC, bytes, 0, old != NULL, &v, REAL(realloc)(old, bytes));
}

/* Recorded before the real call, so that the address cannot be seen to be used again before. */
static inline __attribute__((always_inline)) void free_block(void *block, uintptr_t ip, uintptr_t sp, uintptr_t bp)
{
    struct hl_event event;
    struct hl_thread *thread = record_thread();
    uint64_t word = word_before(block);
    bool wide = word >= HL_SIZE_EXT;
    uint32_t stack = thread && hl_settings.free_stacks ? stack_capture(ip, sp, bp) : 0;
    if (!thread || !record_reserve(&event, thread, 1 + wide, sp)) {
        REAL(free)(block);
        return;
    }
    if (unlikely(wide)) {
        struct hl_values v = {.size = word};
        record_extend(&event, &v);
    }
    record_open(&event, HL_FREE, stack, (uint64_t)block & HL_ADDR_MASK, wide ? HL_SIZE_EXT : word);
    hl_real.free(block);
    record_result(&event, (uint64_t)block, 0, 0);
}

HL_EXPORT void free(void *block)
{
    free_block(block, CALLER_IP, CALLER_SP, CALLER_BP);
}

HL_EXPORT void cfree(void *block)
{
    free_block(block, CALLER_IP, CALLER_SP, CALLER_BP);
}

/* C23, in newer libcs: the same as free there, without passing through it. */
HL_EXPORT void free_sized(void *block, size_t size)
{
    (void)size;
    free_block(block, CALLER_IP, CALLER_SP, CALLER_BP);
}

HL_EXPORT void free_aligned_sized(void *block, size_t alignment, size_t size)
{
    (void)alignment;
    (void)size;
    free_block(block, CALLER_IP, CALLER_SP, CALLER_BP);
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

HL_EXPORT void *memalign(size_t alignment, size_t size)
{
    struct hl_values v = {.arg = alignment, .arg2 = VARIANT_MEMALIGN};
    RECORD_BLOCK(HL_MEMALIGN, size, alignment_aux(alignment, VARIANT_MEMALIGN), !is_power_of_two(alignment), &v,
                 REAL(memalign)(alignment, size));
}

HL_EXPORT void *aligned_alloc(size_t alignment, size_t size)
{
    struct hl_values v = {.arg = alignment, .arg2 = VARIANT_ALIGNED_ALLOC};
    RECORD_BLOCK(HL_MEMALIGN, size, alignment_aux(alignment, VARIANT_ALIGNED_ALLOC), !is_power_of_two(alignment), &v,
                 REAL(aligned_alloc)(alignment, size));
}

HL_EXPORT int posix_memalign(void **result, size_t alignment, size_t size)
{
    struct hl_values v = {.arg = alignment, .arg2 = VARIANT_POSIX};
    struct hl_event event;
    struct hl_thread *thread = record_thread();
    bool recorded = thread && alloc_begin(&event, HL_MEMALIGN, size, alignment_aux(alignment, VARIANT_POSIX),
                                          !is_power_of_two(alignment), &v, CALLER_STACK, thread, CALLER_SP);
    int status = REAL(posix_memalign)(result, alignment, size);
    if (likely(recorded))
        alloc_end(&event, size, status == 0 ? *result : NULL);
    return status;
}

HL_EXPORT void *valloc(size_t size)
{
    struct hl_values v = {0};
    RECORD_BLOCK(HL_VALLOC, size, 0, 0, &v, REAL(valloc)(size));
}

HL_EXPORT void *pvalloc(size_t size)
{
    struct hl_values v = {0};
    RECORD_BLOCK(HL_PVALLOC, size, 0, 0, &v, REAL(pvalloc)(size));
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
