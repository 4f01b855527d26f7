/*
 * program.c: what a program that is about to be started will make of the shim.
 *
 * LD_PRELOAD is inherited, and not everything that a traced program starts can bear it: musl's loader ends a program whose preload
 * it cannot relocate, the 32-bit loader writes a line to stderr, AddressSanitizer refuses to be the second library. Those get an
 * environment without us. Others just never load us; that is said in the log (see process.c). (What is started first by
 * `heapledger run` is looked at by tracer/target.py, before it starts.)
 */
#define _GNU_SOURCE
#include "program.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <unistd.h>

#define SCRIPTS 5 /* as many interpreters of interpreters as the kernel follows */
#define SEGMENTS 32
#define LIBRARIES 48

static bool starts_with(const char *text, const char *prefix)
{
    while (*prefix && *text == *prefix)
        text++, prefix++;
    return !*prefix;
}

/* ---- the ELF file */

struct file {
    int fd;
    uint32_t segments;
    Elf64_Phdr segment[SEGMENTS];
};

/* Reads up to `bytes` at an offset; gives how many there were. */
static size_t read_at(const struct file *f, void *into, size_t bytes, uint64_t offset)
{
    long got = host_call4(SYS_pread64, f->fd, into, bytes, offset);
    return got > 0 ? (size_t)got : 0;
}

static const Elf64_Phdr *segment_of_type(const struct file *f, uint32_t type)
{
    for (uint32_t i = 0; i < f->segments; i++)
        if (f->segment[i].p_type == type)
            return &f->segment[i];
    return NULL;
}

/* Where in the file an address of the loaded program lies; 0 if it does not. */
static uint64_t offset_of(const struct file *f, uint64_t address)
{
    for (uint32_t i = 0; i < f->segments; i++) {
        const Elf64_Phdr *p = &f->segment[i];
        if (p->p_type == PT_LOAD && address - p->p_vaddr < p->p_filesz)
            return p->p_offset + (address - p->p_vaddr);
    }
    return 0;
}

static bool is_sanitizer(const char *library)
{
    static const char *const names[] = {"libasan.", "libtsan.", "libhwasan.", "liblsan.", "libclang_rt.asan",
                                        "libclang_rt.tsan", "libclang_rt.hwasan"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++)
        if (starts_with(library, names[i]))
            return true;
    return false;
}

/* What the dynamic section says. */
struct dynamic {
    bool sanitized; /* one of the libraries it asks for is a sanitizer's */
    bool program;   /* a position-independent program, and no library */
};

static struct dynamic dynamic_read(const struct file *f)
{
    const Elf64_Phdr *section = segment_of_type(f, PT_DYNAMIC);
    struct dynamic found = {0};
    Elf64_Dyn entries[32];
    uint64_t names[LIBRARIES], strings = 0;
    uint32_t count = 0;
    bool over = !section;
    for (uint64_t at = 0; !over && at < section->p_filesz; at += sizeof entries) {
        size_t got = read_at(f, entries, sizeof entries, section->p_offset + at) / sizeof *entries;
        over = got < sizeof entries / sizeof *entries;
        for (size_t i = 0; i < got && entries[i].d_tag != DT_NULL; i++) {
            if (entries[i].d_tag == DT_NEEDED && count < LIBRARIES)
                names[count++] = entries[i].d_un.d_val;
            else if (entries[i].d_tag == DT_STRTAB)
                strings = offset_of(f, entries[i].d_un.d_ptr);
            else if (entries[i].d_tag == DT_FLAGS_1)
                found.program = entries[i].d_un.d_val & DF_1_PIE;
        }
    }
    for (uint32_t i = 0; strings && i < count; i++) {
        char name[32];
        name[read_at(f, name, sizeof name - 1, strings + names[i])] = 0;
        found.sanitized |= is_sanitizer(name);
    }
    return found;
}

static bool loader_is_musl(const struct file *f, const Elf64_Phdr *interpreter)
{
    char path[256];
    size_t room = interpreter->p_filesz < sizeof path - 1 ? interpreter->p_filesz : sizeof path - 1;
    path[read_at(f, path, room, interpreter->p_offset)] = 0;
    return host_contains(path, "ld-musl");
}

static enum program_kind look_at_elf(struct file *f, const Elf64_Ehdr *header)
{
    if (header->e_ident[EI_CLASS] != ELFCLASS64 || header->e_machine != EM_X86_64)
        return PROGRAM_OTHER_WORD;
    if (header->e_phentsize != sizeof(Elf64_Phdr))
        return PROGRAM_TRACEABLE;
    uint32_t count = header->e_phnum < SEGMENTS ? header->e_phnum : SEGMENTS;
    f->segments = (uint32_t)(read_at(f, f->segment, count * sizeof(Elf64_Phdr), header->e_phoff) / sizeof(Elf64_Phdr));
    const Elf64_Phdr *interpreter = segment_of_type(f, PT_INTERP);
    struct dynamic dynamic = dynamic_read(f);
    if (!interpreter) /* the loader itself, started as a program, has none either: a library */
        return header->e_type == ET_DYN && !dynamic.program ? PROGRAM_TRACEABLE : PROGRAM_STATIC;
    if (loader_is_musl(f, interpreter))
        return PROGRAM_OTHER_LIBC;
    return dynamic.sanitized ? PROGRAM_SANITIZED : PROGRAM_TRACEABLE;
}

/* Whether the kernel will run the file as somebody else: then the loader ignores LD_PRELOAD. */
static bool changes_user(const struct file *f)
{
    struct stat info;
    if (host_call2(SYS_fstat, f->fd, &info) < 0 || !(info.st_mode & (S_ISUID | S_ISGID)))
        return false;
    if (host_call4(SYS_prctl, PR_GET_NO_NEW_PRIVS, 0, 0, 0) == 1)
        return false;
    return ((info.st_mode & S_ISUID) && info.st_uid != (uid_t)host_call0(SYS_getuid)) ||
           ((info.st_mode & S_ISGID) && (info.st_mode & S_IXGRP) && info.st_gid != (gid_t)host_call0(SYS_getgid));
}

/* ---- scripts */

/* The interpreter in a script's first line, ended by 0, in place. NULL if there is none. */
static const char *interpreter_of(char *head, size_t length)
{
    if (length < 3 || head[0] != '#' || head[1] != '!')
        return NULL;
    size_t at = 2, end;
    while (at < length && (head[at] == ' ' || head[at] == '\t'))
        at++;
    for (end = at; end < length && head[end] != ' ' && head[end] != '\t' && head[end] != '\n' && head[end];)
        end++;
    if (end == at || end >= length)
        return NULL;
    head[end] = 0;
    return head + at;
}

enum program_kind program_look(int folder, const char *path)
{
    char head[256];
    for (int depth = 0; depth < SCRIPTS && path; depth++) {
        struct file f = {.fd = (int)host_call4(SYS_openat, folder, path, O_RDONLY | O_CLOEXEC | O_NONBLOCK, 0)};
        if (f.fd < 0)
            return PROGRAM_TRACEABLE;
        size_t length = read_at(&f, head, sizeof head, 0);
        bool is_elf = length >= sizeof(Elf64_Ehdr) && __builtin_memcmp(head, ELFMAG, SELFMAG) == 0;
        Elf64_Ehdr header;
        __builtin_memcpy(&header, head, sizeof header);
        enum program_kind kind = is_elf ? look_at_elf(&f, &header) : PROGRAM_TRACEABLE;
        if (kind == PROGRAM_TRACEABLE && is_elf && changes_user(&f))
            kind = PROGRAM_OTHER_USER;
        host_call1(SYS_close, f.fd);
        if (is_elf)
            return kind;
        path = interpreter_of(head, length);
    }
    return PROGRAM_TRACEABLE;
}

const char *program_reason(enum program_kind kind)
{
    switch (kind) {
    case PROGRAM_STATIC: return "statically linked";
    case PROGRAM_OTHER_USER: return "it changes its user";
    case PROGRAM_OTHER_ROOT: return "the shim is out of its reach";
    case PROGRAM_OTHER_LIBC: return "it uses musl";
    case PROGRAM_OTHER_WORD: return "not an x86-64 program";
    case PROGRAM_SANITIZED: return "its sanitizer must be the first library";
    default: return "";
    }
}

/* ---- its environment */

#define PRELOAD "LD_PRELOAD="

bool program_environment_has_shim(char *const *environment)
{
    for (; environment && *environment; environment++)
        if (starts_with(*environment, PRELOAD) && host_contains(*environment, "libheapledger"))
            return true;
    return false;
}

static bool names_shim(const char *text, size_t length)
{
    static const char name[] = "libheapledger";
    for (size_t at = 0; at + sizeof name - 1 <= length; at++)
        if (starts_with(text + at, name))
            return true;
    return false;
}

static bool is_separator(char c)
{
    return c == ':' || c == ' ';
}

/* The shim's entry in the value of LD_PRELOAD, not ended by 0; NULL if it has none. */
static const char *shim_in(const char *value, size_t *length)
{
    for (; *value; value += *length + (value[*length] != 0)) {
        for (*length = 0; value[*length] && !is_separator(value[*length]);)
            ++*length;
        if (names_shim(value, *length))
            return value;
    }
    return NULL;
}

bool program_environment_reaches_shim(char *const *environment)
{
    char path[1024];
    for (; environment && *environment; environment++) {
        size_t length;
        const char *shim = starts_with(*environment, PRELOAD) ? shim_in(*environment + sizeof PRELOAD - 1, &length) : NULL;
        if (!shim || length >= sizeof path)
            continue;
        __builtin_memcpy(path, shim, length);
        path[length] = 0;
        long fd = host_call4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
        if (fd == -ENOENT || fd == -EACCES)
            return false;
        if (fd >= 0)
            host_call1(SYS_close, fd);
    }
    return true;
}

bool program_environment_has_sanitizer(char *const *environment)
{
    for (; environment && *environment; environment++) {
        if (!starts_with(*environment, PRELOAD))
            continue;
        for (const char *name = *environment + sizeof PRELOAD - 1, *c = name; *c; c++) {
            if (*c == '/' || is_separator(*c))
                name = c + 1;
            else if (c == name && is_sanitizer(name))
                return true;
        }
    }
    return false;
}

/* Copies the entries of LD_PRELOAD that are not the shim. Returns how many characters; 0: nothing is left. */
static size_t copy_others(char *into, const char *value)
{
    size_t n = 0;
    while (*value) {
        size_t length = 0;
        while (value[length] && !is_separator(value[length]))
            length++;
        if (length && !names_shim(value, length)) {
            if (n)
                into[n++] = ':';
            __builtin_memcpy(into + n, value, length);
            n += length;
        }
        value += length + (value[length] != 0);
    }
    into[n] = 0;
    return n;
}

struct program_environment program_clean_environment(char *const *environment)
{
    struct program_environment clean = {0};
    size_t count = 0, text = 0;
    for (; environment[count]; count++)
        if (starts_with(environment[count], PRELOAD)) {
            for (const char *c = environment[count]; *c; c++)
                text++;
            text++;
        }
    size_t bytes = (count + 1) * sizeof(char *) + text;
    clean.list = host_map_private(bytes);
    if (!clean.list)
        return clean;
    clean.bytes = bytes;
    char *room = (char *)(clean.list + count + 1);
    size_t kept = 0;
    for (size_t i = 0; i < count; i++) {
        const size_t name = sizeof PRELOAD - 1;
        if (!starts_with(environment[i], PRELOAD)) {
            clean.list[kept++] = environment[i];
            continue;
        }
        __builtin_memcpy(room, PRELOAD, name);
        size_t length = copy_others(room + name, environment[i] + name);
        if (length) {
            clean.list[kept++] = room;
            room += name + length + 1;
        }
    }
    clean.list[kept] = NULL;
    return clean;
}

void program_environment_free(struct program_environment *clean)
{
    if (clean->list)
        host_unmap(clean->list, clean->bytes);
    clean->list = NULL;
}
