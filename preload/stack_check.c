/*
 * stack_check.c: the check build (-DHEAPLEDGER_CHECK_STACKS). Each stack is walked again with all registers and no cache of
 * any kind; a difference ends the program.
 */
#ifdef HEAPLEDGER_CHECK_STACKS
#include "stack_state.h"

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

__attribute__((noinline)) void check_stack(uint32_t node, uintptr_t ip, uintptr_t sp, uintptr_t bp, bool partly)
{
    uint64_t got[513], want[513], mark;
    struct unwind_memory memory = {0};
    unsigned limit = stack_depth < 512 ? stack_depth : 512;
    unsigned wanted = walk_full(ip, sp, bp, &memory, want, limit, &mark);
    if (mark != 0 && limit == stack_depth)
        want[wanted++] = mark;
    unsigned have = trie_path(node, got, limit + (limit == stack_depth));
    unsigned skip = partly && have < wanted ? wanted - have : 0;
    if (node == 0 || (have + skip == wanted && memcmp(got, want + skip, have * sizeof *got) == 0))
        return;
    check_print("heapledger: a stack is wrong. Recorded:\n", got, have);
    check_print("Unwound anew:\n", want, wanted);
    __builtin_trap();
}
#endif
