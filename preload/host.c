/* host.c: all that is asked of the operating system and of libc. See host.h for the contracts. */
#define _GNU_SOURCE
#include "host.h"

#include <elf.h>
#include <errno.h>
#include <link.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>

#ifndef MAP_FIXED_NOREPLACE
#define MAP_FIXED_NOREPLACE 0x100000
#endif
#ifndef MADV_WIPEONFORK
#define MADV_WIPEONFORK 18
#endif

/*
 * Where our mappings go: far from the heap, from where the kernel places mappings (below the stack) and from the
 * shadow memory of the sanitizers. The first base that works for the process is kept.
 */
static const uint64_t far_bases[] = {0x110000000000ull, 0x210000000000ull, 0x310000000000ull, 0x410000000000ull};
bool host_frugal;

#define FAR_SPAN (1ull << 38)
#define FAR_GAP 4096ull

static uint64_t far_next; /* next address to try; 0 before the first mapping */
static uint64_t far_base;

void host_far_range(uint64_t *low, uint64_t *high)
{
    *low = far_base;
    *high = far_base ? far_base + FAR_SPAN : 0;
}

static long map_at(uint64_t address, size_t bytes, int flags, int fd)
{
    return host_call(SYS_mmap, (long)address, (long)bytes, PROT_READ | PROT_WRITE, flags, fd, 0);
}

/* True when the base takes a mapping exactly where it is asked (old kernels treat the flag as a hint). */
static bool far_base_works(uint64_t base)
{
    long got = map_at(base, HL_PAGE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1);
    if (got < 0 && got > -4096)
        return false;
    host_call2(SYS_munmap, got, HL_PAGE);
    return (uint64_t)got == base;
}

static uint64_t far_choose(void)
{
    for (size_t i = 0; i < sizeof far_bases / sizeof *far_bases; i++) {
        if (!far_base_works(far_bases[i]))
            continue;
        uint64_t none = 0;
        if (__atomic_compare_exchange_n(&far_base, &none, far_bases[i], false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            __atomic_store_n(&far_next, far_bases[i], __ATOMIC_SEQ_CST);
        break;
    }
    return far_base;
}

static void *map_far(size_t bytes, int flags, int fd)
{
    bytes = (bytes + HL_PAGE - 1) & ~(size_t)(HL_PAGE - 1);
    if (!__atomic_load_n(&far_next, __ATOMIC_SEQ_CST) && !far_choose())
        return NULL;
    for (int attempt = 0; attempt < 64; attempt++) {
        uint64_t at = __atomic_fetch_add(&far_next, bytes + FAR_GAP, __ATOMIC_SEQ_CST);
        if (at < far_base || at + bytes > far_base + FAR_SPAN)
            return NULL;
        long got = map_at(at, bytes, flags | MAP_FIXED_NOREPLACE, fd);
        if ((uint64_t)got == at)
            return (void *)at;
        if (got == -EEXIST)
            continue;
        if (got < 0 && got > -4096)
            return NULL;
        host_call2(SYS_munmap, got, bytes);
    }
    return NULL;
}

void *host_map_private(size_t bytes)
{
    return map_far(bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

void *host_map_wiped(size_t bytes)
{
    void *start = host_map_private(bytes);
    if (start && host_call3(SYS_madvise, start, bytes, MADV_WIPEONFORK) != 0) {
        host_unmap(start, bytes);
        return NULL;
    }
    return start;
}

void *host_map_file(int fd, size_t bytes)
{
    return map_far(bytes, MAP_SHARED, fd);
}

void host_unmap(void *start, size_t bytes)
{
    host_call2(SYS_munmap, start, bytes);
}

void host_blank(void *start, size_t bytes)
{
    map_at((uint64_t)start, bytes, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1);
}

uint64_t host_now_ns(void)
{
    struct timespec now;
    host_call2(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

void host_sleep_ns(uint64_t ns)
{
    static uint32_t never; /* a futex, because those are allowed wherever there are threads */
    struct timespec span = {.tv_sec = (time_t)(ns / 1000000000ull), .tv_nsec = (long)(ns % 1000000000ull)};
    host_call4(SYS_futex, &never, FUTEX_WAIT_PRIVATE, 0, &span);
}

int host_pid(void)
{
    return (int)host_call0(SYS_getpid);
}

int host_tid(void)
{
    return (int)host_call0(SYS_gettid);
}

void host_signals_block(uint64_t *saved)
{
    uint64_t all = ~0ull;
    host_call4(SYS_rt_sigprocmask, 0 /* SIG_BLOCK */, &all, saved, 8);
}

void host_signals_restore(const uint64_t *saved)
{
    host_call4(SYS_rt_sigprocmask, 2 /* SIG_SETMASK */, saved, NULL, 8);
}

static struct stat first_stderr;

void host_note_stderr(void)
{
    if (host_call2(SYS_fstat, 2, &first_stderr) < 0)
        first_stderr.st_ino = 0;
}

void host_complain(const char *text)
{
    struct stat now;
    size_t length = 0;
    if (host_frugal || host_call2(SYS_fstat, 2, &now) < 0 || now.st_ino != first_stderr.st_ino || now.st_dev != first_stderr.st_dev)
        return;
    while (text[length])
        length++;
    host_call3(SYS_write, 2, text, length);
}

extern char **environ;

char **host_environment(void)
{
    return environ;
}

/* ---- looking up a symbol without dlsym ---- */

struct object {
    const ElfW(Sym) * symbols;
    const char *strings;
    const uint16_t *versions;
    const uint32_t *gnu_hash;
    const uint32_t *sysv_hash;
    uintptr_t bias;
};

struct lookup {
    const char *name;
    uintptr_t self;   /* an address in the shim */
    bool behind_self; /* only objects after the shim, and not the dynamic linker (2.31's has a malloc of its own) */
    bool passed_self;
    void *found;
};

static bool same_text(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

bool host_contains(const char *text, const char *part)
{
    for (; *text; text++) {
        size_t i = 0;
        while (part[i] && text[i] == part[i])
            i++;
        if (!part[i])
            return true;
    }
    return false;
}

/* glibc writes absolute addresses into a loaded object's dynamic section; accept plain offsets as well. */
static const void *dynamic_address(uintptr_t bias, ElfW(Addr) value)
{
    return (const void *)(value < bias ? bias + value : value);
}

static bool object_open(struct object *o, const struct dl_phdr_info *info)
{
    const ElfW(Dyn) *dynamic = NULL;
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_DYNAMIC)
            dynamic = (const void *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
    *o = (struct object){.bias = info->dlpi_addr};
    for (; dynamic && dynamic->d_tag != DT_NULL; dynamic++) {
        const void *at = dynamic_address(o->bias, dynamic->d_un.d_ptr);
        if (dynamic->d_tag == DT_SYMTAB)
            o->symbols = at;
        else if (dynamic->d_tag == DT_STRTAB)
            o->strings = at;
        else if (dynamic->d_tag == DT_VERSYM)
            o->versions = at;
        else if (dynamic->d_tag == DT_GNU_HASH)
            o->gnu_hash = at;
        else if (dynamic->d_tag == DT_HASH)
            o->sysv_hash = at;
    }
    return o->symbols && o->strings && (o->gnu_hash || o->sysv_hash);
}

/* The address that symbol i gives if it defines `name` in its default version, else NULL. */
static void *object_symbol(const struct object *o, uint32_t i, const char *name)
{
    const ElfW(Sym) *s = &o->symbols[i];
    int type = ELF64_ST_TYPE(s->st_info);
    if (s->st_shndx == SHN_UNDEF || (type != STT_FUNC && type != STT_OBJECT && type != STT_GNU_IFUNC))
        return NULL;
    if (o->versions && (o->versions[i] & 0x8000))
        return NULL;
    if (!same_text(o->strings + s->st_name, name))
        return NULL;
    void *address = (void *)(o->bias + s->st_value);
    return type == STT_GNU_IFUNC ? ((void *(*)(void))address)() : address;
}

static void *find_by_gnu_hash(const struct object *o, const char *name)
{
    const uint32_t *table = o->gnu_hash;
    uint32_t buckets = table[0], first = table[1], bloom = table[2], hash = 5381;
    if (!buckets)
        return NULL;
    for (const char *c = name; *c; c++)
        hash = hash * 33 + (unsigned char)*c;
    const uint32_t *bucket = table + 4 + bloom * 2;
    const uint32_t *chain = bucket + buckets;
    uint32_t i = bucket[hash % buckets];
    if (i < first)
        return NULL;
    for (;; i++) {
        uint32_t entry = chain[i - first];
        void *found = (entry | 1) == (hash | 1) ? object_symbol(o, i, name) : NULL;
        if (found || (entry & 1))
            return found;
    }
}

static void *find_by_sysv_hash(const struct object *o, const char *name)
{
    uint32_t hash = 0;
    for (const char *c = name; *c; c++) {
        hash = (hash << 4) + (unsigned char)*c;
        hash = (hash ^ ((hash & 0xf0000000) >> 24)) & 0x0fffffff;
    }
    const uint32_t *bucket = o->sysv_hash + 2, *chain = bucket + o->sysv_hash[0];
    for (uint32_t i = o->sysv_hash[0] ? bucket[hash % o->sysv_hash[0]] : 0; i; i = chain[i]) {
        void *found = object_symbol(o, i, name);
        if (found)
            return found;
    }
    return NULL;
}

static bool object_holds(const struct dl_phdr_info *info, uintptr_t address)
{
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *p = &info->dlpi_phdr[i];
        if (p->p_type == PT_LOAD && address - (info->dlpi_addr + p->p_vaddr) < p->p_memsz)
            return true;
    }
    return false;
}

static int lookup_in_object(struct dl_phdr_info *info, size_t size, void *data)
{
    (void)size;
    struct lookup *l = data;
    const char *path = info->dlpi_name ? info->dlpi_name : "";
    if (object_holds(info, l->self)) {
        l->passed_self = true;
        return 0;
    }
    if (host_contains(path, "linux-vdso") || host_contains(path, "linux-gate"))
        return 0;
    if (l->behind_self && (!l->passed_self || host_contains(path, "/ld-")))
        return 0;
    struct object o;
    if (object_open(&o, info))
        l->found = o.gnu_hash ? find_by_gnu_hash(&o, l->name) : find_by_sysv_hash(&o, l->name);
    return l->found != NULL;
}

void *host_symbol(const char *name)
{
    struct lookup l = {.name = name, .self = (uintptr_t)&far_bases, .behind_self = true};
    dl_iterate_phdr(lookup_in_object, &l);
    if (!l.found) {
        l.behind_self = false;
        dl_iterate_phdr(lookup_in_object, &l);
    }
    return l.found;
}

struct definitions {
    const char *const *names;
    size_t count;
    uint32_t objects; /* still to be looked at */
    const char *found;
};

static int look_for_names(struct dl_phdr_info *info, size_t size, void *data)
{
    (void)size;
    struct definitions *d = data;
    struct object o;
    if (!d->objects)
        return 1;
    d->objects--;
    if (object_holds(info, (uintptr_t)&far_bases) || !object_open(&o, info))
        return 0;
    for (size_t i = 0; i < d->count && !d->found; i++)
        if (o.gnu_hash ? find_by_gnu_hash(&o, d->names[i]) : find_by_sysv_hash(&o, d->names[i]))
            d->found = d->names[i];
    return d->found != NULL;
}

const char *host_first_defined(const char *const *names, size_t count, uint32_t objects)
{
    struct definitions d = {.names = names, .count = count, .objects = objects};
    dl_iterate_phdr(look_for_names, &d);
    return d.found;
}

static int count_object(struct dl_phdr_info *info, size_t size, void *count)
{
    (void)info;
    (void)size;
    ++*(uint32_t *)count;
    return 0;
}

uint32_t host_object_count(void)
{
    uint32_t count = 0;
    dl_iterate_phdr(count_object, &count);
    return count;
}

struct owner {
    uintptr_t address;
    const char *path;
};

static int note_owner(struct dl_phdr_info *info, size_t size, void *data)
{
    (void)size;
    struct owner *o = data;
    if (object_holds(info, o->address))
        o->path = info->dlpi_name ? info->dlpi_name : "";
    return o->path != NULL;
}

const char *host_object_path(const void *address)
{
    struct owner o = {.address = (uintptr_t)address};
    dl_iterate_phdr(note_owner, &o);
    return o.path;
}
