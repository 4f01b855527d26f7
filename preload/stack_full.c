/*
 * stack_full.c: captures that are rare: steps that are not plain arithmetic, walks with all registers, captures inside a
 * capture.
 */
#include "stack_state.h"
#include "stack_table.h"

#include <stddef.h>

/* ---- steps ------------------------------------------------------------------------------------------------------------ */

static enum step step_signal(struct unwind_memory *memory, const struct at *frame, struct at *caller)
{
    if (!unwind_read(memory, frame->sp + UNWIND_SIGNAL_PC, &caller->ip) ||
        !unwind_read(memory, frame->sp + UNWIND_SIGNAL_BP, &caller->bp) ||
        !unwind_read(memory, frame->sp + UNWIND_SIGNAL_SP, &caller->sp))
        return STEP_LOST_UNREADABLE;
    caller->ip++;
    return STEP_OK;
}

static enum step step_guess(struct unwind_memory *memory, const struct at *frame, struct at *caller)
{
    bool unreadable = false;
    if (frame->bp % 8 != 0 || frame->bp < frame->sp)
        return STEP_LOST; /* depends on nothing but sp and bp */
    if (!unwind_guess(memory, frame->sp, frame->bp, &caller->ip, &caller->sp, &caller->bp, &unreadable))
        return STEP_LOST_UNREADABLE;
    return STEP_OK;
}

static enum step step_drap(struct unwind_memory *memory, uint64_t rule, const struct at *frame, struct at *caller)
{
    if (!unwind_read(memory, frame->bp + (uint64_t)UNWIND_RULE_OFFSET(rule), &caller->sp) ||
        !unwind_read(memory, frame->bp, &caller->bp) || caller->sp <= frame->sp ||
        !unwind_read(memory, caller->sp - 8, &caller->ip))
        return STEP_LOST_UNREADABLE;
    return caller->ip != 0 ? STEP_OK : STEP_END_ZERO;
}

__attribute__((noinline)) enum step step_rare(struct unwind_memory *memory, uint64_t rule, const struct at *frame,
                                              struct at *caller)
{
    switch (UNWIND_RULE_KIND(rule)) {
    case UNWIND_DRAP: return step_drap(memory, rule, frame, caller);
    case UNWIND_SIGNAL: return step_signal(memory, frame, caller);
    case UNWIND_END: return STEP_END;
    case UNWIND_GUESS: return step_guess(memory, frame, caller);
    case UNWIND_NONE: return STEP_LOST;
    default: return STEP_FULL;
    }
}

uint32_t check_rare(struct check *checks, uint32_t check, const struct fresh *frame, const struct at *caller,
                    enum step end, bool *needs_bp)
{
    const struct at *at = &frame->at;
    switch (UNWIND_RULE_KIND(frame->rule)) {
    case UNWIND_DRAP:
        check = check_add(checks, check, caller->sp - 8, caller->ip);
        if (*needs_bp)
            check = check_add(checks, check, at->bp, caller->bp);
        check = check_add(checks, check, at->bp + (uint64_t)UNWIND_RULE_OFFSET(frame->rule), caller->sp);
        *needs_bp = true;
        return check;
    case UNWIND_SIGNAL:
        check = check_add(checks, check, at->sp + UNWIND_SIGNAL_PC, caller->ip - 1);
        if (*needs_bp)
            check = check_add(checks, check, at->sp + UNWIND_SIGNAL_BP, caller->bp);
        *needs_bp = false;
        return check_add(checks, check, at->sp + UNWIND_SIGNAL_SP, caller->sp);
    case UNWIND_GUESS:
        *needs_bp = true;
        if (end == STEP_LOST)
            return check;
        check = check_add(checks, check, at->bp + 8, caller->ip);
        return check_add(checks, check, at->bp, caller->bp); /* the guess depends on this word in any case */
    default:
        *needs_bp = false;
        return check;
    }
}

/* ---- the walk with all registers, from here ----------------------------------------------------------------------------- */

enum { OWN_FRAMES = 32 };

/* The registers that a callee keeps, at this very instruction. Inlined: the frame must be alive while we walk it. */
#define REGISTERS_HERE(registers)                                                                            \
    do {                                                                                                     \
        __asm__ volatile("leaq 0(%%rip), %%rax\n\tmovq %%rax, 128(%0)\n\tmovq %%rbx, 24(%0)\n\t"             \
                         "movq %%rbp, 48(%0)\n\tmovq %%rsp, 56(%0)\n\tmovq %%r12, 96(%0)\n\t"                 \
                         "movq %%r13, 104(%0)\n\tmovq %%r14, 112(%0)\n\tmovq %%r15, 120(%0)"                 \
                         : : "r"((registers)->value) : "rax", "memory");                                     \
        (registers)->known = 1u << 3 | 1u << 6 | 1u << 7 | 0xfu << 12 | 1u << 16;                            \
        (registers)->exact_pc = true;                                                                        \
    } while (0)

__attribute__((noinline)) unsigned walk_full(uintptr_t ip, uintptr_t sp, uintptr_t bp,
                                             struct unwind_memory *memory, uint64_t *ips, unsigned limit,
                                             uint64_t *mark)
{
    struct unwind_registers at;
    bool found = false;
    REGISTERS_HERE(&at);
    for (unsigned i = 0; i < OWN_FRAMES && !found; i++) {
        if (unwind_step_full(&at, memory) != UNWIND_OK)
            break;
        found = at.value[UNWIND_PC] == ip && at.value[UNWIND_RSP] == sp;
    }
    if (!found) { /* called in an unusual way: do with what we have */
        at.known = 1u << UNWIND_PC | 1u << UNWIND_RSP | 1u << UNWIND_RBP;
        at.value[UNWIND_PC] = ip;
        at.value[UNWIND_RSP] = sp;
        at.value[UNWIND_RBP] = bp;
        at.exact_pc = false;
    }
    *mark = 0;
    for (unsigned count = 0;;) {
        uint64_t before = at.value[UNWIND_RSP];
        ips[count++] = at.value[UNWIND_PC] + at.exact_pc;
        enum unwind_result result = unwind_step_full(&at, memory);
        if (result == UNWIND_OUTERMOST || (result == UNWIND_OK && at.value[UNWIND_PC] == 0))
            return count;
        if (result == UNWIND_LOST || (!at.exact_pc && at.value[UNWIND_RSP] <= before)) {
            *mark = HL_IP_LOST;
            return count;
        }
        if (count == limit) {
            *mark = HL_IP_CUT;
            return count;
        }
    }
}

uint32_t insert(const uint64_t *ips, unsigned count, uint64_t mark, struct stack_counters *counters)
{
    struct stack_state state = STATE_EMPTY;
    uint32_t node = 0;
    if (mark != 0) {
        state = state_push(state, mark);
        node = trie_child(0, mark, state);
    }
    while (count > 0) {
        state = state_push(state, ips[--count]);
        uint32_t child = trie_child(node, ips[count], state);
        if (child == 0) {
            counters->exhausted++;
            break;
        }
        node = child;
    }
    return node;
}

/* ---- a capture inside a capture ----------------------------------------------------------------------------------------- */

/* Walks by rules without any memory of before; keys go to ips if that is not NULL. *found: behind a signal frame there is
 * a frame at sp2. 0: cannot go by rules. */
static unsigned walk_plain(struct at at, struct unwind_memory *memory, uint64_t *ips, uint64_t *mark, uint64_t sp2,
                           bool *found)
{
    bool interrupted = false;
    *mark = 0;
    *found = false;
    for (unsigned count = 0;;) {
        *found |= interrupted && at.sp == sp2;
        if (ips != NULL)
            ips[count] = at.ip;
        count++;
        uint64_t rule = unwind_rule(at.ip);
        enum step step = step_up(memory, rule, &at);
        interrupted |= UNWIND_RULE_KIND(rule) == UNWIND_SIGNAL;
        if (step == STEP_FULL)
            return 0;
        if (step == STEP_END || step == STEP_END_ZERO)
            return count;
        if (step != STEP_OK) {
            *mark = HL_IP_LOST;
            return count;
        }
        if (count == stack_depth) {
            *mark = HL_IP_CUT;
            return count;
        }
    }
}

__attribute__((noinline)) uint32_t capture_nested(struct thread *thread, uintptr_t ip, uintptr_t sp, uintptr_t bp)
{
    uint32_t level = ++thread->nesting;
    struct unwind_memory memory = {0};
    struct at first = {.ip = ip, .sp = sp, .bp = bp};
    uint64_t mark;
    bool found;
    thread->counters.nested++;
    barrier();
    uint64_t *ips = level < NESTING ? thread->ips[level] : NULL;
    unsigned count = walk_plain(first, &memory, ips, &mark, thread->open_sp, &found);
    bool abandoned = count != 0 && mark == 0 && !found;
    if (count == 0 && ips != NULL)
        count = walk_full(ip, sp, bp, &memory, ips, stack_depth, &mark);
    uint32_t node = ips == NULL ? 0 : insert(ips, count, mark, &thread->counters);
    barrier();
    thread->nesting = level - 1;
    if (abandoned) { /* what it was writing is in no known state */
        memset(thread->index, 0, sizeof thread->index);
        thread_forget(thread, thread->era);
        memset(&thread->memory, 0, sizeof thread->memory);
        barrier();
        thread->open_sp = 0;
    }
    return node;
}
