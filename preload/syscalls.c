/* syscalls.c: the program's own mmap, brk and their kin (what libc calls for itself does not pass here). */
#define _GNU_SOURCE
#include <stdarg.h>

#include <sys/mman.h>

#include "hooks.h"
#include "image.h"

/* Nothing is walked, and no memory made for it, where nothing is recorded. */
#define STACK (image_start() ? CALLER_STACK : 0)

#define SIGNED(x) ((uint64_t)(int64_t)(x))

/* The break as the kernel has it. */
static uint64_t break_now(void)
{
    return (uint64_t)host_call1(SYS_brk, 0);
}

HL_EXPORT void *mmap(void *hint, size_t length, int prot, int flags, int fd, off_t offset)
{
    struct hl_event event;
    struct hl_values v = {.size = length, .arg = (uint64_t)hint, .word = (uint64_t)offset,
                          .arg2 = (uint64_t)(uint32_t)prot + ((uint64_t)(uint32_t)flags << 16)};
    bool recorded = record_call_begin(&event, HL_MMAP, 2, STACK, CALLER_SP, &v);
    void *result = REAL(mmap)(hint, length, prot, flags, fd, offset);
    v.addr = (uint64_t)result;
    if (recorded)
        record_call_end(&event, &v);
    return result;
}

/* On x86-64 off_t has 64 bits: the same function under its other name. */
extern HL_EXPORT void *mmap64(void *hint, size_t length, int prot, int flags, int fd, off_t offset)
    __attribute__((alias("mmap")));

HL_EXPORT int munmap(void *start, size_t length)
{
    struct hl_event event;
    struct hl_values v = {.addr = (uint64_t)start, .size = length};
    bool recorded = record_call_begin(&event, HL_MUNMAP, 1, 0, CALLER_SP, &v);
    int result = REAL(munmap)(start, length);
    v.arg = SIGNED(result);
    if (recorded)
        record_call_end(&event, &v);
    return result;
}

HL_EXPORT void *mremap(void *old, size_t old_length, size_t length, int flags, ...)
{
    va_list more;
    va_start(more, flags);
    void *wanted = va_arg(more, void *); /* means nothing unless the flags say so; passed on all the same */
    va_end(more);
    struct hl_event event;
    struct hl_values v = {.size = length, .arg = (uint64_t)old, .arg2 = (uint64_t)(uint32_t)flags, .word = old_length};
    bool recorded = record_call_begin(&event, HL_MREMAP, 2, STACK, CALLER_SP, &v);
    void *result = REAL(mremap)(old, old_length, length, flags, wanted);
    v.addr = (uint64_t)result;
    if (recorded)
        record_call_end(&event, &v);
    return result;
}

HL_EXPORT int mprotect(void *start, size_t length, int prot)
{
    struct hl_event event;
    struct hl_values v = {.addr = (uint64_t)start, .size = length, .arg2 = (uint64_t)(uint32_t)prot};
    bool recorded = record_call_begin(&event, HL_MPROTECT, 1, 0, CALLER_SP, &v);
    int result = REAL(mprotect)(start, length, prot);
    v.arg = SIGNED(result);
    if (recorded)
        record_call_end(&event, &v);
    return result;
}

HL_EXPORT int madvise(void *start, size_t length, int advice)
{
    struct hl_event event;
    struct hl_values v = {.addr = (uint64_t)start, .size = length, .arg2 = SIGNED(advice)};
    bool recorded = record_call_begin(&event, HL_MADVISE, 1, 0, CALLER_SP, &v);
    int result = REAL(madvise)(start, length, advice);
    v.arg = SIGNED(result);
    if (recorded)
        record_call_end(&event, &v);
    return result;
}

HL_EXPORT int brk(void *wanted)
{
    struct hl_event event;
    struct hl_values v = {.arg = (uint64_t)wanted};
    bool recorded = record_call_begin(&event, HL_BRK, 1, STACK, CALLER_SP, &v);
    int result = REAL(brk)(wanted);
    v.addr = break_now();
    if (recorded)
        record_call_end(&event, &v);
    return result;
}

HL_EXPORT void *sbrk(intptr_t increment)
{
    struct hl_event event;
    struct hl_values v = {.size = SIGNED(increment)};
    bool recorded = record_call_begin(&event, HL_SBRK, 1, STACK, CALLER_SP, &v);
    void *result = REAL(sbrk)(increment);
    v.addr = (uint64_t)result;
    if (recorded)
        record_call_end(&event, &v);
    return result;
}
