/*
 * confine.c: a program that confines itself with seccomp, or puts the spool out of its own reach.
 *
 * A filter that answers one of our own system calls with a signal would kill the program for something it never did. So each
 * filter is asked before it is installed: it is a short program of classic BPF, which is run here for every system call that
 * the shim makes. If the answer to any of them is fatal, recording stops first, and no call of ours follows: not in this
 * process, not in its children, not in what they exec. Answers that are an error are no trouble, except where waiting and
 * telling the time depend on them. Filters installed by a bare `syscall` instruction are not seen.
 *
 * Who becomes another user, changes its root or forbids itself files cannot make a ring for a new thread any more: some are made
 * before (image_leave).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/futex.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/resource.h>

#include "hooks.h"
#include "image.h"

#define PR_SET_NAME_ 15
#define PR_GET_NAME_ 16
#define PR_SET_SECCOMP_ 22
#define PR_GET_NO_NEW_PRIVS_ 39
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
    {SYS_openat, false, {(uint64_t)AT_FDCWD, SOME, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600}},
    {SYS_openat, false, {(uint64_t)AT_FDCWD, SOME, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600}},
    {SYS_openat, false, {(uint64_t)AT_FDCWD, SOME, O_RDONLY | O_CLOEXEC}},
    {SYS_read, false, {3, SOME, 4096}},
    {SYS_write, false, {3, SOME, 64}},
    {SYS_pwrite64, false, {3, SOME, 4096}},
    {SYS_fallocate, false, {3, 0, 0, 4096}},
    {SYS_close, false, {3}},
    {SYS_mkdirat, false, {(uint64_t)AT_FDCWD, SOME, 0700}},
    {SYS_renameat, false, {(uint64_t)AT_FDCWD, SOME, (uint64_t)AT_FDCWD, SOME}},
    {SYS_unlinkat, false, {(uint64_t)AT_FDCWD, SOME}},
    {SYS_readlinkat, false, {(uint64_t)AT_FDCWD, SOME, SOME, 4096}},
    {SYS_faccessat, false, {(uint64_t)AT_FDCWD, SOME, 1}},
    {SYS_openat, false, {(uint64_t)AT_FDCWD, SOME, O_RDONLY | O_CLOEXEC | O_NONBLOCK}},
    {SYS_pread64, false, {3, SOME, 256}},
    {SYS_fstat, false, {3, SOME}},
    {SYS_geteuid, false, {0}},
    {SYS_getuid, false, {0}},
    {SYS_getgid, false, {0}},
    {SYS_prctl, false, {PR_GET_NO_NEW_PRIVS_}},
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

static uint32_t filter_answer(const struct sock_fprog *program, int number, const uint64_t arguments[6])
{
    struct seccomp_data data = {.nr = number, .arch = AUDIT_ARCH_X86_64, .instruction_pointer = (uintptr_t)&filter_answer};
    __builtin_memcpy(data.args, arguments, sizeof data.args);
    return run_filter(program, &data);
}

static bool filter_lets_us_live(const struct sock_fprog *program)
{
    for (size_t i = 0; i < sizeof our_calls / sizeof *our_calls; i++)
        if (!answer_will_do(filter_answer(program, our_calls[i].number, our_calls[i].arguments), our_calls[i].needed))
            return false;
    return true;
}

/* Whether the filter refuses what making a new file takes. */
static bool filter_forbids_files(const struct sock_fprog *program)
{
    for (size_t i = 0; i < sizeof our_calls / sizeof *our_calls; i++) {
        int number = our_calls[i].number;
        if ((number == SYS_openat || number == SYS_fallocate || number == SYS_mmap) &&
            (filter_answer(program, number, our_calls[i].arguments) & SECCOMP_RET_ACTION_FULL) == SECCOMP_RET_ERRNO)
            return true;
    }
    return false;
}

/* ---- where filters are installed ---- */

/* mode: SECCOMP_MODE_STRICT (read, write and exit only) or SECCOMP_MODE_FILTER. Callers try with NULL what the kernel knows. */
static void confining(unsigned long mode, const struct sock_fprog *program)
{
    bool filters = mode == SECCOMP_MODE_FILTER && program && program->filter;
    if (mode == SECCOMP_MODE_STRICT || (filters && !filter_lets_us_live(program)))
        image_confine();
    else if (filters && filter_forbids_files(program))
        image_leave();
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
    int result = REAL(prctl)(option, a, b, c, d);
    if (option == PR_SET_NAME_ && result == 0 && !image_is_borrowed())
        record_thread_name((uintptr_t)__builtin_thread_pointer(), (const char *)a);
    return result;
}

/* ---- another user, another root: the spool is this user's, and lies under this root */

HL_EXPORT int chroot(const char *path)
{
    image_leave();
    return REAL(chroot)(path);
}

/* `user` will be the effective user, by which files are opened. All ones: it stays. */
static void becoming(uid_t user)
{
    if (user != (uid_t)-1 && user != (uid_t)host_call0(SYS_geteuid))
        image_leave();
}

HL_EXPORT int setuid(uid_t user)
{
    becoming(user);
    return REAL(setuid)(user);
}

HL_EXPORT int seteuid(uid_t user)
{
    becoming(user);
    return REAL(seteuid)(user);
}

HL_EXPORT int setfsuid(uid_t user)
{
    becoming(user);
    return REAL(setfsuid)(user);
}

HL_EXPORT int setreuid(uid_t real, uid_t effective)
{
    becoming(effective);
    return REAL(setreuid)(real, effective);
}

HL_EXPORT int setresuid(uid_t real, uid_t effective, uid_t saved)
{
    becoming(effective);
    return REAL(setresuid)(real, effective, saved);
}

/* ---- system calls by their numbers */

/* libc's syscall(), once it is known: nearly all calls jump straight to it. */
HL_HIDDEN long (*confine_real_syscall)(long, ...);

/* Whether such a call makes a child with a copy of our memory, which goes on where its parent does. */
static bool is_fork(long number, unsigned long first, unsigned long second)
{
    const struct clone_args *more = (const struct clone_args *)first;
    if (number == SYS_fork)
        return true;
    if (number == SYS_clone)
        return !(first & CLONE_VM) && !second;
    return number == SYS_clone3 && more && second >= offsetof(struct clone_args, tls) && !(more->flags & CLONE_VM) && !more->stack;
}

static long fork_by_syscall(long number, long a, long b, long c, long d, long e, long f)
{
    image_fork_before();
    long child = confine_real_syscall(number, a, b, c, d, e, f);
    if (child == 0)
        image_fork_child();
    else
        image_fork_parent((pid_t)child);
    return child;
}

/* Looks at one of the calls below, of which these are the first arguments. Gives where to jump to. */
__attribute__((used)) static void *confine_before_syscall(long number, unsigned long first, unsigned long second, unsigned long third)
{
    if (number == SYS_seccomp && first <= SECCOMP_SET_MODE_FILTER)
        confining(first == SECCOMP_SET_MODE_STRICT ? SECCOMP_MODE_STRICT : SECCOMP_MODE_FILTER, (const struct sock_fprog *)third);
    else if (number == SYS_setuid || number == SYS_setfsuid)
        becoming((uid_t)first);
    else if (number == SYS_setreuid || number == SYS_setresuid)
        becoming((uid_t)second);
    else if (number == SYS_chroot || number == SYS_pivot_root)
        image_leave();
    confine_real_syscall = REAL(syscall);
    return is_fork(number, first, second) ? (void *)fork_by_syscall : (void *)confine_real_syscall;
}

#define BIT(nr) [(nr) / 8] = 1 << (nr) % 8
#define CALLS 448

/* The numbers to look at: two with the same byte are one entry. */
__attribute__((used)) HL_HIDDEN const uint8_t confine_looked_at[CALLS / 8] = {
    BIT(SYS_clone) | 1 << SYS_fork % 8, /* 56, 57 */
    BIT(SYS_setuid),                    /* 105 */
    [SYS_setreuid / 8] = 1 << SYS_setreuid % 8 | 1 << SYS_setresuid % 8, /* 113, 117 */
    BIT(SYS_setfsuid),                  /* 122 */
    BIT(SYS_pivot_root),                /* 155 */
    BIT(SYS_chroot),                    /* 161 */
    BIT(SYS_seccomp),                   /* 317 */
    BIT(SYS_clone3),                    /* 435 */
};
_Static_assert(SYS_clone / 8 == SYS_fork / 8 && SYS_setreuid / 8 == SYS_setresuid / 8 && SYS_clone3 < CALLS, "one byte each");

__asm__(".text\n"
        ".globl syscall\n"
        ".type syscall, @function\nsyscall:\n"
        ".cfi_startproc\n"
        "endbr64\n"
        "cmpq $448, %rdi\n" /* CALLS */
        "jae 2f\n"
        "movq %rdi, %rax\n"
        "shrq $3, %rax\n"
        "leaq confine_looked_at(%rip), %r11\n"
        "movzbl (%r11, %rax), %eax\n"
        "movl %edi, %r11d\n"
        "andl $7, %r11d\n"
        "btl %r11d, %eax\n"
        "jc 1f\n"
        "2:\n"
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
