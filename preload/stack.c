/*
 * stack.c: which stack is this? Four ways, cheapest first, and each exact:
 *
 *   memo     An unwind is a function of (ip, sp, bp) and of the words it reads. The memo keeps these as checks,
 *            {address, value}, innermost first; if all still match, the stack is the one from then. In this order each
 *            address was computed from words that have just been checked, so nothing is read that an unwind would not.
 *            The entry of a long stack has the checks of its inner frames only; for the rest it names the frame of the
 *            previous walk that has to be there, whose checks are used.
 *   again    The same with the previous walk itself.
 *   rejoin   Walk by cached rules until a frame that the previous walk also had, then run that one's checks from there.
 *   walk     By rules to the end; with all registers if a frame needs more than rsp and rbp (stack_full.c).
 *
 * A walk gives the stack's state, a number of 128 bits, and the table (stack_table.h) its node. Only a stack that is new
 * is looked for frame by frame in the trie.
 *
 * A signal handler may capture inside a capture: open_sp says so, and the inner one walks without touching any of this.
 */
/* No vector registers: a load of 16 bytes waits for the two narrow stores that have just been made, some 5 ns each time. */
#pragma GCC target("general-regs-only")

#include "stack_state.h"
#include "stack_table.h"

#include <errno.h>
#include <stddef.h>

#ifdef HEAPLEDGER_CHECK_STACKS
enum { FLAT_CHECKS = 6 }; /* so that tests come to both kinds of entries */
#else
enum { FLAT_CHECKS = 32 };
#endif
enum { PROBE_FRAMES = 2, CHECK_ROUND = 8, LOG_UNIT = 8, TRUST_LIMIT = 24 };

struct memo {
    struct at at;
    struct at join;                       /* the first frame behind its own checks */
    struct stack_state join_state;
    uint32_t node;
    uint16_t join_index;                  /* in frames[]; depth: none, the checks are all */
    uint16_t checks;
    bool needs_bp;
    uint8_t era;                          /* its low bits */
    struct check check[];
};

static __thread struct thread *self;
static __thread bool making;              /* the thread's state is being made */
static struct thread *all_threads;
uint32_t stack_depth, stack_check_limit;
static uint64_t era_now = 1;
static const uint64_t always_zero = 0;

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
    thread->frames = carve(&at, (stack_depth + 1) * sizeof(struct frame));
    thread->fresh = carve(&at, (stack_depth + 1) * sizeof(struct fresh));
    thread->checks = carve(&at, (stack_check_limit + CHECK_ROUND) * sizeof(struct check));
    for (unsigned i = 0; i < NESTING; i++)
        thread->ips[i] = carve(&at, stack_depth * sizeof(uint64_t));
    thread->log = carve(&at, LOG_BYTES);
    return (size_t)(at - memory);
}

/* The index is cleared when the low bits of the era come again. */
void thread_forget(struct thread *thread, uint64_t era)
{
    if (thread->era >> 8 != era >> 8)
        memset(thread->index, 0, sizeof thread->index);
    thread->first = stack_depth;
    thread->era = era;
    thread->epoch = unwind_epoch();
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
            __atomic_compare_exchange_n(&thread->owner, &owner, me, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {
            memset(thread->index, 0, sizeof thread->index); /* another thread's */
            return thread;
        }
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
    thread->frames[stack_depth].at.sp = ~0ull;
    thread->frames[stack_depth].check = stack_check_limit;
    thread->frames[stack_depth].state = STATE_EMPTY;
    for (unsigned i = 0; i < CHECK_ROUND; i++)
        thread->checks[stack_check_limit + i].address = (uint64_t)&always_zero;
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
    if (making || stack_depth == 0)
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
        thread_forget(thread, __atomic_load_n(&era_now, __ATOMIC_ACQUIRE));
    }
    barrier();
    self = thread;
    making = false;
    return thread;
}

/* ---- the memo ---------------------------------------------------------------------------------------------------------- */

/* The first check that does not hold, or `end`. Four in a round: three loads and one branch each is all it takes. */
static inline __attribute__((always_inline)) const struct check *checks_end(const struct check *check, const struct check *end)
{
    for (; end - check >= 4; check += 4) {
        if (unlikely(unwind_word(check[0].address) != check[0].value))
            return check;
        if (unlikely(unwind_word(check[1].address) != check[1].value))
            return check + 1;
        if (unlikely(unwind_word(check[2].address) != check[2].value))
            return check + 2;
        if (unlikely(unwind_word(check[3].address) != check[3].value))
            return check + 3;
    }
    for (; check < end; check++)
        if (unlikely(unwind_word(check->address) != check->value))
            return check;
    return end;
}

/* Are these the frame's? Then what is behind it is as it was if its checks hold. */
static inline bool at_equal(const struct frame *frame, const struct at *at)
{
    return frame->at.sp == at->sp && frame->at.ip == at->ip && (!frame->needs_bp || frame->at.bp == at->bp);
}

/*
 * Rounds of eight: how many remain changes from one stack to the next, and a branch that cannot be foreseen costs as much as
 * eight checks. Behind the last check there are some that always hold.
 */
static inline __attribute__((always_inline)) bool frame_checks_hold(const struct thread *thread, const struct frame *frame)
{
    const struct check *end = thread->checks + stack_check_limit;
    for (const struct check *check = thread->checks + frame->check; check < end; check += CHECK_ROUND)
#pragma GCC unroll 8
        for (unsigned i = 0; i < CHECK_ROUND; i++)
            if (unlikely(unwind_word(check[i].address) != check[i].value))
                return false;
    return true;
}

/*
 * Two sets hold a stack: that of its first frame, and that of its first PROBE_FRAMES + 1 frames, where the many stacks
 * that come through one allocation wrapper at one depth are apart. Either way all checks decide.
 */
static inline uint64_t memo_hash_more(uint64_t hash, const struct fresh *fresh, uint64_t ip)
{
    for (unsigned i = 1; i < PROBE_FRAMES; i++)
        hash = (hash ^ fresh[i].at.ip) * 0xd6e8feb86659fd93ull;
    hash = (hash ^ ip) * 0xd6e8feb86659fd93ull;
    return hash ^ hash >> 31;
}

static inline uint64_t memo_hash(uint64_t ip, uint64_t sp)
{
    uint64_t hash = (ip ^ sp << 23) * 0x9e3779b97f4a7c15ull;
    return hash ^ hash >> 31;
}

/* The entry at a position, or NULL if it has been overwritten. */
static inline const struct memo *memo_at(const struct thread *thread, uint64_t position)
{
    uint64_t byte = position * LOG_UNIT;
    return thread->log_head - byte <= LOG_BYTES ? (const struct memo *)(thread->log + byte % LOG_BYTES) : NULL;
}

/* Is the stack that of the entry, whose (ip, sp, bp) it has? */
static inline __attribute__((always_inline)) bool memo_holds(const struct thread *thread, const struct memo *memo)
{
    const struct check *end = memo->check + memo->checks;
    if (checks_end(memo->check, end) != end)
        return false;
    if (memo->join_index == stack_depth)
        return true;
    const struct frame *join = &thread->frames[memo->join_index];
    return memo->join_index >= thread->first && at_equal(join, &memo->join) &&
           state_equal(join->state, memo->join_state) && frame_checks_hold(thread, join);
}

/* The position of the entry for this stack, 0 if there is none. */
static inline __attribute__((always_inline)) uint64_t memo_find(struct thread *thread, uint64_t hash, const struct at *at)
{
    const uint64_t *set = thread->index[hash % SETS];
    for (unsigned way = 0; way < WAYS; way++) {
        if (set[way] == 0 || (set[way] ^ hash) >> 48 != 0)
            continue;
        const struct memo *memo = memo_at(thread, set[way] & 0xffffffffffffull);
        if (memo != NULL && memo->at.ip == at->ip && memo->at.sp == at->sp && (!memo->needs_bp || memo->at.bp == at->bp) &&
            memo->era == (uint8_t)thread->era && memo_holds(thread, memo))
            return set[way] & 0xffffffffffffull;
    }
    return 0;
}

/*
 * The same, if it is worth looking: where stacks seldom come again, all that a look gives is cache misses. A miss costs
 * three times what a hit saves, and so trust falls three times as fast as it rises; where there is none, one capture in 64
 * tries all the same. *tried: it was.
 */
static inline __attribute__((always_inline)) uint64_t memo_try(struct thread *thread, uint64_t hash, const struct at *at, bool *tried)
{
    uint8_t *trust = &thread->trust[hash / SETS % TRUSTS];
    *tried = *trust != 0 || thread->counters.captures % 64 == 0;
    if (!*tried)
        return 0;
    uint64_t position = memo_find(thread, hash, at);
    if (likely(position != 0))
        *trust += *trust < TRUST_LIMIT;
    else
        *trust = *trust > 3 ? *trust - 3 : 0;
    return position;
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

/* Was a stack of this hash walked before, not too long ago? It has been now. */
static inline bool memo_seen(struct thread *thread, uint64_t hash)
{
    uint16_t *seen = &thread->seen[hash % SEEN], tag = (uint16_t)(hash >> 40 | 1);
    bool known = *seen == tag;
    *seen = tag;
    return known;
}

/* Remembers the previous walk, whose frames from `join` on are older than it; gives the position, 0 if it is too long. */
static uint64_t memo_add(struct thread *thread, uint32_t join)
{
    if (stack_check_limit - thread->frames[thread->first].check <= FLAT_CHECKS)
        join = stack_depth; /* so few that one loop over all is faster, and a hit more often */
    const struct frame *frame = &thread->frames[thread->first], *rest = &thread->frames[join];
    uint32_t checks = rest->check - frame->check;
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
    memo->at = frame->at;
    memo->join = rest->at;
    memo->join_state = rest->state;
    memo->node = thread->node;
    memo->join_index = (uint16_t)join;
    memo->checks = (uint16_t)checks;
    memo->needs_bp = frame->needs_bp;
    memo->era = (uint8_t)thread->era;
    for (uint32_t i = 0; i < checks; i++)
        memo->check[i] = thread->checks[frame->check + i];
    return start / LOG_UNIT;
}

/* ---- the walk ------------------------------------------------------------------------------------------------------------ */

struct walk {
    uint32_t count;      /* frames in fresh[] */
    uint32_t join;       /* frames[join ..] are their callers; depth: none */
    struct at behind;    /* where the last step led to */
    enum step end;       /* of the last step */
    uint64_t mark;
    bool cut;            /* at the depth limit, here or in frames[] */
    uint64_t hash;       /* memo_hash_more, 0 if the walk did not come that far */
    uint64_t position;   /* the memo's entry, found on the way; 0: none */
    bool tried;          /* ... it was looked for */
};

/* The look-up of the stack will miss the caches as often as not: begins to load its line while the callers are checked. */
static inline void prefetch_node(const struct thread *thread, uint32_t count, const struct frame *join)
{
    struct stack_state callers = join->state;
    for (uint32_t i = count; i-- > 1;)
        callers = state_push(callers, thread->fresh[i].at.ip);
    table_prefetch(callers);
}

/*
 * Is this the frame `old`, with the same callers? With a depth limit the whole must end at the same place as a walk
 * would. *bad: no frame whose first check is before this can be it: the one in front of it does not hold.
 */
static inline bool rejoins(const struct thread *thread, const struct at *at, uint32_t count, const struct frame *old,
                           uint32_t *bad)
{
    uint32_t total = count + stack_depth - (uint32_t)(old - thread->frames);
    if (old->at.ip != at->ip || (old->needs_bp && old->at.bp != at->bp) || old->check < *bad ||
        (thread->cut ? total != stack_depth : total > stack_depth))
        return false;
    prefetch_node(thread, count, old);
    const struct check *end = thread->checks + stack_check_limit, *first_bad = checks_end(thread->checks + old->check, end);
    *bad = (uint32_t)(first_bad - thread->checks) + 1;
    return first_bad == end;
}

static inline struct walk walk(struct thread *thread, uint64_t hash, struct at at)
{
    struct walk walk = {.join = stack_depth};
    struct fresh *fresh = thread->fresh;
    const struct at start = at;
    const struct frame *old = thread->frames + thread->first;
    uint32_t bad = 0;
    for (;;) {
        struct fresh *frame = &fresh[walk.count];
        uint64_t rule = unwind_rule(at.ip);
        frame->at = at;
        frame->rule = rule;
        walk.end = step_up(&thread->memory, rule, &at);
        walk.count++;
        if (unlikely(walk.end != STEP_OK))
            break;
        old += old->at.sp < at.sp; /* most often it is one of the next two: without branches that go either way */
        old += old->at.sp < at.sp;
        while (unlikely(old->at.sp < at.sp))
            old++;
        if (old->at.sp == at.sp && rejoins(thread, &at, walk.count, old, &bad)) {
            walk.join = (uint32_t)(old - thread->frames);
            walk.cut = thread->cut;
            break;
        }
        if (walk.count == PROBE_FRAMES) {
            walk.hash = memo_hash_more(hash, fresh, at.ip);
            walk.position = memo_try(thread, walk.hash, &start, &walk.tried);
            if (walk.position != 0)
                break;
        }
        if (unlikely(walk.count == stack_depth)) {
            walk.mark = HL_IP_CUT;
            walk.cut = true;
            break;
        }
    }
    if (walk.end == STEP_LOST || walk.end == STEP_LOST_UNREADABLE)
        walk.mark = HL_IP_LOST;
    walk.behind = at;
    return walk;
}

/*
 * Gives the frames of a walk their states and checks, outermost first, and puts them in front of the callers they share
 * with the previous walk.
 */
static inline struct stack_state settle(struct thread *thread, const struct walk *walk)
{
    const struct frame *join = &thread->frames[walk->join];
    struct frame *kept = thread->frames + walk->join;
    struct check *checks = thread->checks;
    struct stack_state state = join->state;
    uint32_t check = join->check;
    bool needs_bp = join->needs_bp;
    struct at caller = walk->behind;
    if (walk->mark != 0)
        state = state_push(state, walk->mark);
    for (const struct fresh *frame = thread->fresh + walk->count; frame-- > thread->fresh;) {
        uint64_t rule = frame->rule, bp_slot = UNWIND_RULE_BP(rule);
        struct at at = frame->at;
        if (likely(UNWIND_RULE_KIND(rule) == UNWIND_SP || UNWIND_RULE_KIND(rule) == UNWIND_BP)) {
            check = check_add(checks, check, caller.sp - 8, caller.ip);
            if (bp_slot != 0 && needs_bp)
                check = check_add(checks, check, caller.sp - 8 * bp_slot, caller.bp);
            needs_bp = UNWIND_RULE_KIND(rule) == UNWIND_BP || (bp_slot == 0 && needs_bp);
        } else {
            check = check_rare(checks, check, frame, &caller, walk->end, &needs_bp);
        }
        state = state_push(state, at.ip);
        kept--;
        kept->at = at;
        kept->state = state;
        kept->check = check;
        kept->needs_bp = needs_bp;
        caller = at;
    }
    thread->cut = walk->cut;
    return state;
}

/*
 * The node of a stack that the table does not know, just settled. `caller`: the node of what it shares with the walk before.
 * *complete: all frames have one; else there was no memory, and the node is the deepest there is.
 */
static __attribute__((noinline)) uint32_t learn(struct thread *thread, const struct walk *walk, uint32_t caller,
                                                bool *complete)
{
    const struct frame *frame = thread->frames + walk->join, *first = frame - walk->count;
    uint32_t node = caller;
    *complete = false;
    thread->counters.added++;
    for (const struct frame *ahead = first; ahead < frame; ahead++)
        trie_prefetch(ahead->state);
    if (walk->mark != 0)
        node = trie_child(0, walk->mark, state_push(STATE_EMPTY, walk->mark));
    while (frame-- > first) {
        uint32_t child = trie_child(node, frame->at.ip, frame->state);
        if (unlikely(child == 0))
            return node;
        node = child;
    }
    table_add(first[1].state, first->state, thread->epoch, node);
    *complete = true;
    return node;
}

static __attribute__((noinline)) uint32_t capture_full(struct thread *thread, const struct at *at)
{
    uint64_t mark;
    thread->counters.full++;
    unsigned count = walk_full(at->ip, at->sp, at->bp, &thread->memory, thread->ips[0], stack_depth, &mark);
    thread->counters.lost += mark == HL_IP_LOST;
    return insert(thread->ips[0], count, mark, &thread->counters);
}

/*
 * The most frequent miss: another call of the same function, so that only the innermost frame is new. What walk, settle and
 * the table would say, at once. 0: it is something else.
 */
static inline __attribute__((always_inline)) uint32_t capture_sibling(struct thread *thread, uint64_t hash, struct at at,
                                                                      bool tried)
{
    struct frame *first = &thread->frames[thread->first];
    const struct frame *caller = first + 1;
    if (first->at.sp != at.sp)
        return 0;
    uint64_t rule = unwind_rule(at.ip), bp_slot = UNWIND_RULE_BP(rule), pc, bp = at.bp;
    if (unlikely(UNWIND_RULE_KIND(rule) != UNWIND_SP))
        return 0;
    uint64_t cfa = at.sp + (uint64_t)UNWIND_RULE_OFFSET(rule);
    if (unlikely(caller->at.sp != cfa || cfa <= at.sp))
        return 0;
    struct stack_state state = state_push(caller->state, at.ip);
    if (unlikely(!unwind_read(&thread->memory, cfa - 8, &pc)) || unlikely(pc != caller->at.ip))
        return 0;
    if (bp_slot != 0 && unlikely(!unwind_read(&thread->memory, cfa - 8 * bp_slot, &bp)))
        return 0;
    if (unlikely(caller->needs_bp && caller->at.bp != bp) || unlikely(!frame_checks_hold(thread, caller)))
        return 0;
    uint32_t node = table_find(caller->state, state, thread->epoch);
    if (unlikely(node == 0))
        return 0;
    uint32_t check = check_add(thread->checks, caller->check, cfa - 8, pc);
    if (bp_slot != 0 && caller->needs_bp)
        check = check_add(thread->checks, check, cfa - 8 * bp_slot, bp);
    first->at = at;
    first->state = state;
    first->check = check;
    first->needs_bp = bp_slot == 0 && caller->needs_bp;
    thread->node = node;
    thread->counters.frames++;
    thread->counters.rejoined++;
    if (unlikely(tried) && memo_seen(thread, hash ^ state.lane[0])) {
        uint64_t position = memo_add(thread, thread->first + 1);
        if (position != 0)
            memo_index(thread, hash, position);
    }
    return node;
}

static __attribute__((noinline)) uint32_t capture_walk(struct thread *thread, uint64_t hash, struct at at,
                                                       bool tried)
{
    const struct frame *last = &thread->frames[thread->first];
    if (at_equal(last, &at) && frame_checks_hold(thread, last)) {
        thread->counters.hits++;
        return thread->node;
    }
    uint32_t sibling = capture_sibling(thread, hash, at, tried);
    if (sibling != 0)
        return sibling;
    struct walk found = walk(thread, hash, at);
    thread->counters.frames += found.count;
    if (found.position != 0) {
        thread->counters.hits++;
        if (tried)
            memo_index(thread, hash, found.position);
        return memo_at(thread, found.position)->node;
    }
    if (unlikely(found.end == STEP_FULL))
        return capture_full(thread, &at);
    thread->counters.lost += found.mark == HL_IP_LOST;
    if (found.join < stack_depth)
        thread->counters.rejoined++;
    else
        thread->counters.walked++;
    uint32_t old_node = thread->node, steps = found.join - thread->first; /* from the walk before to what is shared */
    struct stack_state state = settle(thread, &found);
    uint32_t first = found.join - found.count;
    uint32_t node = table_find(thread->frames[first + 1].state, state, thread->epoch);
    thread->first = stack_depth;
    if (unlikely(node == 0)) {
        bool complete;
        node = learn(thread, &found, found.join < stack_depth ? trie_ancestor(old_node, steps) : 0, &complete);
        thread->counters.exhausted += !complete;
        if (!complete)
            return node;
    }
    if (unlikely(found.end == STEP_LOST_UNREADABLE))
        return node; /* ended for a reason that no check can see */
    thread->first = first;
    thread->node = node;
    if ((tried || found.tried) && memo_seen(thread, hash ^ state.lane[0])) {
        uint64_t position = memo_add(thread, found.join);
        if (position != 0 && tried)
            memo_index(thread, hash, position);
        if (position != 0 && found.tried)
            memo_index(thread, found.hash, position);
    }
    return node;
}

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
#ifdef HEAPLEDGER_CHECK_STACKS
    uint64_t exhausted = thread->counters.exhausted;
#endif
    thread->counters.captures++;
    struct at at = {sp, ip, bp};
    bool tried;
    uint64_t hash = memo_hash(ip, sp), position = memo_try(thread, hash, &at, &tried);
    uint32_t node;
    if (likely(position != 0)) {
        thread->counters.hits++;
        node = memo_at(thread, position)->node;
    } else {
        node = capture_walk(thread, hash, at, tried);
    }
#ifdef HEAPLEDGER_CHECK_STACKS
    check_stack(node, ip, sp, bp, thread->counters.exhausted != exhausted, &thread->counters);
#endif
    barrier();
    thread->open_sp = 0;
    return node;
}

int stack_init(unsigned max_depth)
{
    if (stack_depth != 0)
        return 0;
    void *cache = host_map_private(UNWIND_CACHE_BYTES);
    if (cache == NULL || !table_init())
        return -1;
    unwind_init(cache);
    max_depth = max_depth < 1 ? 1 : max_depth > DEPTH_LIMIT ? DEPTH_LIMIT : max_depth;
    stack_check_limit = CHECKS_A_FRAME * max_depth;
    stack_depth = max_depth;
    return 0;
}

void stack_forget(void)
{
    __atomic_add_fetch(&era_now, 1, __ATOMIC_SEQ_CST);
}

void stack_flush(void)
{
    unwind_flush();
    table_renew();
    stack_forget(); /* after the rules are gone: a walk that began in the new era must not have used an old one */
}

void stack_fork_child(void)
{
    trie_forget();
    table_forget();
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
