/*
 * unwind_find.c: from a pc to its FDE: the module, then the sorted table in its .eh_frame_hdr.
 *
 * The module comes from _dl_find_object (glibc 2.35 and later: lock-free, made for unwinders). Before that there is only
 * dl_iterate_phdr, which takes the loader's lock: a malloc under dlopen in one thread, with a wait for that thread in
 * another, is a deadlock. So we read the loader's list of modules as a debugger does, through _r_debug, with every
 * read probed first (a module may be going away under us), and keep what was found in a small table.
 */
#include "host.h"
#include "unwind.h"

#include <elf.h>
#include <link.h>
#include <stddef.h>
#include <string.h>
#include <sys/auxv.h>

struct find_result { /* struct dl_find_object; not named by every libc we build against */
    unsigned long long flags;
    void *map_start, *map_end, *link_map, *eh_frame;
    unsigned long long reserved[7];
};
static int (*find_object)(void *, struct find_result *);
static const struct r_debug *loader;
static uintptr_t main_headers, main_header_count, loader_entry;

/* What was found, for glibc before 2.35. state: 0 free, 1 being written, 2 * epoch: good in that epoch. */
enum { KNOWN_MODULES = 512 };
static struct known_module { uint32_t state; struct unwind_module module; } known[KNOWN_MODULES];

void unwind_find_init(void)
{
    const Elf64_Ehdr *interpreter = (const Elf64_Ehdr *)getauxval(AT_BASE);
    if (interpreter != NULL)
        loader_entry = (uintptr_t)interpreter + interpreter->e_entry;
    find_object = (int (*)(void *, struct find_result *))host_symbol("_dl_find_object");
    if (find_object == NULL) {
        loader = host_symbol("_r_debug");
        main_headers = getauxval(AT_PHDR);
        main_header_count = getauxval(AT_PHNUM);
    }
}

static bool known_find(uintptr_t pc, struct unwind_module *module)
{
    uint32_t good = 2 * unwind_epoch();
    for (unsigned i = 0; i < KNOWN_MODULES; i++) {
        uint32_t state = __atomic_load_n(&known[i].state, __ATOMIC_ACQUIRE);
        if (state == 0)
            return false; /* entries are taken in order */
        if (state != good)
            continue;
        *module = known[i].module;
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (pc >= module->low && pc < module->high && __atomic_load_n(&known[i].state, __ATOMIC_RELAXED) == good)
            return true;
    }
    return false;
}

static void known_add(const struct unwind_module *module)
{
    uint32_t good = 2 * unwind_epoch();
    for (unsigned i = 0; i < KNOWN_MODULES; i++) {
        uint32_t state = __atomic_load_n(&known[i].state, __ATOMIC_RELAXED);
        if (state == 1 || state == good ||
            !__atomic_compare_exchange_n(&known[i].state, &state, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
            continue;
        known[i].module = *module;
        __atomic_store_n(&known[i].state, good, __ATOMIC_RELEASE);
        return;
    }
}

/* Copies memory that may be gone, eight bytes at a time. */
static bool copy(struct unwind_memory *memory, uintptr_t from, void *to, size_t bytes)
{
    for (size_t done = 0; done < bytes; done += 8) {
        uint64_t word;
        if (!unwind_read(memory, from + done, &word))
            return false;
        memcpy((char *)to + done, &word, bytes - done < 8 ? bytes - done : 8);
    }
    return true;
}

/* Reads program headers; gives the range of the module's segments, and its .eh_frame_hdr or NULL. */
static bool read_headers(struct unwind_memory *memory, uintptr_t headers, uintptr_t count, uintptr_t bias,
                         struct unwind_module *module)
{
    module->low = ~0ull;
    module->high = 0;
    module->eh_frame_hdr = NULL;
    for (uintptr_t i = 0; i < count; i++) {
        Elf64_Phdr header;
        if (!copy(memory, headers + i * sizeof header, &header, sizeof header))
            return false;
        uintptr_t start = bias + header.p_vaddr;
        if (header.p_type == PT_GNU_EH_FRAME)
            module->eh_frame_hdr = (const uint8_t *)start;
        if (header.p_type != PT_LOAD)
            continue;
        module->low = start < module->low ? start : module->low;
        module->high = start + header.p_memsz > module->high ? start + header.p_memsz : module->high;
    }
    return module->high > module->low;
}

static bool read_module(struct unwind_memory *memory, uintptr_t bias, bool is_main, struct unwind_module *module)
{
    Elf64_Ehdr header;
    if (is_main)
        return read_headers(memory, main_headers, main_header_count, bias, module);
    if (bias == 0 || !copy(memory, bias, &header, sizeof header) || memcmp(header.e_ident, ELFMAG, SELFMAG) != 0)
        return false;
    return read_headers(memory, bias + header.e_phoff, header.e_phnum, bias, module);
}

/* Walks the loader's list, remembers all modules in it, and picks the one that holds pc. */
static bool list_find(uintptr_t pc, struct unwind_module *found)
{
    struct unwind_memory memory = {0};
    uintptr_t entry = loader != NULL ? (uintptr_t)loader->r_map : 0;
    bool is_main = true, success = false;
    for (unsigned limit = 0; entry != 0 && limit < 100000; limit++, is_main = false) {
        struct link_map map;
        struct unwind_module module;
        if (!copy(&memory, entry, &map, sizeof map))
            break;
        if (read_module(&memory, map.l_addr, is_main, &module)) {
            known_add(&module);
            if (pc >= module.low && pc < module.high) {
                *found = module;
                success = true;
            }
        }
        entry = (uintptr_t)map.l_next;
    }
    return success;
}

bool unwind_find_module(uintptr_t pc, struct unwind_module *module)
{
    if (find_object != NULL) {
        struct find_result result;
        if (find_object((void *)pc, &result) != 0 || result.eh_frame == NULL)
            return false;
        module->low = (uintptr_t)result.map_start;
        module->high = (uintptr_t)result.map_end;
        module->eh_frame_hdr = result.eh_frame;
        return true;
    }
    return (known_find(pc, module) || list_find(pc, module)) && module->eh_frame_hdr != NULL;
}

bool unwind_is_process_entry(uintptr_t pc)
{
    enum { ENTRY_BYTES = 256 }; /* _start and _dl_start_user; what comes next in ld.so has CFI */
    return loader_entry != 0 && pc - loader_entry < ENTRY_BYTES;
}

/* The table's last entry at or below pc; each is {int32 pc, int32 fde}, relative to the header. */
static const uint8_t *search_table(const uint8_t *table, uintptr_t count, uintptr_t base, uintptr_t pc)
{
    const struct { int32_t pc, fde; } *entries = (const void *)table;
    uintptr_t low = 0, high = count;
    while (low < high) {
        uintptr_t middle = (low + high) / 2;
        if (base + (uintptr_t)(int64_t)entries[middle].pc <= pc)
            low = middle + 1;
        else
            high = middle;
    }
    return low == 0 ? NULL : (const uint8_t *)(base + (uintptr_t)(int64_t)entries[low - 1].fde);
}

/* For the rare module whose header has no table in the usual form: reads the section from its start. */
static const uint8_t *search_section(const uint8_t *entry, uintptr_t pc)
{
    while (entry != NULL) {
        const uint8_t *next;
        if (cfi_covers(entry, pc, &next))
            return entry;
        entry = next;
    }
    return NULL;
}

const uint8_t *unwind_find_fde(uintptr_t pc)
{
    struct unwind_module module;
    const uint8_t *next, *fde;
    uintptr_t section, count;
    if (!unwind_find_module(pc, &module))
        return NULL;
    const uint8_t *at = module.eh_frame_hdr;
    uintptr_t base = (uintptr_t)at;
    if (at[0] != 1)
        return NULL;
    uint8_t section_encoding = at[1], count_encoding = at[2], table_encoding = at[3];
    at += 4;
    if (!cfi_pointer(&at, section_encoding, base, &section))
        return NULL;
    if (table_encoding != 0x3b || !cfi_pointer(&at, count_encoding, base, &count))
        return search_section((const uint8_t *)section, pc);
    fde = search_table(at, count, base, pc);
    return fde != NULL && cfi_covers(fde, pc, &next) ? fde : NULL;
}
