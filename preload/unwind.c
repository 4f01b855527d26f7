/*
 * unwind.c: steps up the stack. The fast one goes by a rule of one word out of a cache that all threads share; the full one
 * carries all registers and evaluates whatever the CFI says.
 */
#include "unwind.h"

#include "host.h"

#include <errno.h>
#include <stddef.h>

uint64_t *unwind_cache;
uint32_t unwind_epoch_now = 1;

void unwind_init(void *memory)
{
    unwind_cache = memory;
    unwind_find_init();
}

/* ---- reading ------------------------------------------------------------------------------------------------------ */

enum { PAGE = 4096, GAP_PAGES = 256, ROOM = 7 };

/*
 * Is the page readable? Asks the kernel to read a signal set there for an operation that does not exist: EFAULT if it
 * cannot, EINVAL otherwise. Changes nothing, needs no file descriptor, and seccomp filters have no reason to deny it.
 */
static bool page_readable(uintptr_t page)
{
    return page != 0 && host_call4(SYS_rt_sigprocmask, ~0u, page, 0, 8) != -EFAULT;
}

static bool pages_readable(uintptr_t from, uintptr_t to)
{
    for (; from < to; from += PAGE)
        if (!page_readable(from))
            return false;
    return true;
}

/* Joins [page, end) to the known range if all pages between can be read; else it becomes the known range. */
static void learn(struct unwind_memory *memory, uintptr_t page, uintptr_t end)
{
    uintptr_t low = memory->low, high = memory->low + memory->room + ROOM;
    if (memory->room != 0 && page >= high && page - high <= GAP_PAGES * PAGE && pages_readable(high, page)) {
        memory->room = end - low - ROOM;
    } else if (memory->room != 0 && end <= low && low - end <= GAP_PAGES * PAGE && pages_readable(end, low)) {
        memory->low = page;
        memory->room = high - page - ROOM;
    } else {
        memory->other_low = low;
        memory->other_room = memory->room;
        memory->low = page;
        memory->room = end - page - ROOM;
    }
}

bool unwind_read_slow(struct unwind_memory *memory, uintptr_t address, uint64_t *value)
{
    uintptr_t page = address & ~(uintptr_t)(PAGE - 1), end = ((address + 7) & ~(uintptr_t)(PAGE - 1)) + PAGE;
    if (address >= UNWIND_USER_LIMIT - 2 * PAGE)
        return false;
    if (address - memory->other_low < memory->other_room) {
        struct unwind_memory swapped = {memory->other_low, memory->other_room, memory->low, memory->room};
        *memory = swapped;
    } else {
        if (!pages_readable(page, end))
            return false;
        /* An address on the border is in two pages, the first of which may be the last known one. */
        if (memory->room != 0 && page == memory->low + memory->room + ROOM - PAGE)
            page += PAGE;
        if (page < end)
            learn(memory, page, end);
    }
    *value = unwind_word(address);
    return true;
}

/* ---- rules -------------------------------------------------------------------------------------------------------- */

/* Without a tag. */
static uint64_t pack(enum unwind_kind kind, int64_t offset, uint32_t bp_slot)
{
    return (uint64_t)kind << 32 | (uint64_t)bp_slot << 40 | (uint64_t)(offset / 8) << 48;
}

static bool fits(int64_t offset)
{
    return offset % 8 == 0 && offset / 8 >= INT16_MIN && offset / 8 <= INT16_MAX;
}

enum { OP_DEREF = 0x06, OP_BREG = 0x70 };

/* Is the expression `register + offset`, with `operations` (OP_DEREF or nothing) behind? */
static bool is_slot(const uint8_t *at, unsigned reg, bool deref, int64_t *offset)
{
    uint64_t bytes = cfi_uleb(&at);
    const uint8_t *end = at + bytes;
    if (bytes == 0 || *at++ != OP_BREG + reg)
        return false;
    *offset = cfi_sleb(&at);
    return deref ? at + 1 == end && *at == OP_DEREF : at == end;
}

static bool register_at(const struct cfi_row *row, unsigned reg, unsigned base, int64_t offset)
{
    int64_t got;
    return row->how[reg] == CFI_EXPRESSION && is_slot(row->at[reg].expression, base, false, &got) && got == offset;
}

/* The kernel's signal frame, as glibc describes it. */
static bool is_signal_frame(const struct cfi_row *row)
{
    int64_t offset;
    return row->signal && row->cfa_is_expression && is_slot(row->cfa_expression, UNWIND_RSP, true, &offset) &&
           offset == UNWIND_SIGNAL_SP && register_at(row, UNWIND_RSP, UNWIND_RSP, UNWIND_SIGNAL_SP) &&
           register_at(row, UNWIND_RBP, UNWIND_RSP, UNWIND_SIGNAL_BP) &&
           register_at(row, UNWIND_PC, UNWIND_RSP, UNWIND_SIGNAL_PC);
}

/* Squeezes a row into a rule; UNWIND_FULL if it does not fit. Registers other than rsp, rbp and rip do not matter to a
 * rule: a later frame that needs one has UNWIND_FULL itself. */
static uint64_t compress(const struct cfi_row *row)
{
    int64_t offset;
    uint32_t bp_slot = 0;
    if (row->how[UNWIND_PC] == CFI_UNDEFINED)
        return pack(UNWIND_END, 0, 0);
    if (is_signal_frame(row))
        return pack(UNWIND_SIGNAL, 0, 0);
    if (row->signal || row->how[UNWIND_PC] != CFI_OFFSET || row->at[UNWIND_PC].offset != -8 ||
        row->how[UNWIND_RSP] != CFI_SAME)
        return pack(UNWIND_FULL, 0, 0);
    if (row->cfa_is_expression) {
        if (is_slot(row->cfa_expression, UNWIND_RBP, true, &offset) && fits(offset) &&
            register_at(row, UNWIND_RBP, UNWIND_RBP, 0))
            return pack(UNWIND_DRAP, offset, 0);
        return pack(UNWIND_FULL, 0, 0);
    }
    if (row->how[UNWIND_RBP] == CFI_OFFSET) {
        int64_t below = -row->at[UNWIND_RBP].offset;
        if (below <= 0 || below % 8 != 0 || below / 8 > 0xff)
            return pack(UNWIND_FULL, 0, 0);
        bp_slot = (uint32_t)(below / 8);
    } else if (row->how[UNWIND_RBP] != CFI_SAME) {
        return pack(UNWIND_FULL, 0, 0);
    }
    if (!fits(row->cfa_offset))
        return pack(UNWIND_FULL, 0, 0);
    if (row->cfa_register == UNWIND_RSP)
        return pack(UNWIND_SP, row->cfa_offset, bp_slot);
    if (row->cfa_register == UNWIND_RBP)
        return pack(UNWIND_BP, row->cfa_offset, bp_slot);
    return pack(UNWIND_FULL, 0, 0);
}

/* mov $SYS_rt_sigreturn, %rax; syscall: a restorer without CFI (not glibc's). gdb and libgcc know it by the same bytes. */
static bool is_restorer(uintptr_t pc)
{
    static const uint64_t code[2] = {0x0f0000000fc0c748ull, 0x05ull};
    struct unwind_memory memory = {0};
    uint64_t word;
    return unwind_read(&memory, pc, &word) && word == code[0] && unwind_read(&memory, pc + 1, &word) &&
           word >> 56 == code[1];
}

/*
 * add $n, %rsp; ret, straight behind the call (or behind a nop, .NET's): code without CFI that keeps no frame pointer, but
 * shows how large its frame is. CPython's trampolines (-X perf, one a Python function) are like that. *bytes: from rsp to
 * the CFA. The rule is kept, as a compiler that uses memory again does not put another frame's end behind the same call.
 */
static bool is_frameless(uintptr_t key, int64_t *bytes)
{
    struct unwind_memory memory = {0};
    uint64_t word;
    if (!unwind_read(&memory, key, &word))
        return false;
    if ((word & 0xff) == 0x90)
        word >>= 8;
    *bytes = (int64_t)(word >> 24 & 0xff) + 8;
    return (word & 0xff80ffffffull) == 0xc300c48348ull && *bytes % 8 == 0;
}

/*
 * Code without CFI that is the outermost all the same: where the process began; or a return address that was put there by
 * hand, the first byte of a function, with no code in front. That is how makecontext ends a coroutine's stack (glibc's
 * __start_context, whose CFI does not say so), and others do alike.
 */
static bool is_outermost(uintptr_t key)
{
    return unwind_is_process_entry(key - 1) || unwind_find_fde(key) != NULL;
}

static uint64_t make(uintptr_t key)
{
    struct cfi_row row;
    int64_t bytes;
    if (key == 0 || key >= UNWIND_USER_LIMIT)
        return pack(UNWIND_NONE, 0, 0);
    const uint8_t *fde = unwind_find_fde(key - 1);
    if (fde == NULL && is_outermost(key))
        return pack(UNWIND_END, 0, 0);
    if (fde == NULL && is_restorer(key))
        return pack(UNWIND_SIGNAL, 0, 0);
    if (fde == NULL)
        return is_frameless(key, &bytes) ? pack(UNWIND_SP, bytes, 0) : pack(UNWIND_GUESS, 0, 0);
    return cfi_row_at(fde, key - 1, &row) ? compress(&row) : pack(UNWIND_FULL, 0, 0);
}

/*
 * Two threads may cache the same rule in both ways: harmless. A rule computed while another thread flushes must not
 * survive: the flush bumps the epoch and then clears, we store and then look at the epoch.
 */
uint64_t unwind_rule_make(uintptr_t key)
{
    uint64_t hash = unwind_hash(key);
    uint64_t *first = &unwind_cache[hash >> 49], *second = first + UNWIND_PLACES;
    uint64_t old = __atomic_load_n(second, __ATOMIC_RELAXED);
    if (key < UNWIND_USER_LIMIT && (uint32_t)old == (uint32_t)(hash >> 17) && old >> 32 != 0)
        return old;
    uint32_t epoch = __atomic_load_n(&unwind_epoch_now, __ATOMIC_SEQ_CST);
    uint64_t rule = make(key);
    if (UNWIND_RULE_KIND(rule) == UNWIND_NONE)
        return rule;
    rule |= (uint32_t)(hash >> 17);
    old = __atomic_load_n(first, __ATOMIC_RELAXED);
    __atomic_store_n(second, old, __ATOMIC_SEQ_CST);
    __atomic_store_n(first, rule, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&unwind_epoch_now, __ATOMIC_SEQ_CST) != epoch) {
        __atomic_store_n(second, 0, __ATOMIC_SEQ_CST);
        __atomic_store_n(first, 0, __ATOMIC_SEQ_CST);
    }
    return rule;
}

void unwind_flush(void)
{
    __atomic_add_fetch(&unwind_epoch_now, 1, __ATOMIC_SEQ_CST);
    if (unwind_cache == NULL)
        return;
    for (unsigned i = 0; i < 2 * UNWIND_PLACES; i++)
        if (__atomic_load_n(&unwind_cache[i], __ATOMIC_RELAXED) != 0)
            __atomic_store_n(&unwind_cache[i], 0, __ATOMIC_SEQ_CST);
}

/* ---- the guess ---------------------------------------------------------------------------------------------------- */

enum { GUESS_FRAME_LIMIT = 1 << 20 }; /* bytes: a larger frame is more likely a register that is no frame pointer */

bool unwind_guess(struct unwind_memory *memory, uintptr_t sp, uintptr_t bp, uint64_t *key, uint64_t *caller_sp,
                  uint64_t *caller_bp, bool *unreadable)
{
    uint64_t saved, pc;
    if (bp % 8 != 0 || bp < sp || bp - sp > GUESS_FRAME_LIMIT)
        return false;
    if (!unwind_read(memory, bp, &saved) || !unwind_read(memory, bp + 8, &pc)) {
        *unreadable = true;
        return false;
    }
    if (pc < PAGE || pc >= UNWIND_USER_LIMIT)
        return false;
    *key = pc;
    *caller_sp = bp + 16;
    *caller_bp = saved;
    return true;
}

/* ---- the full step ------------------------------------------------------------------------------------------------ */

static bool known(const struct unwind_registers *registers, unsigned reg)
{
    return reg < UNWIND_REGISTERS && (registers->known >> reg & 1);
}

static void put(struct unwind_registers *registers, unsigned reg, uint64_t value)
{
    registers->value[reg] = value;
    registers->known |= 1u << reg;
}

/* The caller's value of one register; leaves it unknown where the CFI or the memory does not give it. */
static bool recover(const struct cfi_row *row, unsigned reg, uint64_t cfa, const struct unwind_registers *from,
                    struct unwind_memory *memory, uint64_t *value)
{
    switch ((enum cfi_how)row->how[reg]) {
    case CFI_SAME: *value = from->value[reg]; return known(from, reg);
    case CFI_OFFSET: return unwind_read(memory, cfa + (uint64_t)row->at[reg].offset, value);
    case CFI_VAL_OFFSET: *value = cfa + (uint64_t)row->at[reg].offset; return true;
    case CFI_REGISTER:
        if (!known(from, (unsigned)row->at[reg].offset))
            return false;
        *value = from->value[row->at[reg].offset];
        return true;
    case CFI_EXPRESSION:
        return cfi_evaluate(row->at[reg].expression, from, memory, &cfa, value) && unwind_read(memory, *value, value);
    case CFI_VAL_EXPRESSION: return cfi_evaluate(row->at[reg].expression, from, memory, &cfa, value);
    case CFI_UNDEFINED: break;
    }
    return false;
}

/* A signal frame that has no CFI. */
static enum unwind_result step_restorer(struct unwind_registers *registers, struct unwind_memory *memory)
{
    uint64_t sp = registers->value[UNWIND_RSP], pc, bp, caller_sp;
    if (!unwind_read(memory, sp + UNWIND_SIGNAL_PC, &pc) || !unwind_read(memory, sp + UNWIND_SIGNAL_SP, &caller_sp) ||
        !unwind_read(memory, sp + UNWIND_SIGNAL_BP, &bp))
        return UNWIND_LOST;
    registers->known = 0;
    put(registers, UNWIND_PC, pc);
    put(registers, UNWIND_RSP, caller_sp);
    put(registers, UNWIND_RBP, bp);
    registers->exact_pc = true;
    return UNWIND_OK;
}

/* The other registers are the caller's already. */
static enum unwind_result step_frameless(struct unwind_registers *registers, struct unwind_memory *memory, int64_t bytes)
{
    uint64_t cfa = registers->value[UNWIND_RSP] + (uint64_t)bytes, pc;
    if (!unwind_read(memory, cfa - 8, &pc))
        return UNWIND_LOST;
    put(registers, UNWIND_PC, pc);
    put(registers, UNWIND_RSP, cfa);
    registers->exact_pc = false;
    return UNWIND_OK;
}

static enum unwind_result step_guess(struct unwind_registers *registers, struct unwind_memory *memory)
{
    bool unreadable;
    uint64_t key, sp, bp;
    if (!known(registers, UNWIND_RBP) || !unwind_guess(memory, registers->value[UNWIND_RSP],
                                                       registers->value[UNWIND_RBP], &key, &sp, &bp, &unreadable))
        return UNWIND_LOST;
    registers->known = 0;
    put(registers, UNWIND_PC, key);
    put(registers, UNWIND_RSP, sp);
    put(registers, UNWIND_RBP, bp);
    registers->exact_pc = false;
    return UNWIND_OK;
}

enum unwind_result unwind_step_full(struct unwind_registers *registers, struct unwind_memory *memory)
{
    struct cfi_row row;
    struct unwind_registers caller = {.known = 0};
    uintptr_t pc = registers->value[UNWIND_PC] - !registers->exact_pc;
    uint64_t cfa;
    int64_t bytes;
    if (pc >= UNWIND_USER_LIMIT)
        return UNWIND_LOST;
    const uint8_t *fde = unwind_find_fde(pc);
    if (fde == NULL && !registers->exact_pc && is_outermost(pc + 1))
        return UNWIND_OUTERMOST;
    if (fde == NULL && is_restorer(pc + 1))
        return step_restorer(registers, memory);
    if (fde == NULL && is_frameless(pc + 1, &bytes))
        return step_frameless(registers, memory, bytes);
    if (fde == NULL)
        return step_guess(registers, memory);
    if (!cfi_row_at(fde, pc, &row))
        return UNWIND_LOST;
    if (row.how[UNWIND_PC] == CFI_UNDEFINED)
        return UNWIND_OUTERMOST;
    if (row.cfa_is_expression) {
        if (!cfi_evaluate(row.cfa_expression, registers, memory, NULL, &cfa))
            return UNWIND_LOST;
    } else {
        if (!known(registers, row.cfa_register))
            return UNWIND_LOST;
        cfa = registers->value[row.cfa_register] + (uint64_t)row.cfa_offset;
    }
    for (unsigned reg = 0; reg < UNWIND_REGISTERS; reg++) {
        uint64_t value;
        if (reg == UNWIND_RSP && row.how[reg] == CFI_SAME)
            put(&caller, reg, cfa);
        else if (recover(&row, reg, cfa, registers, memory, &value))
            put(&caller, reg, value);
    }
    if (!known(&caller, UNWIND_PC) || !known(&caller, UNWIND_RSP))
        return UNWIND_LOST;
    caller.exact_pc = row.signal;
    *registers = caller;
    return UNWIND_OK;
}
