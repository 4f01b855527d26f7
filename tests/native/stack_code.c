/*
 * stack_code.c: code that comes and goes, and code without (or with rare) call frame information.
 * argv: what, and for "reload" the two plugins.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "../../preload/spool.h"
#include "../../preload/stack.h"
#include "stack_test.h"

/* CFI through rbx: only a walk with all registers can do this. */
void call_by_rbx(void (*call)(void));
/* The same with the CFA computed by an expression: rbx + 16. */
void call_by_expression(void (*call)(void));
/* No CFI at all, with a frame pointer; and with rbp used for something else. */
void call_without_cfi(void (*call)(void));
void call_without_frame(void (*call)(void));
__asm__(".text\n"
        ".globl call_by_rbx\ncall_by_rbx:\n.cfi_startproc\n"
        "push %rbx\n.cfi_def_cfa_offset 16\n.cfi_offset %rbx, -16\nmov %rsp, %rbx\n.cfi_def_cfa_register %rbx\n"
        "sub $200, %rsp\nand $-64, %rsp\ncall *%rdi\nmov %rbx, %rsp\n.cfi_def_cfa_register %rsp\npop %rbx\n"
        ".cfi_def_cfa_offset 8\nret\n.cfi_endproc\n"
        ".globl call_by_expression\ncall_by_expression:\n.cfi_startproc\n"
        "push %rbx\n.cfi_def_cfa_offset 16\n.cfi_offset %rbx, -16\nmov %rsp, %rbx\n"
        ".cfi_escape 0x0f, 0x02, 0x73, 0x10\n" /* DW_CFA_def_cfa_expression: DW_OP_breg3 16 */
        "sub $200, %rsp\nand $-64, %rsp\ncall *%rdi\nmov %rbx, %rsp\n.cfi_def_cfa %rsp, 16\npop %rbx\n"
        ".cfi_def_cfa_offset 8\nret\n.cfi_endproc\n"
        ".globl call_without_cfi\ncall_without_cfi:\n"
        "push %rbp\nmov %rsp, %rbp\nsub $64, %rsp\ncall *%rdi\nleave\nret\n"
        ".globl call_without_frame\ncall_without_frame:\n"
        "push %rbp\nmov $3, %ebp\ncall *%rdi\npop %rbp\nret\n");

#define NOINLINE __attribute__((noinline, noclone))
extern struct hl_control *hl_control_page;
static uint32_t last;
static volatile unsigned sink;
static void record(void) { stack_here(); sink++; }
static void record_only(void) { last = stack_only(); sink++; }

static NOINLINE void nest(void (*through)(void (*)(void)), void (*call)(void), unsigned left)
{
    volatile char room[48];
    room[0] = 1;
    if (left > 0)
        nest(through, call, left - 1);
    else
        through(call);
    sink += room[0];
}

static int expect(int condition, const char *what)
{
    if (!condition)
        fprintf(stderr, "expected: %s\n", what);
    return !condition;
}

static int rare(void)
{
    for (unsigned i = 0; i < 50; i++) {
        nest(call_by_rbx, record, i % 6);
        nest(call_by_expression, record, i % 6);
    }
    struct stack_counters counters;
    stack_counters(&counters);
    return expect(counters.full == 100, "every walk needed all registers") + stack_test_report();
}

/* Innermost first: record_only, the code without CFI, nest (left + 1 times), then main and libc. */
static int check_guess(unsigned left)
{
    uint64_t ips[64];
    unsigned count = trie_path(last, ips, 64), nests = 0;
    for (unsigned i = 2; i < count && ips[i] - (uintptr_t)nest < 200; i++)
        nests++;
    return expect(count > left + 4, "the walk goes on behind the code without CFI") +
           expect(nests == left + 1, "each caller is there once") +
           expect(count == 64 || ips[count - 1] != HL_IP_LOST, "it reaches the outermost frame");
}

static int guesses(void)
{
    int wrong = 0;
    static const unsigned char code[] = {0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x40, 0xff, 0xd7, 0xc9, 0xc3};
    void *jit = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(jit, code, sizeof code); /* the same as call_without_cfi */
    static const unsigned char trampoline[] = {0x48, 0x83, 0xec, 0x18, 0xff, 0xd7, 0x48, 0x83, 0xc4, 0x18, 0xc3};
    void *frameless = (char *)jit + 1024; /* sub $24, %rsp; call *%rdi; add $24, %rsp; ret */
    memcpy(frameless, trampoline, sizeof trampoline);
    static const unsigned char padded[] = {0x48, 0x83, 0xec, 0x08, 0xff, 0xd7, 0x90, 0x48, 0x83, 0xc4, 0x08, 0xc3};
    void *nop = (char *)jit + 2048; /* with a nop behind the call */
    memcpy(nop, padded, sizeof padded);
    void (*jitted)(void (*)(void)), (*by_size)(void (*)(void)), (*by_size_behind)(void (*)(void));
    memcpy(&jitted, &jit, sizeof jitted);
    memcpy(&by_size, &frameless, sizeof by_size);
    memcpy(&by_size_behind, &nop, sizeof by_size_behind);
    for (unsigned i = 0; i < 30; i++) {
        nest(call_without_cfi, record_only, i % 7);
        wrong += check_guess(i % 7);
        nest(jitted, record_only, i % 7);
        wrong += check_guess(i % 7);
        nest(by_size, record_only, i % 7);
        wrong += check_guess(i % 7);
        nest(by_size_behind, record_only, i % 7);
        wrong += check_guess(i % 7);
        uint64_t ips[8];
        nest(call_without_frame, record_only, i % 7);
        unsigned count = trie_path(last, ips, 8);
        wrong += expect(count == 3 && ips[2] == HL_IP_LOST, "a frame that cannot be guessed is lost, and says so");
    }
    return wrong != 0;
}

/*
 * Code made at run time whose CFI libgcc was told of, as compilers at run time do. The shim does not ask libgcc (many releases
 * take a lock for the answer, and sort in memory from malloc): to it this is code without CFI, where it goes by the frame
 * pointer, or by the frame's size, or marks the stack. What nobody can tell without the CFI is not here: code that has no frame
 * pointer, does not show its frame's size behind the call, and leaves its caller's rbp as it was. Its caller is skipped.
 */
extern void __register_frame(void *), __deregister_frame(void *);

/* Writes a CIE and an FDE; `how` is the CFI at the call. */
static void describe(unsigned char *section, const void *code, const unsigned char how[4])
{
    static const unsigned char cie[] = {16, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1, 0x78, 16, 0x0c, 7, 8, 0x90, 1, 0, 0};
    uint64_t range[2] = {(uintptr_t)code, 64};
    memcpy(section, cie, sizeof cie); /* CFA = rsp + 8, return address at CFA - 8 */
    section[20] = 28; /* the FDE: so many bytes, and so far from here to the CIE */
    section[24] = 24;
    memcpy(section + 28, range, sizeof range);
    memcpy(section + 44, how, 4);
}

static int registered(void)
{
    static const struct { unsigned char code[16], how[4]; int followed; } made[] = {
        /* push %rbp; mov %rsp, %rbp; sub $64, %rsp; call *%rdi; leave; ret: CFA = rbp + 16 */
        {{0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x40, 0xff, 0xd7, 0xc9, 0xc3}, {0x0c, 6, 16, 0x86}, 1},
        /* sub $24, %rsp; call *%rdi; add $24, %rsp; ret: CFA = rsp + 32 */
        {{0x48, 0x83, 0xec, 0x18, 0xff, 0xd7, 0x48, 0x83, 0xc4, 0x18, 0xc3}, {0x0e, 32, 0, 0}, 1},
        /* push %rbp; mov $3, %ebp; call *%rdi; pop %rbp; ret: CFA = rsp + 16 */
        {{0x55, 0xbd, 3, 0, 0, 0, 0xff, 0xd7, 0x5d, 0xc3}, {0x0e, 16, 0x86, 2}, 0},
    };
    unsigned char *jit = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int wrong = 0;
    for (unsigned k = 0; k < sizeof made / sizeof *made; k++) {
        static _Alignas(8) unsigned char sections[3][64]; /* all zero behind: the end */
        void (*call)(void (*)(void)), *code = jit + 256 * k;
        memcpy(code, made[k].code, sizeof made[k].code);
        memcpy(&call, &code, sizeof call);
        describe(sections[k], code, made[k].how);
        if (k == 0)
            sections[k][48] = 2; /* DW_CFA_offset rbp, 2 */
        __register_frame(sections[k]);
        for (unsigned i = 0; i < 30 && made[k].followed; i++)
            nest(call, record, i % 7);
        for (unsigned i = 0; i < 30 && !made[k].followed; i++) {
            uint64_t ips[8];
            nest(call, record_only, i % 7);
            unsigned count = trie_path(last, ips, 8);
            wrong += expect(count == 3 && ips[2] == HL_IP_LOST, "what only its CFI says is lost, and says so");
        }
        __deregister_frame(sections[k]);
    }
    return wrong + stack_test_report();
}

/* Two libraries with other code at the same addresses. */
static int reload(const char *first, const char *second)
{
    uintptr_t seen = 0;
    unsigned same = 0;
    for (unsigned i = 0; i < 40; i++) {
        void *library = dlopen(i % 2 ? second : first, RTLD_NOW);
        if (library == NULL) {
            fprintf(stderr, "%s\n", dlerror());
            return 64;
        }
        int (*calls)(void (*)(void));
        *(void **)&calls = dlsym(library, "plugin_calls");
        for (unsigned k = 0; k < 5; k++)
            calls(record);
        same += seen == (uintptr_t)calls;
        seen = (uintptr_t)calls;
        dlclose(library);
        stack_flush();
    }
    return expect(same > 30, "the libraries are loaded at the same address") + stack_test_report();
}

/* More stacks than there is room for: 4^9 paths, where SEGMENTS=1 leaves 65,535 nodes. */
static NOINLINE void spread(unsigned left)
{
    if (left == 0) {
        last = stack_only();
        return;
    }
    spread(left - 1);
    sink++;
    spread(left - 1);
    sink += 2;
    spread(left - 1);
    sink += 3;
    spread(left - 1);
    sink += 4;
}

static int exhaust(void)
{
    struct stack_counters counters;
    spread(9);
    stack_counters(&counters);
    uint64_t ips[8];
    unsigned count = trie_path(last, ips, 8);
    return expect(counters.exhausted > 100000, "nodes run out") +
           expect(hl_control_page->nodes == HL_SEGMENT_NODES, "ids handed out are those that could be written") +
           expect(count >= 3 && count < 13, "what is known of the callers is still said") +
           expect(trie_path(HL_SEGMENT_NODES - 1, ips, 8) > 0 && ips[0] != 0, "the last node is written");
}

static int keeps_errno(void)
{
    int wrong = 0;
    for (unsigned i = 0; i < 200; i++) {
        errno = 4000 + (int)i;
        nest(i % 3 ? call_without_frame : call_by_rbx, record_only, i);
        wrong += expect(errno == 4000 + (int)i, "errno is left alone");
        if (i % 20 == 0)
            stack_flush();
    }
    return wrong != 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    stack_test_init(128);
    if (!strcmp(what, "rare"))
        return rare();
    if (!strcmp(what, "guesses"))
        return guesses();
    if (!strcmp(what, "registered"))
        return registered();
    if (!strcmp(what, "reload") && argc == 4)
        return reload(argv[2], argv[3]);
    if (!strcmp(what, "exhaust"))
        return exhaust();
    if (!strcmp(what, "errno"))
        return keeps_errno();
    return 64;
}
