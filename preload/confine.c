/*
 * confine.c: a program that confines itself with seccomp, or puts the spool out of its own reach.
 *
 * A filter that answers one of our own system calls with a signal would kill the program for something it never did. So each
 * filter is asked before it is installed: it is a short program of classic BPF, which is run here for every system call that
 * the shim makes. If the answer to one that only serves files is fatal, rings for new threads are made first, and then we do
 * without (host_frugal): this process is recorded on, its children are not. If it is one that cannot be missed, recording stops, and no
 * call of ours follows: not in this process, not in its children, not in what they exec. Answers that are an error are no
 * trouble, except where waiting and telling the time depend on them. Filters installed by a bare `syscall` instruction are not
 * seen.
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

enum need {
    NEEDED,    /* an error would not do */
    DONE,      /* whatever it answers, as long as nobody dies of it */
    FOR_FILES, /* can be done without (host_frugal) */
};

static const struct {
    int number;
    enum need need;
    uint64_t arguments[6];
} our_calls[] = {
    {SYS_clock_gettime, NEEDED, {1, SOME}},
    {SYS_futex, NEEDED, {SOME, FUTEX_WAIT, 0, SOME}},
    {SYS_futex, NEEDED, {SOME, FUTEX_WAIT_PRIVATE, 0, SOME}},
    {SYS_futex, NEEDED, {SOME, FUTEX_WAKE, 1}},
    {SYS_getpid, NEEDED, {0}},
    {SYS_gettid, NEEDED, {0}},
    {SYS_rt_sigprocmask, NEEDED, {2, SOME, 0, 8}},
    {SYS_mmap, DONE, {SOME, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | FIXED_NOREPLACE, ~0ull}},
    {SYS_munmap, DONE, {SOME, 4096}},
    {SYS_write, DONE, {2, SOME, 64}},
    {SYS_getppid, FOR_FILES, {0}},
    {SYS_sched_yield, FOR_FILES, {0}},
    {SYS_sigaltstack, FOR_FILES, {0, SOME}},
    {SYS_tgkill, FOR_FILES, {1, 1, 0}},
    {SYS_prctl, FOR_FILES, {PR_GET_NAME_, SOME}},
    {SYS_prctl, FOR_FILES, {PR_GET_NO_NEW_PRIVS_}},
    {SYS_prlimit64, FOR_FILES, {0, RLIMIT_FSIZE, 0, SOME}},
    {SYS_mmap, FOR_FILES, {SOME, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | FIXED_NOREPLACE, 3}},
    {SYS_madvise, FOR_FILES, {SOME, 4096, WIPE_ON_FORK}},
    {SYS_openat, FOR_FILES, {(uint64_t)AT_FDCWD, SOME, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600}},
    {SYS_openat, FOR_FILES, {(uint64_t)AT_FDCWD, SOME, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600}},
    {SYS_openat, FOR_FILES, {(uint64_t)AT_FDCWD, SOME, O_RDONLY | O_CLOEXEC | O_NONBLOCK}},
    {SYS_openat, FOR_FILES, {(uint64_t)AT_FDCWD, SOME, O_RDONLY | O_CLOEXEC}},
    {SYS_read, FOR_FILES, {3, SOME, 4096}},
    {SYS_write, FOR_FILES, {3, SOME, 64}},
    {SYS_pread64, FOR_FILES, {3, SOME, 256}},
    {SYS_pwrite64, FOR_FILES, {3, SOME, 4096}},
    {SYS_fallocate, FOR_FILES, {3, 0, 0, 4096}},
    {SYS_fstat, FOR_FILES, {3, SOME}},
    {SYS_close, FOR_FILES, {3}},
    {SYS_mkdirat, FOR_FILES, {(uint64_t)AT_FDCWD, SOME, 0700}},
    {SYS_renameat, FOR_FILES, {(uint64_t)AT_FDCWD, SOME, (uint64_t)AT_FDCWD, SOME}},
    {SYS_unlinkat, FOR_FILES, {(uint64_t)AT_FDCWD, SOME}},
    {SYS_readlinkat, FOR_FILES, {(uint64_t)AT_FDCWD, SOME, SOME, 4096}},
    {SYS_faccessat, FOR_FILES, {(uint64_t)AT_FDCWD, SOME, 1}},
    {SYS_geteuid, FOR_FILES, {0}},
    {SYS_getuid, FOR_FILES, {0}},
    {SYS_getgid, FOR_FILES, {0}},
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

static bool is_error(uint32_t answer)
{
    switch (answer & SECCOMP_RET_ACTION_FULL) {
    case SECCOMP_RET_ERRNO:
    case SECCOMP_RET_TRACE:      /* without a tracer an error */
    case SECCOMP_RET_USER_NOTIF: /* a supervisor's choice, and it never saw us before */
        return true;
    default:
        return false;
    }
}

static bool is_allowed(uint32_t answer)
{
    uint32_t action = answer & SECCOMP_RET_ACTION_FULL;
    return action == SECCOMP_RET_ALLOW || action == SECCOMP_RET_LOG;
}

/* What a filter means to us, from good to bad. */
enum verdict { HARMLESS, FILES_FAIL, FILES_KILL, ALL_KILLS };

static enum verdict judge(const struct sock_fprog *program)
{
    enum verdict verdict = HARMLESS;
    for (size_t i = 0; i < sizeof our_calls / sizeof *our_calls; i++) {
        struct seccomp_data data = {.nr = our_calls[i].number, .arch = AUDIT_ARCH_X86_64,
                                    .instruction_pointer = (uintptr_t)&is_allowed};
        __builtin_memcpy(data.args, our_calls[i].arguments, sizeof data.args);
        uint32_t answer = run_filter(program, &data);
        enum verdict of_this = is_allowed(answer)                                      ? HARMLESS
                               : our_calls[i].need == FOR_FILES && is_error(answer)    ? FILES_FAIL
                               : our_calls[i].need == FOR_FILES                        ? FILES_KILL
                               : our_calls[i].need == DONE && is_error(answer)         ? HARMLESS
                                                                                       : ALL_KILLS;
        verdict = of_this > verdict ? of_this : verdict;
    }
    return verdict;
}

/* ---- where filters are installed ---- */

/* mode: SECCOMP_MODE_STRICT (read, write and exit only) or SECCOMP_MODE_FILTER. Callers try with NULL what the kernel knows. */
static void confining(unsigned long mode, const struct sock_fprog *program)
{
    bool filters = mode == SECCOMP_MODE_FILTER && program && program->filter;
    enum verdict verdict = mode == SECCOMP_MODE_STRICT ? ALL_KILLS : filters ? judge(program) : HARMLESS;
    if (verdict == ALL_KILLS)
        image_confine();
    else if (verdict == FILES_KILL)
        image_forbid_files();
    else if (verdict == FILES_FAIL)
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
    if (user != (uid_t)-1 && !host_frugal && user != (uid_t)host_call0(SYS_geteuid))
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

/* seccomp(2). libseccomp asks with flags or arguments that cannot be what the kernel knows: nothing is installed then. */
static void confining_by_syscall(unsigned long operation, unsigned long flags, const struct sock_fprog *program)
{
    if (operation == SECCOMP_SET_MODE_STRICT && !flags && !program)
        confining(SECCOMP_MODE_STRICT, NULL);
    else if (operation == SECCOMP_SET_MODE_FILTER)
        confining(SECCOMP_MODE_FILTER, program);
}

/* Looks at one of the calls below, of which these are the first arguments. Gives where to jump to. */
__attribute__((used)) static void *confine_before_syscall(long number, unsigned long first, unsigned long second, unsigned long third)
{
    if (number == SYS_seccomp)
        confining_by_syscall(first, second, (const struct sock_fprog *)third);
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
