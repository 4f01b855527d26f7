/*
 * stack.c: which stack is this? Three ways, cheapest first, and each exact:
 *
 *   memo     An unwind is a function of (ip, sp, bp) and of the words it reads. The memo keeps these words as checks,
 *            {address, value}, innermost first; if all still match, the stack is the one from then. In this order each
 *            address was computed from words that have just been checked, so nothing is read that an unwind would not.
 *   rejoin   Walk by cached rules until a frame that the previous walk also had, then run that one's checks from there.
 *   walk     By rules to the end; with all registers if a frame needs more than rsp and rbp.
 *
 * Per thread, by initial-exec TLS, in memory of our own:
 *
 *   frames[] [ ... free ... | frame 0 (innermost) ... frame n-1 ]       the previous walk, right-aligned, so that what a
 *   checks[] [ ... free ... | checks of frame 0 ... of frame n-1 ]      new walk shares with it stays in place
 *   log      ring of memo entries, overwritten oldest first; index[set][way] = tag << 48 | position
 *
 * Always: checks of a frame come before those of its caller; frames[i].check is the first one of frame i; frames[i].node
 * is the node of the stack that begins there.
 *
 * A signal handler may capture inside a capture: open_sp says so, and the inner one walks without touching any of this.
 */
#include "stack.h"

#include "host.h"
#include "unwind.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>

enum { DEPTH_LIMIT = 4096, NESTING = 3, SETS = 1024, WAYS = 4, LOG_BYTES = 1024 * 1024, CHECKS_A_FRAME = 3,
       PROBE_FRAMES = 2 };
#define LOG_UNIT 16u

struct frame {
    uint64_t ip, sp, bp;                  /* its key (unwind.h), rsp and rbp */
    uint64_t pc_slot, bp_slot, cfa_slot;  /* where the caller's were read; 0: not read */
    uint32_t node, check;
    bool uses_bp;                         /* the step up from here depends on bp */
    bool needs_bp;                        /* so does the whole rest, bp being this frame's */
    bool checks_bp;                       /* the step depends on the caller's bp too (a guess) */
    bool interrupted;                     /* the caller's: its key is pc + 1 */
};

struct check { uint64_t address, value; };

struct memo {
    uint64_t ip, sp, bp;
    uint32_t node;
    uint16_t checks;
    bool needs_bp;
    uint8_t era;                          /* its low bits */
    struct check check[];
};

struct thread {
    struct thread *next;                  /* in the list of all */
    int32_t owner;                        /* tid; 0 = free */
    uint64_t open_sp;                     /* the open capture's caller; 0: none is open */
    uint32_t nesting;                     /* captures inside the open one, by signal handlers */
    uint64_t era;                         /* what is kept here was learned in this era */
    struct unwind_memory memory;
    struct stack_counters counters;
    uint32_t first;                       /* frames[first .. depth) is the previous walk */
    bool cut;                             /* ... which was cut at the depth limit */
    uint64_t log_head;                    /* bytes ever written */
    uint8_t *log;
    struct frame *frames, *fresh;         /* depth; depth + 1 */
    struct check *checks;                 /* check_limit */
    uint64_t *ips[NESTING];               /* depth each */
    uint64_t index[SETS][WAYS];
};

static __thread struct thread *self;
static __thread bool making;              /* the thread's state is being made */
static struct thread *all_threads;
static uint32_t depth_limit, check_limit; /* depth_limit 0: not initialised */
static uint64_t era_now = 1;

#define barrier() __asm__ volatile("" ::: "memory")

/* ---- a thread's state ------------------------------------------------------------------------------------------------ */

static void *carve(uint8_t **at, size_t bytes)
{
    void *piece = *at;
    *at += (bytes + 63) & ~(size_t)63;
    return piece;
}

static size_t thread_lay_out(struct thread *thread, uint8_t *memory)
{
    uint8_t *at = memory;
    (void)carve(&at, sizeof *thread);
    static struct thread unused; /* written, never read; not on the stack: a thread may have 16 KB of it */
    if (thread == NULL)
        thread = &unused;
    thread->frames = carve(&at, depth_limit * sizeof(struct frame));
    thread->fresh = carve(&at, (depth_limit + 1) * sizeof(struct frame));
    thread->checks = carve(&at, check_limit * sizeof(struct check));
    for (unsigned i = 0; i < NESTING; i++)
        thread->ips[i] = carve(&at, depth_limit * sizeof(uint64_t));
    thread->log = carve(&at, LOG_BYTES);
    return (size_t)(at - memory);
}

/* Forgets the stacks, and is in a new era. The index is cleared when the low bits of the era come again. */
static void thread_forget(struct thread *thread, uint64_t era)
{
    if (thread->era >> 8 != era >> 8)
        memset(thread->index, 0, sizeof thread->index);
    thread->first = depth_limit;
    thread->era = era;
}

static bool thread_is_gone(int tid, int me)
{
    return tid == me || (!host_frugal && host_call3(SYS_tgkill, host_pid(), tid, 0) == -ESRCH);
}

/* A state whose thread has ended. Nobody tells us: a thread may free blocks until its very end. */
static struct thread *thread_reuse(int me)
{
    struct thread *thread = __atomic_load_n(&all_threads, __ATOMIC_ACQUIRE);
    for (; thread != NULL; thread = thread->next) {
        int32_t owner = __atomic_load_n(&thread->owner, __ATOMIC_ACQUIRE);
        if ((owner == 0 || thread_is_gone(owner, me)) &&
            __atomic_compare_exchange_n(&thread->owner, &owner, me, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED))
            return thread;
    }
    return NULL;
}

static struct thread *thread_new(int me)
{
    uint8_t *memory = host_map_private(thread_lay_out(NULL, NULL));
    if (memory == NULL)
        return NULL;
    struct thread *thread = (struct thread *)memory;
    thread_lay_out(thread, memory);
    thread->owner = me;
    thread->next = __atomic_load_n(&all_threads, __ATOMIC_ACQUIRE);
    while (!__atomic_compare_exchange_n(&all_threads, &thread->next, thread, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        ;
    return thread;
}

/* This thread's state, made if it has none; NULL: no memory, or we are inside the making. */
static struct thread *thread_get(void)
{
    if (self != NULL)
        return self;
    if (making || depth_limit == 0)
        return NULL;
    making = true;
    barrier();
    int me = host_tid();
    struct thread *thread = thread_reuse(me);
    if (thread == NULL)
        thread = thread_new(me);
    if (thread != NULL) {
        thread->open_sp = 0;
        memset(&thread->memory, 0, sizeof thread->memory);
        memset(&thread->counters, 0, sizeof thread->counters);
        memset(thread->index, 0, sizeof thread->index); /* another thread's */
        thread_forget(thread, __atomic_load_n(&era_now, __ATOMIC_ACQUIRE));
    }
    barrier();
    self = thread;
    making = false;
    return thread;
}

/* ---- one step by rule ------------------------------------------------------------------------------------------------ */

enum step { STEP_OK, STEP_END, STEP_LOST, STEP_LOST_UNREADABLE, STEP_FULL };

static enum step step_signal(struct unwind_memory *memory, struct frame *frame, struct frame *caller)
{
    frame->pc_slot = frame->sp + UNWIND_SIGNAL_PC;
    frame->bp_slot = frame->sp + UNWIND_SIGNAL_BP;
    frame->cfa_slot = frame->sp + UNWIND_SIGNAL_SP;
    frame->interrupted = true;
    if (!unwind_read(memory, frame->pc_slot, &caller->ip) || !unwind_read(memory, frame->bp_slot, &caller->bp) ||
        !unwind_read(memory, frame->cfa_slot, &caller->sp))
        return STEP_LOST_UNREADABLE;
    caller->ip++;
    return STEP_OK;
}

static enum step step_guess(struct unwind_memory *memory, struct frame *frame, struct frame *caller)
{
    bool unreadable = false;
    frame->uses_bp = true;
    if (frame->bp % 8 != 0 || frame->bp < frame->sp)
        return STEP_LOST; /* depends on nothing but sp and bp */
    if (!unwind_guess(memory, frame->sp, frame->bp, &caller->ip, &caller->sp, &caller->bp, &unreadable))
        return STEP_LOST_UNREADABLE;
    frame->checks_bp = true;
    frame->bp_slot = frame->bp;
    frame->pc_slot = frame->bp + 8;
    return STEP_OK;
}

static enum step step_drap(struct unwind_memory *memory, uint32_t rule, struct frame *frame, struct frame *caller)
{
    frame->uses_bp = true;
    frame->cfa_slot = frame->bp + (uint64_t)UNWIND_RULE_OFFSET(rule);
    frame->bp_slot = frame->bp;
    if (!unwind_read(memory, frame->cfa_slot, &caller->sp) || !unwind_read(memory, frame->bp_slot, &caller->bp))
        return STEP_LOST_UNREADABLE;
    frame->pc_slot = caller->sp - 8;
    if (caller->sp <= frame->sp || !unwind_read(memory, frame->pc_slot, &caller->ip))
        return STEP_LOST_UNREADABLE;
    return caller->ip != 0 ? STEP_OK : STEP_END;
}

/* The kinds that are not plain arithmetic. Apart, so that the common step is straight code. */
static __attribute__((noinline)) enum step step_rare(struct unwind_memory *memory, uint32_t rule, struct frame *frame,
                                                     struct frame *caller)
{
    frame->pc_slot = frame->bp_slot = frame->cfa_slot = 0;
    frame->uses_bp = frame->checks_bp = frame->interrupted = false;
    switch (UNWIND_RULE_KIND(rule)) {
    case UNWIND_DRAP: return step_drap(memory, rule, frame, caller);
    case UNWIND_SIGNAL: return step_signal(memory, frame, caller);
    case UNWIND_END: return STEP_END;
    case UNWIND_GUESS: return step_guess(memory, frame, caller);
    default: return STEP_FULL;
    }
}

/* Fills in the caller's ip, sp, bp, and in `frame` what the step depended on. STEP_END may leave caller->ip 0: then a
 * return address of zero was read. */
static inline enum step step_up(struct unwind_memory *memory, struct frame *frame, struct frame *caller)
{
    uint32_t rule = unwind_rule(frame->ip), bp_slot = UNWIND_RULE_BP(rule);
    if (unlikely(UNWIND_RULE_KIND(rule) > UNWIND_BP))
        return step_rare(memory, rule, frame, caller);
    bool uses_bp = UNWIND_RULE_KIND(rule) == UNWIND_BP;
    uint64_t bp = frame->bp, pc, cfa = (uses_bp ? bp : frame->sp) + (uint64_t)UNWIND_RULE_OFFSET(rule);
    frame->cfa_slot = 0;
    frame->uses_bp = uses_bp;
    frame->checks_bp = frame->interrupted = false;
    frame->pc_slot = cfa - 8;
    frame->bp_slot = bp_slot != 0 ? cfa - 8 * bp_slot : 0;
    if (bp_slot != 0 && unlikely(!unwind_read(memory, frame->bp_slot, &bp)))
        return STEP_LOST_UNREADABLE;
    if (unlikely(cfa <= frame->sp || !unwind_read(memory, frame->pc_slot, &pc)))
        return STEP_LOST_UNREADABLE;
    caller->ip = pc;
    caller->sp = cfa;
    caller->bp = bp;
    return likely(pc != 0) ? STEP_OK : STEP_END;
}

/* ---- the walk with all registers, from here -------------------------------------------------------------------------- */

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

/*
 * Walks with all registers. To know those of the hook's caller, begins in this function and goes up through our own
 * frames until the caller's. Gives the number of keys, at most `limit`, and the mark that ends the stack (0: none).
 */
static __attribute__((noinline)) unsigned walk_full(uintptr_t ip, uintptr_t sp, uintptr_t bp,
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

/* The node of keys, innermost first, under a mark. */
static uint32_t insert(const uint64_t *ips, unsigned count, uint64_t mark, struct stack_counters *counters)
{
    uint32_t node = mark != 0 ? trie_child(0, mark) : 0;
    while (count > 0) {
        uint32_t child = trie_child(node, ips[--count]);
        if (child == 0) {
            counters->exhausted++;
            break;
        }
        node = child;
    }
    return node;
}

/* ---- a capture inside a capture ---------------------------------------------------------------------------------------- */

/* Walks by rules without any memory of before; keys go to ips if that is not NULL. *found: behind a signal frame there is
 * a frame at sp2. 0: cannot go by rules. */
static unsigned walk_plain(struct frame first, struct unwind_memory *memory, uint64_t *ips, uint64_t *mark,
                           uint64_t sp2, bool *found)
{
    struct frame frame = first, caller = first;
    bool interrupted = false;
    *mark = 0;
    *found = false;
    for (unsigned count = 0;;) {
        *found |= interrupted && frame.sp == sp2;
        if (ips != NULL)
            ips[count] = frame.ip;
        count++;
        enum step step = step_up(memory, &frame, &caller);
        interrupted |= frame.interrupted;
        if (step == STEP_FULL)
            return 0;
        if (step == STEP_END)
            return count;
        if (step != STEP_OK) {
            *mark = HL_IP_LOST;
            return count;
        }
        if (count == depth_limit) {
            *mark = HL_IP_CUT;
            return count;
        }
        frame = caller;
    }
}

/*
 * A capture is open: we are in a signal handler that interrupted it; or such a handler left by longjmp, and the
 * interrupted capture will never end. In the first case its caller is on our stack, behind the signal's frame.
 */
static __attribute__((noinline)) uint32_t capture_nested(struct thread *thread, uintptr_t ip, uintptr_t sp,
                                                         uintptr_t bp)
{
    uint32_t level = ++thread->nesting;
    struct unwind_memory memory = {0};
    struct frame first = {.ip = ip, .sp = sp, .bp = bp};
    uint64_t mark;
    bool found;
    thread->counters.nested++;
    barrier();
    uint64_t *ips = level < NESTING ? thread->ips[level] : NULL;
    unsigned count = walk_plain(first, &memory, ips, &mark, thread->open_sp, &found);
    bool abandoned = count != 0 && mark == 0 && !found;
    if (count == 0 && ips != NULL)
        count = walk_full(ip, sp, bp, &memory, ips, depth_limit, &mark);
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

/* ---- the memo ---------------------------------------------------------------------------------------------------------- */

/*
 * Two sets hold a stack: that of its first frame, and that of its first PROBE_FRAMES + 1 frames, where the many stacks
 * that come through one allocation wrapper at one depth are apart. Either way all checks decide.
 */
static inline uint64_t memo_hash_more(uint64_t hash, const struct frame *fresh)
{
    for (unsigned i = 1; i <= PROBE_FRAMES; i++)
        hash = (hash ^ fresh[i].ip) * 0xd6e8feb86659fd93ull;
    return hash ^ hash >> 31;
}

static inline uint64_t memo_hash(uint64_t ip, uint64_t sp)
{
    uint64_t hash = (ip ^ sp << 23) * 0x9e3779b97f4a7c15ull;
    return hash ^ hash >> 31;
}

static inline bool checks_hold(const struct check *check, const struct check *end)
{
    for (; check < end; check++)
        if (unwind_word(check->address) != check->value)
            return false;
    return true;
}

/* The entry at a position, or NULL if it has been overwritten. */
static inline const struct memo *memo_at(const struct thread *thread, uint64_t position)
{
    uint64_t byte = position * LOG_UNIT;
    return thread->log_head - byte <= LOG_BYTES ? (const struct memo *)(thread->log + byte % LOG_BYTES) : NULL;
}

/* The position of the entry for this stack, 0 if there is none. */
static inline uint64_t memo_find(struct thread *thread, uint64_t hash, uint64_t ip, uint64_t sp, uint64_t bp)
{
    const uint64_t *set = thread->index[hash % SETS];
    for (unsigned way = 0; way < WAYS; way++) {
        if (set[way] == 0 || (set[way] ^ hash) >> 48 != 0)
            continue;
        const struct memo *memo = memo_at(thread, set[way] & 0xffffffffffffull);
        if (memo != NULL && memo->ip == ip && memo->sp == sp && (!memo->needs_bp || memo->bp == bp) &&
            memo->era == (uint8_t)thread->era && checks_hold(memo->check, memo->check + memo->checks))
            return set[way] & 0xffffffffffffull;
    }
    return 0;
}

/* Points to an entry from the set of `hash`, in place of the set's oldest. */
static void memo_index(struct thread *thread, uint64_t hash, uint64_t position)
{
    uint64_t *set = thread->index[hash % SETS], *oldest = set;
    for (unsigned way = 1; way < WAYS; way++)
        if ((set[way] << 16) < (*oldest << 16))
            oldest = &set[way];
    *oldest = (hash >> 48 << 48) | position;
}

/* Remembers the previous walk (frames[first ..]); gives its position, 0 if it is too long. */
static uint64_t memo_add(struct thread *thread)
{
    const struct frame *frame = &thread->frames[thread->first];
    uint32_t checks = check_limit - frame->check;
    size_t bytes = (sizeof(struct memo) + checks * sizeof(struct check) + LOG_UNIT - 1) / LOG_UNIT * LOG_UNIT;
    if (bytes > LOG_BYTES / 8 || checks > UINT16_MAX)
        return 0;
    uint64_t start = thread->log_head;
    if (start == 0)
        start = LOG_BYTES; /* so that no position is 0 */
    if (start % LOG_BYTES + bytes > LOG_BYTES)
        start += LOG_BYTES - start % LOG_BYTES;
    thread->log_head = start + bytes;
    struct memo *memo = (struct memo *)(thread->log + start % LOG_BYTES);
    memo->ip = frame->ip;
    memo->sp = frame->sp;
    memo->bp = frame->bp;
    memo->node = frame->node;
    memo->checks = (uint16_t)checks;
    memo->needs_bp = frame->needs_bp;
    memo->era = (uint8_t)thread->era;
    memcpy(memo->check, thread->checks + frame->check, checks * sizeof(struct check));
    return start / LOG_UNIT;
}

/* ---- the walk ------------------------------------------------------------------------------------------------------------ */

struct walk {
    uint32_t count;      /* frames in fresh[]; fresh[count] is the one behind (its ip 0: none) */
    uint32_t join;       /* frames[join ..] are its callers; depth_limit: none */
    uint64_t mark;
    bool cut;            /* at the depth limit, here or in frames[] */
    bool changeable;     /* ended for a reason that no check can see */
    bool needs_bp;       /* what is behind depends on rbp */
    bool full;           /* cannot go by rules */
    uint64_t hash;       /* memo_hash_more, 0 if the walk did not come that far */
    uint64_t position;   /* the memo's entry, found on the way; 0: none */
};

/*
 * Is fresh[count] a frame of the previous walk, with the same callers? *at: where in frames[] to look on. With a depth
 * limit the whole must end at the same place as a walk would.
 */
static inline bool rejoins(struct thread *thread, const struct frame *frame, uint32_t count, uint32_t *at)
{
    uint32_t i = *at;
    while (i < depth_limit && thread->frames[i].sp < frame->sp)
        i++;
    *at = i;
    if (i == depth_limit)
        return false;
    const struct frame *old = &thread->frames[i];
    if (old->sp != frame->sp || old->ip != frame->ip || (old->needs_bp && old->bp != frame->bp))
        return false;
    uint32_t total = count + depth_limit - i;
    if (thread->cut ? total != depth_limit : total > depth_limit)
        return false;
    if (checks_hold(&thread->checks[old->check], &thread->checks[check_limit]))
        return true;
    *at = i + 1;
    return false;
}

static inline struct walk walk(struct thread *thread, uint64_t hash, uint64_t ip, uint64_t sp, uint64_t bp)
{
    struct walk walk = {.join = depth_limit};
    struct frame *fresh = thread->fresh;
    uint32_t at = thread->first;
    fresh[0].ip = ip;
    fresh[0].sp = sp;
    fresh[0].bp = bp;
    for (;;) {
        struct frame *frame = &fresh[walk.count];
        if (rejoins(thread, frame, walk.count, &at)) {
            walk.join = at;
            walk.cut = thread->cut;
            walk.needs_bp = thread->frames[at].needs_bp;
            return walk;
        }
        enum step step = step_up(&thread->memory, frame, frame + 1);
        walk.count++;
        if (step == STEP_OK) {
            if (walk.count == PROBE_FRAMES) {
                walk.hash = memo_hash_more(hash, fresh);
                walk.position = memo_find(thread, walk.hash, ip, sp, bp);
                if (walk.position != 0)
                    return walk;
            }
            if (unlikely(walk.count == depth_limit)) {
                walk.mark = HL_IP_CUT;
                walk.cut = true;
                return walk;
            }
            continue;
        }
        if (step == STEP_LOST || step == STEP_LOST_UNREADABLE) {
            walk.mark = HL_IP_LOST;
            walk.changeable = step == STEP_LOST_UNREADABLE;
        }
        walk.full = step == STEP_FULL;
        return walk;
    }
}

static inline uint32_t check_add(struct thread *thread, uint32_t at, uint64_t address, uint64_t value)
{
    thread->checks[at - 1] = (struct check){address, value};
    return at - 1;
}

/* Copies a frame word by word: wider loads would wait for the narrow stores that have just been made. */
static inline void frame_copy(struct frame *to, const struct frame *from)
{
    const uint64_t *in = &from->ip;
    uint64_t *out = &to->ip;
    for (unsigned i = 0; i < 6; i++) {
        uint64_t word = in[i];
        __asm__("" : "+r"(word));
        out[i] = word;
    }
    to->uses_bp = from->uses_bp;
    to->checks_bp = from->checks_bp;
    to->interrupted = from->interrupted;
}

/*
 * Gives the frames of a walk their nodes and checks, outermost first, and puts them in front of the callers they share
 * with the previous walk. False: no memory for a node; *node is then the deepest there is.
 */
static inline bool settle(struct thread *thread, const struct walk *walk, uint32_t *node)
{
    struct frame *fresh = thread->fresh;
    uint32_t check = walk->join < depth_limit ? thread->frames[walk->join].check : check_limit;
    bool needs_bp = walk->needs_bp;
    uint32_t first = walk->join - walk->count;
    *node = walk->join < depth_limit ? thread->frames[walk->join].node : 0;
    thread->first = depth_limit;
    if (walk->mark != 0)
        *node = trie_child(0, walk->mark);
    for (uint32_t i = walk->count; i-- > 0;) {
        struct frame *frame = &fresh[i], *caller = &fresh[i + 1];
        if (frame->pc_slot != 0)
            check = check_add(thread, check, frame->pc_slot, caller->ip - frame->interrupted);
        if (frame->bp_slot != 0 && (needs_bp || frame->checks_bp))
            check = check_add(thread, check, frame->bp_slot, caller->bp);
        if (frame->cfa_slot != 0)
            check = check_add(thread, check, frame->cfa_slot, caller->sp);
        needs_bp = frame->uses_bp || (frame->bp_slot == 0 && needs_bp);
        uint32_t child = trie_child(*node, frame->ip);
        if (unlikely(child == 0))
            return false;
        struct frame *kept = &thread->frames[first + i];
        frame_copy(kept, frame);
        kept->needs_bp = needs_bp;
        kept->check = check;
        kept->node = *node = child;
    }
    thread->cut = walk->cut;
    if (!walk->changeable)
        thread->first = first;
    return true;
}

static __attribute__((noinline)) uint32_t capture_walk(struct thread *thread, uint64_t hash, uint64_t ip, uint64_t sp,
                                                       uint64_t bp)
{
    struct walk found = walk(thread, hash, ip, sp, bp);
    uint32_t node;
    thread->counters.frames += found.count;
    if (found.position != 0) {
        thread->counters.hits++;
        memo_index(thread, hash, found.position);
        return memo_at(thread, found.position)->node;
    }
    thread->counters.lost += found.mark == HL_IP_LOST;
    if (unlikely(found.full)) {
        uint64_t mark;
        thread->counters.full++;
        unsigned count = walk_full(ip, sp, bp, &thread->memory, thread->ips[0], depth_limit, &mark);
        thread->counters.lost += mark == HL_IP_LOST;
        return insert(thread->ips[0], count, mark, &thread->counters);
    }
    if (found.join < depth_limit)
        thread->counters.rejoined++;
    else
        thread->counters.walked++;
    if (unlikely(!settle(thread, &found, &node))) {
        thread->counters.exhausted++;
    } else if (thread->first < depth_limit) {
        uint64_t position = memo_add(thread);
        if (position != 0)
            memo_index(thread, hash, position);
        if (position != 0 && found.hash != 0)
            memo_index(thread, found.hash, position);
    }
    return node;
}

/* ---- the check build -------------------------------------------------------------------------------------------------- */

#ifdef HEAPLEDGER_CHECK_STACKS
static void check_print(const char *text, const uint64_t *ips, unsigned count)
{
    char line[24] = "  0x0000000000000000\n";
    host_complain(text);
    for (unsigned i = 0; i < count; i++) {
        for (unsigned digit = 0; digit < 16; digit++)
            line[4 + digit] = "0123456789abcdef"[ips[i] >> (60 - 4 * digit) & 15];
        host_complain(line);
    }
}

/* Walks again with all registers and no cache of any kind, compares, and ends the program on a difference. `partly`: there
 * was no memory for the inner frames. */
static __attribute__((noinline)) void check_stack(uint32_t node, uintptr_t ip, uintptr_t sp, uintptr_t bp, bool partly)
{
    uint64_t got[513], want[513], mark;
    struct unwind_memory memory = {0};
    unsigned limit = depth_limit < 512 ? depth_limit : 512;
    unsigned wanted = walk_full(ip, sp, bp, &memory, want, limit, &mark);
    if (mark != 0 && limit == depth_limit)
        want[wanted++] = mark;
    unsigned have = trie_path(node, got, limit + (limit == depth_limit));
    unsigned skip = partly && have < wanted ? wanted - have : 0;
    if (node == 0 || (have + skip == wanted && memcmp(got, want + skip, have * sizeof *got) == 0))
        return;
    check_print("heapledger: a stack is wrong. Recorded:\n", got, have);
    check_print("Unwound anew:\n", want, wanted);
    __builtin_trap();
}
#endif

/* ---- the interface ------------------------------------------------------------------------------------------------------ */

uint32_t stack_capture(uintptr_t ip, uintptr_t sp, uintptr_t bp)
{
    struct thread *thread = self;
    if (unlikely(thread == NULL) && (thread = thread_get()) == NULL)
        return 0;
    if (unlikely(thread->open_sp != 0))
        return capture_nested(thread, ip, sp, bp);
    thread->nesting = 0;
    barrier();
    thread->open_sp = sp;
    barrier();
    uint64_t era = __atomic_load_n(&era_now, __ATOMIC_ACQUIRE);
    if (unlikely(thread->era != era))
        thread_forget(thread, era);
    uint64_t exhausted __attribute__((unused)) = thread->counters.exhausted; /* for the check build */
    thread->counters.captures++;
    uint64_t hash = memo_hash(ip, sp);
    uint64_t position = memo_find(thread, hash, ip, sp, bp);
    uint32_t node;
    if (likely(position != 0)) {
        thread->counters.hits++;
        node = memo_at(thread, position)->node;
    } else {
        node = capture_walk(thread, hash, ip, sp, bp);
    }
#ifdef HEAPLEDGER_CHECK_STACKS
    check_stack(node, ip, sp, bp, thread->counters.exhausted != exhausted);
#endif
    barrier();
    thread->open_sp = 0;
    return node;
}

int stack_init(unsigned max_depth)
{
    if (depth_limit != 0)
        return 0;
    void *cache = host_map_private(UNWIND_BUCKETS * sizeof(struct unwind_bucket));
    if (cache == NULL)
        return -1;
    unwind_init(cache);
    max_depth = max_depth < 1 ? 1 : max_depth > DEPTH_LIMIT ? DEPTH_LIMIT : max_depth;
    check_limit = CHECKS_A_FRAME * max_depth;
    depth_limit = max_depth;
    return 0;
}

void stack_forget(void)
{
    __atomic_add_fetch(&era_now, 1, __ATOMIC_SEQ_CST);
}

void stack_flush(void)
{
    unwind_flush();
    stack_forget(); /* after the rules are gone: a walk that began in the new era must not have used an old one */
}

void stack_fork_child(void)
{
    trie_forget();
    stack_forget();
    for (struct thread *thread = all_threads; thread != NULL; thread = thread->next)
        thread->owner = 0;
    making = false;
    if (self != NULL) {
        self->owner = host_tid();
        self->open_sp = 0;
    }
}

void stack_thread_init(void)
{
    (void)thread_get();
}

bool stack_counters(struct stack_counters *counters)
{
    if (self == NULL)
        return false;
    *counters = self->counters;
    return true;
}
