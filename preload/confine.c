/*
 * confine.c: a program that confines itself with seccomp.
 *
 * A filter that answers one of our own system calls with a signal would kill the program for something it never did. So each
 * filter is asked before it is installed: it is a short program of classic BPF, which is run here for every system call that
 * the shim makes. If the answer to any of them is fatal, recording stops first, and no call of ours follows: not in this
 * process, not in its children, not in what they exec. Answers that are an error are no trouble, except where waiting and
 * telling the time depend on them. Filters installed by a bare `syscall` instruction are not seen.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/seccomp.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "hooks.h"
#include "image.h"

#define PR_GET_NAME_ 16
#define PR_SET_SECCOMP_ 22
#define WIPE_ON_FORK 18
#define FIXED_NOREPLACE 0x100000
#define SOME 0x110000000000ull /* an address of ours */

/* ---- what we ask for ---- */

static const struct {
    int number;
    bool needed; /* an error would not do either */
    uint64_t arguments[6];
} our_calls[] = {
    {SYS_clock_gettime, true, {1, SOME}},
    {SYS_futex, true, {SOME, FUTEX_WAIT, 0, SOME}},
    {SYS_futex, true, {SOME, FUTEX_WAKE, 1}},
    {SYS_nanosleep, true, {SOME}},
    {SYS_getpid, true, {0}},
    {SYS_gettid, true, {0}},
    {SYS_getppid, false, {0}},
    {SYS_rt_sigprocmask, true, {2, SOME, 0, 8}},
    {SYS_sched_yield, false, {0}},
    {SYS_sigaltstack, false, {0, SOME}},
    {SYS_tgkill, false, {1, 1, 0}},
    {SYS_prctl, false, {PR_GET_NAME_, SOME}},
    {SYS_prlimit64, false, {0, RLIMIT_FSIZE, 0, SOME}},
    {SYS_brk, false, {0}},
    {SYS_mmap, false, {SOME, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | FIXED_NOREPLACE, 3}},
    {SYS_mmap, false, {SOME, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | FIXED_NOREPLACE, ~0ull}},
    {SYS_munmap, false, {SOME, 4096}},
    {SYS_madvise, false, {SOME, 4096, WIPE_ON_FORK}},
    {SYS_open, false, {SOME, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600}},
    {SYS_open, false, {SOME, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600}},
    {SYS_open, false, {SOME, O_RDONLY | O_CLOEXEC}},
    {SYS_read, false, {3, SOME, 4096}},
    {SYS_write, false, {3, SOME, 64}},
    {SYS_pwrite64, false, {3, SOME, 4096}},
    {SYS_fallocate, false, {3, 0, 0, 4096}},
    {SYS_close, false, {3}},
    {SYS_mkdir, false, {SOME, 0700}},
    {SYS_rename, false, {SOME, SOME}},
    {SYS_unlink, false, {SOME}},
    {SYS_readlink, false, {SOME, SOME, 4096}},
    {SYS_faccessat, false, {(uint64_t)AT_FDCWD, SOME, 1}},
};

/* ---- running a filter ---- */

struct machine {
    uint32_t a, x, memory[BPF_MEMWORDS];
};

static bool load_word(const struct seccomp_data *data, uint32_t offset, uint32_t *into)
{
    if (offset % 4 || offset >= sizeof *data)
        return false;
    *into = ((const uint32_t *)(const void *)data)[offset / 4];
    return true;
}

/* LD and LDX: a word of the call, a constant, scratch memory, or the length of what is looked at. */
static bool load(const struct machine *m, const struct sock_filter *f, const struct seccomp_data *data, uint32_t *into)
{
    switch (BPF_MODE(f->code)) {
    case BPF_ABS:
        return load_word(data, f->k, into);
    case BPF_IMM:
        *into = f->k;
        return true;
    case BPF_MEM:
        *into = f->k < BPF_MEMWORDS ? m->memory[f->k] : 0;
        return f->k < BPF_MEMWORDS;
    case BPF_LEN:
        *into = sizeof *data;
        return true;
    default:
        return false;
    }
}

static bool compute(struct machine *m, const struct sock_filter *f)
{
    uint32_t by = BPF_SRC(f->code) == BPF_X ? m->x : f->k;
    switch (BPF_OP(f->code)) {
    case BPF_ADD: m->a += by; return true;
    case BPF_SUB: m->a -= by; return true;
    case BPF_MUL: m->a *= by; return true;
    case BPF_DIV: m->a = by ? m->a / by : 0; return by != 0;
    case BPF_AND: m->a &= by; return true;
    case BPF_OR: m->a |= by; return true;
    case BPF_XOR: m->a ^= by; return true;
    case BPF_LSH: m->a = by < 32 ? m->a << by : 0; return true;
    case BPF_RSH: m->a = by < 32 ? m->a >> by : 0; return true;
    case BPF_NEG: m->a = -m->a; return true;
    default: return false;
    }
}

/* How far to jump; -1 for a jump that does not exist. */
static int64_t jump(const struct machine *m, const struct sock_filter *f)
{
    uint32_t with = BPF_SRC(f->code) == BPF_X ? m->x : f->k;
    switch (BPF_OP(f->code)) {
    case BPF_JA: return f->k;
    case BPF_JEQ: return m->a == with ? f->jt : f->jf;
    case BPF_JGT: return m->a > with ? f->jt : f->jf;
    case BPF_JGE: return m->a >= with ? f->jt : f->jf;
    case BPF_JSET: return m->a & with ? f->jt : f->jf;
    default: return -1;
    }
}

/* The filter's answer for a call. What the kernel would not have let in is answered with the worst there is. */
static uint32_t run_filter(const struct sock_fprog *program, const struct seccomp_data *data)
{
    struct machine m = {0};
    for (int64_t at = 0; at < program->len; at++) {
        const struct sock_filter *f = &program->filter[at];
        bool good = true;
        int64_t distance = 0;
        switch (BPF_CLASS(f->code)) {
        case BPF_LD: good = load(&m, f, data, &m.a); break;
        case BPF_LDX: good = load(&m, f, data, &m.x); break;
        case BPF_ST:
        case BPF_STX:
            good = f->k < BPF_MEMWORDS;
            if (good)
                m.memory[f->k] = BPF_CLASS(f->code) == BPF_ST ? m.a : m.x;
            break;
        case BPF_ALU: good = compute(&m, f); break;
        case BPF_JMP: distance = jump(&m, f); break;
        case BPF_RET: return BPF_RVAL(f->code) == BPF_A ? m.a : f->k;
        case BPF_MISC:
            if (BPF_MISCOP(f->code) == BPF_TAX)
                m.x = m.a;
            else
                m.a = m.x;
            break;
        }
        if (!good || distance < 0)
            break;
        at += distance;
    }
    return SECCOMP_RET_KILL_PROCESS;
}

static bool answer_will_do(uint32_t answer, bool needed)
{
    switch (answer & SECCOMP_RET_ACTION_FULL) {
    case SECCOMP_RET_ALLOW:
    case SECCOMP_RET_LOG:
        return true;
    case SECCOMP_RET_ERRNO:
    case SECCOMP_RET_TRACE:      /* without a tracer an error */
    case SECCOMP_RET_USER_NOTIF: /* a supervisor's choice, and it never saw us before */
        return !needed;
    default:
        return false;
    }
}

static bool filter_lets_us_live(const struct sock_fprog *program)
{
    for (size_t i = 0; i < sizeof our_calls / sizeof *our_calls; i++) {
        struct seccomp_data data = {.nr = our_calls[i].number, .arch = AUDIT_ARCH_X86_64,
                                    .instruction_pointer = (uintptr_t)&filter_lets_us_live};
        __builtin_memcpy(data.args, our_calls[i].arguments, sizeof data.args);
        if (!answer_will_do(run_filter(program, &data), our_calls[i].needed))
            return false;
    }
    return true;
}

/* ---- where filters are installed ---- */

/* mode: SECCOMP_MODE_STRICT (read, write and exit only) or SECCOMP_MODE_FILTER. Callers try with NULL what the kernel knows. */
static void confining(unsigned long mode, const struct sock_fprog *program)
{
    if (mode == SECCOMP_MODE_STRICT || (mode == SECCOMP_MODE_FILTER && program && program->filter && !filter_lets_us_live(program)))
        image_confine();
}

HL_EXPORT int prctl(int option, ...)
{
    va_list more;
    va_start(more, option);
    unsigned long a = va_arg(more, unsigned long), b = va_arg(more, unsigned long);
    unsigned long c = va_arg(more, unsigned long), d = va_arg(more, unsigned long); /* may mean nothing; passed on all the same */
    va_end(more);
    if (unlikely(option == PR_SET_SECCOMP_))
        confining(a, (const struct sock_fprog *)b);
    return REAL(prctl)(option, a, b, c, d);
}

/* libc's syscall(), once it is known: nearly all calls jump straight to it. */
HL_HIDDEN long (*confine_real_syscall)(long, ...);

/* Of seccomp(2) here: its operation and its argument. Gives where to jump to. */
__attribute__((used)) static void *confine_before_syscall(long number, unsigned long operation, unsigned long flags,
                                                          const struct sock_fprog *program)
{
    (void)flags;
    if (number == SYS_seccomp && operation <= SECCOMP_SET_MODE_FILTER)
        confining(operation == SECCOMP_SET_MODE_STRICT ? SECCOMP_MODE_STRICT : SECCOMP_MODE_FILTER, program);
    confine_real_syscall = REAL(syscall);
    return (void *)confine_real_syscall;
}

__asm__(".text\n"
        ".globl syscall\n"
        ".type syscall, @function\nsyscall:\n"
        ".cfi_startproc\n"
        "endbr64\n"
        "cmpq $317, %rdi\n" /* SYS_seccomp */
        "je 1f\n"
        "movq confine_real_syscall(%rip), %rax\n"
        "testq %rax, %rax\n"
        "je 1f\n"
        "jmp *%rax\n"
        "1:\n"
        "pushq %rdi\n.cfi_adjust_cfa_offset 8\n"
        "pushq %rsi\n.cfi_adjust_cfa_offset 8\n"
        "pushq %rdx\n.cfi_adjust_cfa_offset 8\n"
        "pushq %rcx\n.cfi_adjust_cfa_offset 8\n"
        "pushq %r8\n.cfi_adjust_cfa_offset 8\n"
        "pushq %r9\n.cfi_adjust_cfa_offset 8\n"
        "subq $8, %rsp\n.cfi_adjust_cfa_offset 8\n"
        "call confine_before_syscall\n"
        "addq $8, %rsp\n.cfi_adjust_cfa_offset -8\n"
        "popq %r9\n.cfi_adjust_cfa_offset -8\n"
        "popq %r8\n.cfi_adjust_cfa_offset -8\n"
        "popq %rcx\n.cfi_adjust_cfa_offset -8\n"
        "popq %rdx\n.cfi_adjust_cfa_offset -8\n"
        "popq %rsi\n.cfi_adjust_cfa_offset -8\n"
        "popq %rdi\n.cfi_adjust_cfa_offset -8\n"
        "jmp *%rax\n"
        ".cfi_endproc\n"
        ".size syscall, .-syscall\n");
