/*
 * unwind.h: one step up the call stack by `.eh_frame` (x86-64 System V).
 *
 *   unwind_find.c   pc -> the module's unwind table -> FDE
 *   unwind_cfi.c    FDE -> row (how CFA and registers are found at that pc); DWARF expressions
 *   unwind.c        row -> rule, cached for all threads; steps by rule (fast) and by row (full); safe reads
 *
 * A frame is named by its `key`: the return address, or pc + 1 for a frame that a signal interrupted. In both cases
 * key - 1 lies inside the instruction that is executing, and that is what gets looked up.
 *
 * Everything here is async-signal-safe, takes no lock, allocates nothing, and leaves errno alone, except unwind_init.
 */
#ifndef HEAPLEDGER_UNWIND_H
#define HEAPLEDGER_UNWIND_H

#include <stdbool.h>
#include <stdint.h>

/* DWARF register numbers. */
enum { UNWIND_RBX = 3, UNWIND_RBP = 6, UNWIND_RSP = 7, UNWIND_R12 = 12, UNWIND_PC = 16, UNWIND_REGISTERS = 17 };

#define UNWIND_USER_LIMIT (1ull << 47)

/* ---- memory of the program's stacks ------------------------------------------------------------------------- */

/*
 * Two ranges of pages that were seen to be readable: the stack in use, and the one before. `room` is the range's bytes
 * minus 7, so that one comparison says whether 8 bytes at an address lie inside; 0 = nothing known.
 * A range only grows over pages that were each probed. One owner (a thread); zeroed = empty.
 */
struct unwind_memory {
    uintptr_t low, room;
    uintptr_t other_low, other_room;
};

/* Reads 8 bytes at any address; false (value untouched) when they cannot be read. Costs a system call per unknown page. */
bool unwind_read_slow(struct unwind_memory *memory, uintptr_t address, uint64_t *value);

/* The word at an address. (-fno-builtin would make a call of memcpy.) */
static inline uint64_t unwind_word(uintptr_t address)
{
    typedef uint64_t __attribute__((may_alias, aligned(1))) word;
    return *(const word *)address;
}

static inline bool unwind_read(struct unwind_memory *memory, uintptr_t address, uint64_t *value)
{
    if (__builtin_expect(address - memory->low < memory->room, 1)) {
        *value = unwind_word(address);
        return true;
    }
    uint64_t word; /* its address leaves, so that that of *value need not: the caller's can stay in a register */
    bool success = unwind_read_slow(memory, address, &word);
    if (success)
        *value = word;
    return success;
}

/* ---- rules: a step that needs rsp and rbp only --------------------------------------------------------------- */

/*
 *      63          48 47        40 39    35 34  32 31              0
 *     |   offset     |  rbp slot  |    0   | kind |      tag        |
 *
 *   offset    signed, in words of 8 bytes: one arithmetic shift away
 *   rbp slot  n: the caller's rbp lies at CFA - 8n; 0: rbp is not touched. Return address at CFA - 8 always.
 *   tag       the cache's, below
 */
enum unwind_kind {
    UNWIND_NONE = 0,   /* no way up: the key is no address of the program */
    UNWIND_SP = 1,     /* CFA = rsp + 8 * offset */
    UNWIND_BP = 2,     /* CFA = rbp + 8 * offset */
    UNWIND_DRAP = 3,   /* CFA = [rbp + 8 * offset], the caller's rbp at [rbp]: gcc's realigned stacks */
    UNWIND_SIGNAL = 4, /* rsp, rbp, rip from the sigcontext at rsp: the kernel's signal frame */
    UNWIND_END = 5,    /* the outermost frame: the return address is undefined */
    UNWIND_GUESS = 6,  /* code without CFI: assume a frame pointer, with checks */
    UNWIND_FULL = 7    /* anything else: needs unwind_step_full */
};

#define UNWIND_RULE_KIND(rule)   ((enum unwind_kind)((rule) >> 32 & 7))
#define UNWIND_RULE_OFFSET(rule) (((int64_t)(rule) >> 48) * 8)
#define UNWIND_RULE_BP(rule)     ((rule) >> 40 & 0xff)

/* Where the kernel's signal frame keeps registers, from rsp in the restorer: struct ucontext (40 bytes) + sigcontext. */
enum { UNWIND_SIGNAL_BP = 120, UNWIND_SIGNAL_SP = 160, UNWIND_SIGNAL_PC = 168 };

/*
 * The cache: two ways of 2^15 rules. The key (47 bits) is multiplied by an odd number modulo 2^47 (in the upper bits of a
 * word, whence the shift), which loses nothing: 15 bits choose the place, 32 bits are the tag, so a hit is exact. Rules are
 * written whole, by anyone, at any time; 0 is a free place.
 */
#define UNWIND_PLACES (1u << 15)
#define UNWIND_CACHE_BYTES (2 * UNWIND_PLACES * sizeof(uint64_t))
extern uint64_t *unwind_cache;
extern uint32_t unwind_epoch_now;

/* Looks the rule up in the second way, then in the unwind tables, and caches it. 200 ns and up. */
uint64_t unwind_rule_make(uintptr_t key);

static inline uint64_t unwind_hash(uintptr_t key)
{
    return key * (0x9e3779b97f4a7c15ull << 17);
}

/* The rule for a frame. */
static inline uint64_t unwind_rule(uintptr_t key)
{
    uint64_t hash = unwind_hash(key);
    uint64_t rule = __atomic_load_n(&unwind_cache[hash >> 49], __ATOMIC_RELAXED);
    if (__builtin_expect((uint32_t)rule == (uint32_t)(hash >> 17) && rule >> 32 != 0 && key < UNWIND_USER_LIMIT, 1))
        return rule;
    return unwind_rule_make(key);
}

/* Counts how often code went away or came; what was learned under an older epoch may be wrong. */
static inline uint32_t unwind_epoch(void)
{
    return __atomic_load_n(&unwind_epoch_now, __ATOMIC_RELAXED);
}

/* Once, before anything else, not from a signal handler; `memory` are UNWIND_CACHE_BYTES zeroed bytes for the cache that
 * are never freed. */
void unwind_init(void *memory);

/* Code was unloaded (or loaded): forgets all rules and known modules, begins a new epoch. Any thread. */
void unwind_flush(void);

/* ---- the full step ---------------------------------------------------------------------------------------------- */

struct unwind_registers {
    uint64_t value[UNWIND_REGISTERS];
    uint32_t known;            /* bit n: value[n] is that of the frame */
    bool exact_pc;             /* the frame was interrupted by a signal: pc is not a return address */
};

enum unwind_result { UNWIND_OK = 0, UNWIND_OUTERMOST = 1, UNWIND_LOST = 2 };

/* Replaces the registers with the caller's; tries a frame pointer where there is no CFI. On anything but UNWIND_OK they
 * are as before. */
enum unwind_result unwind_step_full(struct unwind_registers *registers, struct unwind_memory *memory);

/* The frame-pointer guess, for code without CFI: is `bp` plausibly the frame of the function at rsp = sp? On success
 * gives the caller's key, sp and bp. The decision depends on sp, bp and the two words at bp alone, except when
 * *unreadable is set. */
bool unwind_guess(struct unwind_memory *memory, uintptr_t sp, uintptr_t bp, uint64_t *key, uint64_t *caller_sp,
                  uint64_t *caller_bp, bool *unreadable);

/* ---- between the parts -------------------------------------------------------------------------------------------- */

/* A table of unwind information: what PT_GNU_EH_FRAME of a module points to. */
struct unwind_module { uintptr_t low, high; const uint8_t *eh_frame_hdr; };

void unwind_find_init(void);
void unwind_find_flush(void);
/* The module whose mapping holds pc; false if there is none, or it has no .eh_frame_hdr. */
bool unwind_find_module(uintptr_t pc, struct unwind_module *module);
/* Is pc in the code where the kernel starts a program, that is ld.so's first instructions? They have no CFI, and call the
 * constructors of libraries. */
bool unwind_is_process_entry(uintptr_t pc);
/* The FDE that covers pc, or NULL. */
const uint8_t *unwind_find_fde(uintptr_t pc);

/* How one register of the caller is found. */
enum cfi_how {
    CFI_SAME = 0, CFI_UNDEFINED, CFI_OFFSET, CFI_VAL_OFFSET, CFI_REGISTER, CFI_EXPRESSION, CFI_VAL_EXPRESSION
};
struct cfi_row {
    bool cfa_is_expression, signal;
    uint32_t cfa_register;
    int64_t cfa_offset;
    const uint8_t *cfa_expression;                /* ULEB length, then the operations */
    uint8_t how[UNWIND_REGISTERS];
    union { int64_t offset; const uint8_t *expression; } at[UNWIND_REGISTERS];
};

/* Runs the FDE's program up to pc. False: the CFI is damaged, or uses what we do not know. */
bool cfi_row_at(const uint8_t *fde, uintptr_t pc, struct cfi_row *row);
/* Does the FDE cover pc? Gives its length by *next, NULL at the end of the section. */
bool cfi_covers(const uint8_t *fde, uintptr_t pc, const uint8_t **next);
/* Evaluates an expression; `push` (may be NULL) is on the stack at first. */
bool cfi_evaluate(const uint8_t *expression, const struct unwind_registers *registers, struct unwind_memory *memory,
                  const uint64_t *push, uint64_t *result);
/* Reads a DW_EH_PE_-encoded pointer and moves *at behind it; false if the encoding is unknown. */
bool cfi_pointer(const uint8_t **at, uint8_t encoding, uintptr_t data_base, uintptr_t *value);
uint64_t cfi_uleb(const uint8_t **at);
int64_t cfi_sleb(const uint8_t **at);

#endif
