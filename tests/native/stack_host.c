/*
 * stack_host.c: the shim's stack capture in a program of its own: what preload/host.h asks of the rest of the shim, and
 * `stack_here`, which captures the caller's stack and compares it with what libgcc's unwinder says (that of C++ exceptions
 * and of glibc's backtrace()).
 *
 * -DOLD_LIBC: for a libc without _dl_find_object, which libgcc then finds here; NO_FIND_OBJECT=1 in the environment hides
 * it from the unwinder under test.
 */
#define _GNU_SOURCE
#include "../../preload/host.h"
#include "../../preload/spool.h"
#include "../../preload/stack.h"
#include "../../preload/unwind.h"

#include <dlfcn.h>
#include <link.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <unwind.h>

#include "stack_test.h"

enum { LIMIT = 1200 };
static struct hl_control control;
struct hl_control *hl_control_page = &control;
bool host_frugal;
static unsigned depth;
static long captures, mismatches, marks_cut, marks_lost;

void *host_map_private(size_t bytes)
{
    void *start = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return start == MAP_FAILED ? NULL : start;
}

void host_unmap(void *start, size_t bytes) { munmap(start, bytes); }
void *host_symbol(const char *name) { return getenv("NO_FIND_OBJECT") && name[1] == 'd' ? NULL : dlsym(RTLD_DEFAULT, name); }
int host_pid(void) { return getpid(); }
int host_tid(void) { return (int)host_call0(SYS_gettid); }
void host_complain(const char *text) { fputs(text, stderr); }
int modules_find(uintptr_t ip) { (void)ip; return -1; }

struct hl_node *spool_stack_segment(uint32_t k)
{
    static struct hl_node *made[64];
    const char *limit = getenv("SEGMENTS"); /* a full disk */
    if (k >= (limit != NULL ? (unsigned)atoi(limit) : 64))
        return NULL;
    struct hl_node *none = NULL, *fresh = host_map_private(HL_SEGMENT_NODES * sizeof *fresh);
    if (!__atomic_compare_exchange_n(&made[k], &none, fresh, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        munmap(fresh, HL_SEGMENT_NODES * sizeof *fresh);
        return none;
    }
    return fresh;
}

#ifdef OLD_LIBC
int _dl_find_object(void *pc, struct dl_find_object *result);

struct wanted { uintptr_t pc; struct dl_find_object *result; };
static int visit(struct dl_phdr_info *info, size_t size, void *data)
{
    struct wanted *wanted = data;
    void *eh_frame = NULL;
    (void)size;
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_GNU_EH_FRAME)
            eh_frame = (void *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *header = &info->dlpi_phdr[i];
        if (header->p_type != PT_LOAD || wanted->pc - info->dlpi_addr - header->p_vaddr >= header->p_memsz)
            continue;
        wanted->result->dlfo_eh_frame = eh_frame;
        return 1;
    }
    return 0;
}

int _dl_find_object(void *pc, struct dl_find_object *result)
{
    struct wanted wanted = {(uintptr_t)pc, result};
    return dl_iterate_phdr(visit, &wanted) == 1 ? 0 : -1;
}
#endif

struct trace { void **ips; unsigned count, limit; };
static _Unwind_Reason_Code add_frame(struct _Unwind_Context *context, void *data)
{
    struct trace *trace = data;
    if (trace->count < trace->limit)
        trace->ips[trace->count++] = (void *)_Unwind_GetIP(context);
    return _URC_NO_REASON;
}

unsigned stack_test_unwind(void **ips, unsigned limit)
{
    struct trace trace = {ips, 0, limit};
    _Unwind_Backtrace(add_frame, &trace);
    return trace.count > 0 && ips[trace.count - 1] == NULL ? trace.count - 1 : trace.count;
}

void stack_test_init(unsigned max_depth)
{
    depth = max_depth;
    if (stack_init(max_depth) != 0)
        abort();
}

static void complain(const uint64_t *got, unsigned have, void *const *want, unsigned wanted)
{
    fprintf(stderr, "stack differs; ours (%u) and libgcc's (%u):\n", have, wanted);
    for (unsigned i = 0; i < have || i < wanted; i++)
        fprintf(stderr, "  %16lx %16lx\n", i < have ? (unsigned long)got[i] : 0, i < wanted ? (unsigned long)want[i] : 0);
}

/* A frame that a signal interrupted is pc + 1 with us and pc with libgcc. */
static bool same(const uint64_t *got, unsigned i, void *want)
{
    bool interrupted = i > 0 && UNWIND_RULE_KIND(unwind_rule(got[i - 1])) == UNWIND_SIGNAL;
    return got[i] == (uint64_t)want + interrupted;
}

static void compare(uint32_t node, uint64_t ip)
{
    uint64_t got[LIMIT]; /* on the stack: handlers come here while we are here */
    void *want[LIMIT];
    unsigned have = trie_path(node, got, LIMIT), wanted = stack_test_unwind(want, LIMIT), skip = 0;
    __atomic_add_fetch(&captures, 1, __ATOMIC_RELAXED);
    while (skip < wanted && (uint64_t)want[skip] != ip)
        skip++;
    wanted -= skip;
    if (have > 0 && got[have - 1] == HL_IP_LOST) {
        have--;
        __atomic_add_fetch(&marks_lost, 1, __ATOMIC_RELAXED);
    } else if (have > 0 && got[have - 1] == HL_IP_CUT) {
        have--;
        __atomic_add_fetch(&marks_cut, 1, __ATOMIC_RELAXED);
        if (have == depth && wanted > depth)
            wanted = depth;
    }
    bool equal = have == wanted && have > 0;
    for (unsigned i = 0; equal && i < have; i++)
        equal = same(got, i, want[skip + i]);
    if (!equal && __atomic_add_fetch(&mismatches, 1, __ATOMIC_RELAXED) <= 3)
        complain(got, have, want + skip, wanted);
}

__attribute__((noinline, optimize("no-omit-frame-pointer", "no-optimize-sibling-calls"))) uint32_t stack_here(void)
{
    uintptr_t *frame = __builtin_frame_address(0);
    uintptr_t ip = (uintptr_t)__builtin_return_address(0);
    uint32_t node = stack_capture(ip, (uintptr_t)frame + 16, *frame);
    compare(node, ip);
    return node;
}

__attribute__((noinline, optimize("no-omit-frame-pointer", "no-optimize-sibling-calls"))) uint32_t stack_only(void)
{
    uintptr_t *frame = __builtin_frame_address(0);
    return stack_capture((uintptr_t)__builtin_return_address(0), (uintptr_t)frame + 16, *frame);
}

/* Prints what was seen, as one line of NAME=NUMBER, and gives the exit status: 0 if no stack differed. */
int stack_test_report(void)
{
    struct stack_counters c = {0};
    stack_counters(&c);
    printf("captures=%ld mismatches=%ld cut=%ld lost=%ld nodes=%u hits=%lu rejoined=%lu walked=%lu full=%lu nested=%lu compared=%lu\n",
           captures, mismatches, marks_cut, marks_lost, control.nodes, c.hits, c.rejoined, c.walked, c.full, c.nested,
           c.compared);
    return mismatches != 0;
}
