/*
 * stack_state.h: what a thread knows of its stack; between stack.c (the fast ways) and stack_full.c (the others).
 *
 * Per thread, by initial-exec TLS, in memory of our own:
 *
 *   frames[] [ ... free ... | frame 0 (innermost) ... frame n-1 ]       the previous walk, right-aligned, so that what a
 *   checks[] [ ... free ... | checks of frame 0 ... of frame n-1 ]      new walk shares with it stays in place
 *   fresh[]  the frames of a walk in progress, innermost first
 *   log      ring of memo entries, overwritten oldest first; index[set][way] = tag << 48 | position
 *
 * Always: checks of a frame come before those of its caller; frames[i].check is the first one of frame i; frames[i].state
 * is that of the stack that begins there. Behind the last frame there is one that equals no other (sp all ones).
 */
#ifndef HEAPLEDGER_STACK_STATE_H
#define HEAPLEDGER_STACK_STATE_H

#include "host.h"
#include "stack.h"
#include "unwind.h"

#include <string.h>

enum { DEPTH_LIMIT = 4096, NESTING = 3, SETS = 1024, WAYS = 4, SEEN = 4096, TRUSTS = 1024, LOG_BYTES = 512 * 1024, CHECKS_A_FRAME = 3 };

/* rsp, the key (unwind.h), rbp */
struct at { uint64_t sp, ip, bp; };

struct frame {
    struct at at;
    struct stack_state state;
    uint32_t check;
    bool needs_bp;                        /* what is behind depends on bp, this frame's */
};

struct fresh { struct at at; uint64_t rule; };

/* A word that an unwind read. */
struct check { uint64_t address, value; };

struct thread {
    struct thread *next;                  /* in the list of all */
    int32_t owner;                        /* tid; 0 = free */
    uint32_t nesting;                     /* captures inside the open one, by signal handlers */
    uint64_t open_sp;                     /* the open capture's caller; 0: none is open */
    uint64_t era;                         /* what is kept here was learned in this era */
    uint32_t epoch;                       /* the epoch (unwind.h) at its begin */
    uint32_t first;                       /* frames[first .. depth) is the previous walk */
    uint32_t node;                        /* of frames[first] */
    bool cut;                             /* the previous walk was cut at the depth limit */
    struct frame *frames;                 /* depth + 1 */
    struct fresh *fresh;                  /* depth + 1 */
    struct check *checks;                 /* check_limit, and some more that always hold */
    uint8_t *log;
    uint64_t log_head;                    /* bytes ever written */
    struct unwind_memory memory;
    struct stack_counters counters;
    uint64_t *ips[NESTING];               /* depth each */
    uint8_t trust[TRUSTS];                /* does it pay to look the memo up? */
    uint16_t seen[SEEN];                  /* tags of stacks that were walked once */
    uint64_t index[SETS][WAYS];
};

extern HL_HIDDEN uint32_t stack_depth, stack_check_limit; /* stack_depth 0: not initialised */

#define barrier() __asm__ volatile("" ::: "memory")

/* Forgets the stacks, and is in a new era. */
void thread_forget(struct thread *thread, uint64_t era);

/* ---- one step by rule -------------------------------------------------------------------------------------------------- */

enum step {
    STEP_OK,
    STEP_END,             /* outermost by its rule; nothing was read */
    STEP_END_ZERO,        /* outermost by a return address of zero */
    STEP_LOST,            /* for a reason that lies in the frame itself */
    STEP_LOST_UNREADABLE, /* for what some memory was at the moment */
    STEP_FULL             /* needs all registers */
};

/* The kinds that are not plain arithmetic; in stack_full.c. */
enum step step_rare(struct unwind_memory *memory, uint64_t rule, const struct at *frame, struct at *caller);

/* From a frame to its caller. Everything in registers: each step waits for the one before. */
static inline __attribute__((always_inline)) enum step step_up(struct unwind_memory *memory, uint64_t rule,
                                                               struct at *at)
{
    uint64_t base = at->sp, bp_slot = UNWIND_RULE_BP(rule), bp = at->bp, pc = 0;
    if (unlikely(UNWIND_RULE_KIND(rule) != UNWIND_SP)) {
        if (unlikely(UNWIND_RULE_KIND(rule) != UNWIND_BP)) {
            struct at frame = *at, caller = {0};
            enum step step = step_rare(memory, rule, &frame, &caller);
            *at = caller;
            return step;
        }
        base = bp;
    }
    uint64_t cfa = base + (uint64_t)UNWIND_RULE_OFFSET(rule);
    if (bp_slot != 0 && unlikely(!unwind_read(memory, cfa - 8 * bp_slot, &bp)))
        return STEP_LOST_UNREADABLE;
    if (unlikely(cfa <= at->sp || !unwind_read(memory, cfa - 8, &pc)))
        return STEP_LOST_UNREADABLE;
    *at = (struct at){cfa, pc, bp};
    return likely(pc != 0) ? STEP_OK : STEP_END_ZERO;
}

/*
 * The words that the step from `frame` (to `caller`) depended on become checks, put in front of `check`; gives the first.
 * *needs_bp: does what is behind depend on the caller's bp; on return: on the frame's? end: how the step ended.
 */
uint32_t check_rare(struct check *checks, uint32_t check, const struct fresh *frame, const struct at *caller,
                    enum step end, bool *needs_bp);

static inline uint32_t check_add(struct check *checks, uint32_t check, uint64_t address, uint64_t value)
{
    checks[check - 1] = (struct check){address, value};
    return check - 1;
}

/* ---- the slow ways (stack_full.c) -------------------------------------------------------------------------------------- */

/*
 * Walks with all registers. To know those of the hook's caller, begins in this function and goes up through our own
 * frames until the caller's. Gives the number of keys, at most `limit`, and the mark that ends the stack (0: none).
 */
unsigned walk_full(uintptr_t ip, uintptr_t sp, uintptr_t bp, struct unwind_memory *memory, uint64_t *ips, unsigned limit,
                   uint64_t *mark);

/* The node of keys, innermost first, under a mark. */
uint32_t insert(const uint64_t *ips, unsigned count, uint64_t mark, struct stack_counters *counters);

/*
 * A capture is open: we are in a signal handler that interrupted it; or such a handler left by longjmp, and the
 * interrupted capture will never end. In the first case its caller is on our stack, behind the signal's frame.
 */
uint32_t capture_nested(struct thread *thread, uintptr_t ip, uintptr_t sp, uintptr_t bp);

/* The check build: ends the program if `node` is not the stack. `partly`: there was no memory for the inner frames. */
void check_stack(uint32_t node, uintptr_t ip, uintptr_t sp, uintptr_t bp, bool partly, struct stack_counters *counters);

#endif
