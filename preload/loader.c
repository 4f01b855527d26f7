/*
 * loader.c: dlopen, dlmopen, dlclose.
 *
 * The real dlopen takes its return address to find out who called ($ORIGIN, RUNPATH, namespace): were our function to call
 * it, the answer would be "the shim". So the hooks record first and then jump, with every argument and the caller's return
 * address in place. What was loaded is noticed when the first call comes from it (modules_find).

 *
 * RTLD_DEEPBIND makes an object find malloc in libc before it finds ours: then its calls are not seen, while its blocks are freed
 * elsewhere. So the flag is dropped, and that is said in the log, unless it has a meaning: the object defines something that the
 * program also defines, and the flag is what makes it find its own. (The definitions of further objects that it needs are not
 * compared.)
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>

#include "guard.h"
#include "hooks.h"
#include "image.h"
#include "loader.h"
#include "modules.h"

static void *load_nothing(void)
{
    return NULL;
}

static uint32_t objects_at_start;

void loader_note_start(void)
{
    if (!objects_at_start)
        objects_at_start = host_object_count();
}

/* ---- RTLD_DEEPBIND */

#define TABLES_MAX (64u << 20) /* symbols and their names, bytes; a larger object is not looked at */

/* A part of a file in memory of our own. */
struct part {
    char *start;
    size_t bytes;
};

static struct part part_read(int fd, uint64_t offset, uint64_t bytes)
{
    struct part p = {0};
    if (!bytes || bytes > TABLES_MAX || !(p.start = host_map_private(bytes)))
        return p;
    p.bytes = bytes;
    for (size_t at = 0; at < bytes;) {
        long got = host_call4(SYS_pread64, fd, p.start + at, bytes - at, offset + at);
        if (got <= 0)
            break;
        at += (size_t)got;
    }
    return p;
}

static void part_free(struct part *p)
{
    if (p->start)
        host_unmap(p->start, p->bytes);
}

/* Every library built by an old linker has these. */
static bool is_everywhere(const char *name)
{
    static const char *const names[] = {"_init", "_fini", "_edata", "_end", "__bss_start"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        size_t n = 0;
        while (name[n] && name[n] == names[i][n])
            n++;
        if (!name[n] && !names[i][n])
            return true;
    }
    return false;
}

/* Whether others would find a symbol by its name, and it is not one of those that may be anybody's (weak, as inline functions). */
static bool is_definition(const Elf64_Sym *s)
{
    unsigned type = ELF64_ST_TYPE(s->st_info);
    return s->st_shndx != SHN_UNDEF && ELF64_ST_BIND(s->st_info) == STB_GLOBAL && ELF64_ST_VISIBILITY(s->st_other) == STV_DEFAULT &&
           (type == STT_FUNC || type == STT_OBJECT || type == STT_GNU_IFUNC);
}

/* Whether one of the symbols is defined by what was there at the start of the program. The last byte of `strings` is 0. */
static bool symbols_clash(const struct part *symbols, const struct part *strings)
{
    const Elf64_Sym *s = (const Elf64_Sym *)(const void *)symbols->start;
    size_t count = symbols->bytes / sizeof *s, kept = 0;
    struct part names = {.bytes = (count + 1) * sizeof(char *)};
    names.start = host_map_private(names.bytes);
    const char **list = (const char **)(void *)names.start;
    for (size_t i = 1; list && i < count; i++)
        if (is_definition(&s[i]) && s[i].st_name < strings->bytes && !is_everywhere(strings->start + s[i].st_name))
            list[kept++] = strings->start + s[i].st_name;
    bool clash = list && host_first_defined(list, kept, objects_at_start);
    part_free(&names);
    return clash;
}

static bool file_clashes(int fd)
{
    Elf64_Ehdr header;
    bool clash = false;
    if (host_call4(SYS_pread64, fd, &header, sizeof header, 0) != (long)sizeof header ||
        __builtin_memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 || header.e_shentsize != sizeof(Elf64_Shdr))
        return false;
    struct part sections = part_read(fd, header.e_shoff, (uint64_t)header.e_shnum * sizeof(Elf64_Shdr));
    const Elf64_Shdr *list = (const Elf64_Shdr *)(const void *)sections.start;
    for (uint32_t i = 0; list && i < header.e_shnum; i++) {
        if (list[i].sh_type != SHT_DYNSYM || list[i].sh_link >= header.e_shnum)
            continue;
        struct part symbols = part_read(fd, list[i].sh_offset, list[i].sh_size);
        struct part strings = part_read(fd, list[list[i].sh_link].sh_offset, list[list[i].sh_link].sh_size);
        if (symbols.start && strings.start) {
            strings.start[strings.bytes - 1] = 0;
            clash = symbols_clash(&symbols, &strings);
        }
        part_free(&symbols);
        part_free(&strings);
        break;
    }
    part_free(&sections);
    return clash;
}

/* The flags to load with. A name without a slash is searched for by the loader in its own way: that file is not looked at. */
static int flags_for(const char *path, int flags)
{
    if (!path || !(flags & RTLD_DEEPBIND) || hl_image->mode != HL_MODE_ON || host_frugal)
        return flags;
    int fd = host_contains(path, "/") ? (int)host_call4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0) : -1;
    bool clash = fd >= 0 && file_clashes(fd);
    if (fd >= 0)
        host_call1(SYS_close, fd);
    modules_log_remark(clash ? "calls are not seen of what must be bound deeply (RTLD_DEEPBIND): "
                             : "loaded without RTLD_DEEPBIND, so that its calls are seen: ", path);
    return clash ? flags : flags & ~RTLD_DEEPBIND;
}

/* ---- the hooks */

static void loading(void)
{
    struct hl_values v = {0};
    if (!record_thread())
        return;
    record_instant(HL_DLOPEN, 0, &v);
    modules_expect();
}

/* The arguments as the hook has saved them. */
struct saved {
    uint64_t rdx, rsi, rdi;
};

/* Where the dlopen hook jumps to. */
__attribute__((used)) static void *loader_before_dlopen(struct saved *s)
{
    loading();
    s->rsi = (uint64_t)(int64_t)flags_for((const char *)s->rdi, (int)s->rsi);
    void *real = (void *)REAL(dlopen);
    return real ? real : (void *)load_nothing;
}

__attribute__((used)) static void *loader_before_dlmopen(struct saved *s)
{
    loading();
    if (s->rdi == LM_ID_BASE)
        s->rdx = (uint64_t)(int64_t)flags_for((const char *)s->rsi, (int)s->rdx);
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
            "movq %rsp, %rdi\n"                                                                                        \
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
