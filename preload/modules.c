/* modules.c: which objects are loaded where; the P, A, E, M and U lines of the log (drawn in spool.h). */
#define _GNU_SOURCE
#include "modules.h"

#include <elf.h>
#include <fcntl.h>
#include <link.h>

#include "guard.h"
#include "image.h"
#include "spool_files.h"
#include "stack.h"

#define MODULES_MAX 4096

/* One loaded object. `high` is stored last and set to 0 first: a reader without the lock sees all of it or nothing. */
struct module {
    uint64_t low, high, bias;
    const char *path; /* in our own memory */
    char build_id[65];
    uint32_t number; /* as in its M line */
    uint32_t seen; /* the refresh that saw it last */
};

/* Inherited by fork (a child starts from it); written under hl_image->module_lock. */
static struct module *modules;
static uint32_t module_count; /* slots used so far; those with high = 0 are free */
static uint32_t next_number;
static char *texts, *texts_end;
static bool expecting;
static uint32_t refreshes;
static bool truncated;

/* ---- text ---- */

static const char *keep_text(const char *text)
{
    size_t n = 0;
    while (text[n])
        n++;
    if ((size_t)(texts_end - texts) < n + 1) {
        size_t room = n + 1 > 65536 ? n + 1 : 65536;
        texts = host_map_private(room);
        texts_end = texts ? texts + room : NULL;
        if (!texts)
            return "";
    }
    char *kept = texts;
    texts += n + 1;
    text_put(kept, n + 1, text);
    return kept;
}

static bool same_text(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

/*
 * A line of the log under construction; too long a text is cut. There is one, like every large buffer here static and under
 * module_lock: a thread's whole stack may have 16 KB, a signal's 8.
 */
struct line {
    size_t length;
    char text[8192];
};
static struct line line;
static char own_path_buffer[4096], arguments[16384];

static void line_text(const char *text)
{
    line.length += text_put(line.text + line.length, sizeof line.text - 8 - line.length, text);
}

static void line_number(uint64_t value, unsigned base)
{
    line.length += text_put_number(line.text + line.length, sizeof line.text - 8 - line.length, value, base);
}

/* Tab, newline and backslash become \t, \n, \\. */
static void line_escaped(const char *text)
{
    for (; *text && line.length + 16 < sizeof line.text; text++) {
        char escape = *text == '\t' ? 't' : *text == '\n' ? 'n' : *text == '\\' ? '\\' : 0;
        if (escape)
            line.text[line.length++] = '\\';
        line.text[line.length++] = escape ? escape : *text;
    }
}

static void line_write(void)
{
    line.text[line.length++] = '\n';
    spool_append("log", line.text, line.length);
    line.length = 0;
}

static void log_remark(const char *text, const char *path)
{
    line_text("S\t");
    line_text(text);
    line_escaped(path);
    line_write();
}

void modules_log_remark(const char *text, const char *path)
{
    struct hl_guard g = guard_enter(&hl_image->module_lock);
    log_remark(text, path);
    guard_leave(&g);
}

static void log_loaded(const struct module *m)
{
    line_text("M\t");
    line_number(m->number, 10);
    line_text("\t");
    line_number(hl_control_page->seq, 10);
    line_text("\t");
    line_number(m->bias, 16);
    line_text("\t");
    line_number(m->low, 16);
    line_text("\t");
    line_number(m->high, 16);
    line_text("\t");
    line_text(m->build_id);
    line_text("\t");
    line_escaped(m->path);
    line_write();
}

static void log_unloaded(uint32_t number)
{
    line_text("U\t");
    line_number(number, 10);
    line_text("\t");
    line_number(hl_control_page->seq, 10);
    line_write();
}

/* ---- the table ---- */

/* The slot of the module that holds ip, or -1. Lock-free. */
static int find_slot(uintptr_t ip)
{
    uint32_t count = __atomic_load_n(&module_count, __ATOMIC_ACQUIRE);
    for (uint32_t i = 0; i < count; i++) {
        uint64_t high = __atomic_load_n(&modules[i].high, __ATOMIC_ACQUIRE);
        if (ip < high && ip >= __atomic_load_n(&modules[i].low, __ATOMIC_ACQUIRE))
            return (int)i;
    }
    return -1;
}

int modules_find_known(uintptr_t ip)
{
    int slot = find_slot(ip);
    return slot < 0 ? -1 : (int)__atomic_load_n(&modules[slot].number, __ATOMIC_RELAXED);
}

/* Room for one more module; NULL when the table is full (said once). */
static struct module *module_new(void)
{
    if (!modules)
        modules = host_map_private(MODULES_MAX * sizeof *modules);
    for (uint32_t i = 0; modules && i < MODULES_MAX; i++)
        if (!modules[i].high)
            return &modules[i];
    if (!truncated)
        log_remark(modules ? "too many modules, the rest is not named" : "no memory to name modules", "");
    truncated = true;
    return NULL;
}

static void module_add(struct module *m, uint64_t low, uint64_t high, uint64_t bias, const char *path)
{
    m->low = low;
    m->bias = bias;
    if (!m->path || !same_text(m->path, path)) /* the same object again and again takes no new memory */
        m->path = keep_text(path);
    m->seen = __atomic_load_n(&refreshes, __ATOMIC_SEQ_CST);
    m->number = next_number++;
    __atomic_store_n(&m->high, high, __ATOMIC_RELEASE);
    uint32_t slot = (uint32_t)(m - modules);
    if (slot >= module_count)
        __atomic_store_n(&module_count, slot + 1, __ATOMIC_RELEASE);
    log_loaded(m);
}

/* The GNU build-id in a note segment, in hex; "" if there is none. */
static void read_build_id(char *hex, size_t room, const char *note, size_t bytes)
{
    hex[0] = 0;
    while (bytes >= sizeof(ElfW(Nhdr))) {
        const ElfW(Nhdr) *n = (const void *)note;
        size_t name = (n->n_namesz + 3u) & ~3u, length = sizeof *n + name + ((n->n_descsz + 3u) & ~3u);
        if (length > bytes)
            return;
        if (n->n_type == NT_GNU_BUILD_ID && n->n_namesz == 4 && __builtin_memcmp(note + sizeof *n, "GNU", 4) == 0) {
            const unsigned char *id = (const unsigned char *)note + sizeof *n + name;
            for (size_t i = 0; i < n->n_descsz && 2 * i + 2 < room; i++) {
                hex[2 * i] = "0123456789abcdef"[id[i] >> 4];
                hex[2 * i + 1] = "0123456789abcdef"[id[i] & 15];
                hex[2 * i + 2] = 0;
            }
            return;
        }
        note += length;
        bytes -= length;
    }
}

static void find_range(const ElfW(Phdr) *p, size_t count, uint64_t bias, uint64_t *low, uint64_t *high)
{
    *low = ~0ull;
    *high = 0;
    for (size_t i = 0; i < count; i++) {
        if (p[i].p_type != PT_LOAD)
            continue;
        uint64_t start = (bias + p[i].p_vaddr) & ~(HL_PAGE - 1ull);
        uint64_t end = (bias + p[i].p_vaddr + p[i].p_memsz + HL_PAGE - 1) & ~(HL_PAGE - 1ull);
        *low = start < *low ? start : *low;
        *high = end > *high ? end : *high;
    }
}

/* The main program has no name in the loader's list. */
static const char *own_path(void)
{
    long n = host_call4(SYS_readlinkat, AT_FDCWD, "/proc/self/exe", own_path_buffer, sizeof own_path_buffer - 1);
    own_path_buffer[n > 0 ? n : 0] = 0;
    return own_path_buffer;
}

/* Adds an object, or marks it as seen. The lock is held. */
static void module_learn(const ElfW(Phdr) *phdrs, size_t count, uint64_t bias, const char *path)
{
    uint64_t low, high;
    find_range(phdrs, count, bias, &low, &high);
    int known = find_slot(low);
    if (known >= 0 && modules[known].high == high && modules[known].bias == bias) {
        modules[known].seen = __atomic_load_n(&refreshes, __ATOMIC_SEQ_CST);
        return;
    }
    struct module *m = low < high ? module_new() : NULL;
    if (!m)
        return;
    m->build_id[0] = 0;
    for (size_t i = 0; i < count && !m->build_id[0]; i++)
        if (phdrs[i].p_type == PT_NOTE)
            read_build_id(m->build_id, sizeof m->build_id, (const char *)bias + phdrs[i].p_vaddr, phdrs[i].p_memsz);
    module_add(m, low, high, bias, path && *path ? path : own_path());
}

static int visit(struct dl_phdr_info *info, size_t size, void *data)
{
    (void)size;
    (void)data;
    struct hl_guard g = guard_enter(&hl_image->module_lock);
    module_learn(info->dlpi_phdr, info->dlpi_phnum, info->dlpi_addr, info->dlpi_name);
    guard_leave(&g);
    return 0;
}

/* Objects in other namespaces (dlmopen) are not in the list that was walked: they stay as long as the loader knows them. */
static bool still_there(const struct module *m, uint32_t refresh)
{
    struct dl_found found;
    return m->seen >= refresh || (hl_find_object && hl_find_object((void *)m->low, &found) == 0 && found.start == (void *)m->low);
}

static bool drop_unseen(uint32_t refresh)
{
    bool dropped = false;
    for (uint32_t i = 0; i < module_count; i++) {
        struct module *m = &modules[i];
        if (!m->high || still_there(m, refresh))
            continue;
        __atomic_store_n(&m->high, 0, __ATOMIC_RELEASE);
        log_unloaded(m->number);
        dropped = true;
    }
    return dropped;
}

/*
 * The module lock is taken inside the loader's list lock (in visit), never around it: a program's own dl_iterate_phdr
 * callback may allocate and so come to learn_one while it holds the loader's.
 */
void modules_refresh(void)
{
    if (hl_image->mode != HL_MODE_ON)
        return;
    uint32_t before = next_number;
    __atomic_store_n(&expecting, false, __ATOMIC_SEQ_CST);
    uint32_t refresh = __atomic_add_fetch(&refreshes, 1, __ATOMIC_SEQ_CST);
    dl_iterate_phdr(visit, NULL);
    struct hl_guard g = guard_enter(&hl_image->module_lock);
    bool changed = drop_unseen(refresh) || next_number != before;
    guard_leave(&g);
    if (changed)
        stack_flush();
}

bool modules_expected(void)
{
    return __atomic_load_n(&expecting, __ATOMIC_SEQ_CST);
}

void modules_expect(void)
{
    __atomic_store_n(&expecting, true, __ATOMIC_SEQ_CST);
}

/* The object that holds ip, asked from the loader without a lock (glibc 2.35 and newer). */
static int learn_one(uintptr_t ip)
{
    struct dl_found found;
    if (hl_find_object((void *)ip, &found) != 0)
        return -1;
    const ElfW(Ehdr) *header = found.start;
    const struct link_map *map = found.map;
    struct hl_guard g = guard_enter(&hl_image->module_lock);
    int number = modules_find_known(ip);
    if (number < 0 && __builtin_memcmp(header->e_ident, ELFMAG, SELFMAG) == 0) {
        module_learn((const void *)((const char *)header + header->e_phoff), header->e_phnum, map->l_addr, map->l_name);
        number = modules_find_known(ip);
    }
    guard_leave(&g);
    return number;
}

int modules_find(uintptr_t ip)
{
    int number = modules_find_known(ip);
    if (likely(number >= 0) || hl_image->mode != HL_MODE_ON)
        return number;
    if (hl_find_object)
        return learn_one(ip);
    if (!modules_expected())
        return -1;
    modules_refresh();
    return modules_find_known(ip);
}

/* ---- the head of a log ---- */

void modules_log_again(void)
{
    struct hl_guard g = guard_enter(&hl_image->module_lock);
    uint32_t kept = 0;
    /* A dlopen in progress in another thread of the parent: its lock is held here for ever, and must not be asked for. */
    __atomic_store_n(&expecting, false, __ATOMIC_SEQ_CST);
    for (uint32_t i = 0; i < module_count; i++)
        if (modules[i].high)
            modules[kept++] = modules[i];
    for (uint32_t i = kept; i < module_count; i++)
        modules[i].high = 0;
    module_count = kept;
    for (uint32_t i = 0; i < kept; i++) {
        modules[i].number = i;
        log_loaded(&modules[i]);
    }
    next_number = kept;
    guard_leave(&g);
}

/* Reads a whole small file of /proc; the rest of a longer one is cut. Returns its length. */
static size_t read_small(const char *path, char *buffer, size_t room)
{
    long fd = host_call4(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    size_t length = 0;
    while (fd >= 0 && length < room) {
        long got = host_call3(SYS_read, fd, buffer + length, room - length);
        if (got <= 0)
            break;
        length += (size_t)got;
    }
    if (fd >= 0)
        host_call1(SYS_close, fd);
    return length;
}

static bool starts_with(const char *text, const char *prefix)
{
    while (*prefix && *text == *prefix)
        text++, prefix++;
    return !*prefix;
}

static void log_environment(void)
{
    static const char *const names[] = {"GLIBC_TUNABLES=", "MALLOC_", "LD_PRELOAD=", "LD_LIBRARY_PATH="};
    for (char **e = host_environment(); e && *e; e++)
        for (size_t i = 0; i < sizeof names / sizeof *names; i++)
            if (starts_with(*e, names[i])) {
                            line_text("E\t");
                line_escaped(*e);
                line_write();
            }
}

static void log_arguments(size_t length)
{
    for (size_t at = 0; at < length;) {
            line_text("A\t");
        line_escaped(arguments + at);
        line_write();
        while (at < length && arguments[at])
            at++;
        at++;
    }
}

static void log_namespace(void)
{
    char name[64];
    long n = host_call4(SYS_readlinkat, AT_FDCWD, "/proc/self/ns/pid", name, sizeof name - 1);
    if (n <= 0)
        return;
    name[n] = 0;
    line_text("N\t");
    line_text(name);
    line_write();
}

void modules_log_process(void)
{
    struct hl_guard g = guard_enter(&hl_image->module_lock);
    size_t length = read_small("/proc/self/cmdline", arguments, sizeof arguments - 1);
    uint64_t count = 0;
    arguments[length] = 0;
    for (size_t i = 0; i < length; i++)
        count += arguments[i] == 0;
    line_text("P\t");
    line_escaped(own_path());
    line_text("\t");
    line_number(count, 10);
    line_text("\t");
    line_text(hl_libc_version ? hl_libc_version() : "");
    line_write();
    log_namespace();
    log_arguments(length);
    log_environment();
    guard_leave(&g);
}
