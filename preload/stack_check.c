/*
 * stack_check.c: the check build (-DHEAPLEDGER_CHECK_STACKS). Each stack is walked again with all registers and no cache of
 * any kind, and each 64th one by libgcc's unwinder, that of C++ exceptions, where the program (or this library: link it with
 * -lgcc_s) has loaded it. A difference ends the program.
 */
#ifdef HEAPLEDGER_CHECK_STACKS
#include "stack_state.h"

#include <unwind.h>

enum { CHECK_FRAMES = 512, EVERY = 64 };

static void print(const char *text, const uint64_t *ips, unsigned count)
{
    char line[24] = "  0x0000000000000000\n";
    host_complain(text);
    for (unsigned i = 0; i < count; i++) {
        for (unsigned digit = 0; digit < 16; digit++)
            line[4 + digit] = "0123456789abcdef"[ips[i] >> (60 - 4 * digit) & 15];
        host_complain(line);
    }
}

static __attribute__((noreturn)) void fail(const char *with, const uint64_t *got, unsigned have, const uint64_t *want,
                                           unsigned wanted)
{
    print("heapledger: a stack is wrong. Recorded:\n", got, have);
    print(with, want, wanted);
    __builtin_trap();
}

/* ---- the independent unwinder ---- */

static _Unwind_Reason_Code (*backtrace)(_Unwind_Trace_Fn, void *);
static _Unwind_Ptr (*context_ip)(struct _Unwind_Context *, int *);
static __thread bool comparing;
static __thread uint32_t turn;

struct keys {
    uint64_t *ips;
    uint64_t first; /* what comes before is our own frames */
    unsigned count;
};

static _Unwind_Reason_Code add_key(struct _Unwind_Context *context, void *data)
{
    struct keys *keys = data;
    int before = 0; /* the ip is that of the next instruction: a signal's frame */
    uint64_t key = context_ip(context, &before);
    key += before != 0;
    if (keys->count == CHECK_FRAMES)
        return _URC_END_OF_STACK;
    if ((keys->count > 0 || key == keys->first) && key != 0)
        keys->ips[keys->count++] = key;
    return _URC_NO_REASON;
}

static bool find_libgcc(void)
{
    if (backtrace == NULL) {
        context_ip = (_Unwind_Ptr(*)(struct _Unwind_Context *, int *))host_symbol("_Unwind_GetIPInfo");
        if (context_ip != NULL)
            backtrace = (_Unwind_Reason_Code(*)(_Unwind_Trace_Fn, void *))host_symbol("_Unwind_Backtrace");
    }
    return backtrace != NULL;
}

/*
 * libgcc's stack must be ours as far as it goes, and may be shorter where it comes to code without CFI; longer only where
 * ours is cut, or is lost in code whose CFI only libgcc was told of.
 */
static bool compare(const uint64_t *got, unsigned have, uint64_t *ips)
{
    struct keys keys = {.ips = ips, .first = got[0]};
    bool cut = got[have - 1] == HL_IP_CUT, lost = got[have - 1] == HL_IP_LOST;
    have -= have > 0 && got[have - 1] <= HL_IP_LOST;
    cut |= lost && have > 0 && unwind_find_fde(got[have - 1] - 1) == NULL;
    backtrace(add_key, &keys);
    unsigned common = keys.count < have ? keys.count : have;
    bool same = memcmp(got, ips, common * sizeof *got) == 0;
    bool stopped = keys.count >= have || common == 0 || unwind_find_fde(got[common - 1] - 1) == NULL;
    if (!same || !stopped || (keys.count > have && !cut && have < CHECK_FRAMES))
        fail("libgcc's unwinder:\n", got, have, ips, keys.count);
    return keys.count > 0;
}

/* ---- each stack ---- */

__attribute__((noinline)) void check_stack(uint32_t node, uintptr_t ip, uintptr_t sp, uintptr_t bp, bool partly,
                                            struct stack_counters *counters)
{
    uint64_t got[CHECK_FRAMES + 1], want[CHECK_FRAMES + 1], mark;
    struct unwind_memory memory = {0};
    unsigned limit = stack_depth < CHECK_FRAMES ? stack_depth : CHECK_FRAMES;
    unsigned wanted = walk_full(ip, sp, bp, &memory, want, limit, &mark);
    if (mark != 0 && limit == stack_depth)
        want[wanted++] = mark;
    unsigned have = trie_path(node, got, limit + (limit == stack_depth));
    unsigned skip = partly && have < wanted ? wanted - have : 0;
    if (node == 0)
        return;
    if (have + skip != wanted || memcmp(got, want + skip, have * sizeof *got) != 0)
        fail("Unwound anew:\n", got, have, want, wanted);
    if (partly || comparing || turn++ % EVERY != 0 || !find_libgcc())
        return;
    comparing = true;
    barrier();
    counters->compared += compare(got, have, want);
    barrier();
    comparing = false;
}
#endif
