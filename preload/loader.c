/*
 * loader.c: dlopen, dlmopen, dlclose.
 *
 * The real dlopen takes its return address to find out who called ($ORIGIN, RUNPATH, namespace): were our function to call
 * it, the answer would be "the shim". So the hooks record first and then jump, with every argument and the caller's return
 * address in place. What was loaded is noticed when the first call comes from it (modules_find).
 */
#define _GNU_SOURCE
#include "hooks.h"
#include "image.h"
#include "modules.h"

static void *load_nothing(void)
{
    return NULL;
}

static void loading(void)
{
    struct hl_values v = {0};
    if (!record_thread())
        return;
    record_instant(HL_DLOPEN, 0, &v);
    modules_expect();
}

/* Where the dlopen hook jumps to. */
__attribute__((used)) static void *loader_before_dlopen(void)
{
    loading();
    void *real = (void *)REAL(dlopen);
    return real ? real : (void *)load_nothing;
}

__attribute__((used)) static void *loader_before_dlmopen(void)
{
    loading();
    void *real = (void *)REAL(dlmopen);
    return real ? real : (void *)load_nothing;
}

#define JUMPING_HOOK(name)                                                                                             \
    __asm__(".text\n"                                                                                                  \
            ".globl " #name "\n"                                                                                       \
            ".type " #name ", @function\n" #name ":\n"                                                                 \
            ".cfi_startproc\n"                                                                                         \
            "endbr64\n"                                                                                                \
            "pushq %rdi\n.cfi_adjust_cfa_offset 8\n"                                                                   \
            "pushq %rsi\n.cfi_adjust_cfa_offset 8\n"                                                                   \
            "pushq %rdx\n.cfi_adjust_cfa_offset 8\n"                                                                   \
            "call loader_before_" #name "\n"                                                                           \
            "popq %rdx\n.cfi_adjust_cfa_offset -8\n"                                                                   \
            "popq %rsi\n.cfi_adjust_cfa_offset -8\n"                                                                   \
            "popq %rdi\n.cfi_adjust_cfa_offset -8\n"                                                                   \
            "jmp *%rax\n"                                                                                              \
            ".cfi_endproc\n"                                                                                           \
            ".size " #name ", .-" #name "\n")

JUMPING_HOOK(dlopen);
JUMPING_HOOK(dlmopen);

HL_EXPORT int dlclose(void *handle)
{
    int result = REAL(dlclose)(handle);
    struct hl_values v = {.addr = (uint64_t)handle, .arg = (uint64_t)(int64_t)result};
    record_instant(HL_DLCLOSE, 1, &v);
    modules_refresh();
    return result;
}
