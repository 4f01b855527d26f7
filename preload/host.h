/*
 * host.h: all that the shim asks of the operating system and of libc.
 *
 * System calls are made directly (no libc wrapper: those may be interposed, by us too, and they write errno). Nothing
 * here allocates from the program, touches errno or keeps a file descriptor. A failed call returns -errno.
 */
#ifndef HEAPLEDGER_HOST_H
#define HEAPLEDGER_HOST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>

#include "spool.h"

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)
#define HL_HIDDEN __attribute__((visibility("hidden")))

/* A system call with up to six arguments. Returns the kernel's value: -errno when it failed. */
static inline long host_call(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

#define host_call0(n) host_call(n, 0, 0, 0, 0, 0, 0)
#define host_call1(n, a) host_call(n, (long)(a), 0, 0, 0, 0, 0)
#define host_call2(n, a, b) host_call(n, (long)(a), (long)(b), 0, 0, 0, 0)
#define host_call3(n, a, b, c) host_call(n, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define host_call4(n, a, b, c, d) host_call(n, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)

/*
 * True once the program has forbidden itself, on pain of death, some of the calls that we can do without (confine.c): then they are not
 * made any more. Inherited by fork.
 */
extern HL_HIDDEN bool host_frugal;

/*
 * Memory of our own: zeroed, private, page aligned, at a far address (inside control.self_low .. self_high) where it
 * does not disturb where the kernel places the program's mappings. NULL when there is none. Never given back.
 * Copied by fork like any memory. Async-signal-safe, any thread.
 */
void *host_map_private(size_t bytes);

/* The same, but a fork child (also of a raw clone) finds it zeroed. NULL where the kernel cannot promise that. */
void *host_map_wiped(size_t bytes);

/* Maps `bytes` of an open file shared and writable, at a far address. NULL on failure. */
void *host_map_file(int fd, size_t bytes);

/* Gives back what host_map_* returned. */
void host_unmap(void *start, size_t bytes);

/* Puts zeroed private memory where host_map_file had mapped a file. */
void host_blank(void *start, size_t bytes);

/* The ends of the far range all of the above comes from. */
void host_far_range(uint64_t *low, uint64_t *high);

/* CLOCK_MONOTONIC in ns, through the kernel (slow paths only). */
uint64_t host_now_ns(void);

/* Sleeps up to `ns`; may return early. */
void host_sleep_ns(uint64_t ns);

int host_pid(void);
int host_tid(void);

static inline uint64_t host_tsc(void)
{
    uint32_t low, high;
    __asm__ volatile("rdtsc" : "=a"(low), "=d"(high));
    return (uint64_t)high << 32 | low;
}

/* Blocks every signal of this thread, so that nothing re-enters a slow path; the mask before goes to *saved. */
void host_signals_block(uint64_t *saved);
void host_signals_restore(const uint64_t *saved);

/*
 * One line, straight to file descriptor 2, if that is the file that it was at host_note_stderr: else it might become part of the
 * program's data.
 */
void host_complain(const char *text);
void host_note_stderr(void);

/*
 * The definition of `name` that the dynamic linker would have used had the shim not been there: default version, first
 * object after ours in load order, or any other object if there is none behind. NULL when nobody defines it. Does not use dlsym
 * (which allocates, and lives in another library before glibc 2.34). Slow; takes the loader's list lock.
 */
void *host_symbol(const char *name);

/*
 * The first of `names` that one of the first `objects` of the loader's list defines, ours apart; NULL if none does. And how many there
 * are now: of those that were there at the start every symbol is in the global scope.
 */
const char *host_first_defined(const char *const *names, size_t count, uint32_t objects);
uint32_t host_object_count(void);

/* The path of the object that holds `address`, as the loader names it; "" for the main program, NULL if none does. */
const char *host_object_path(const void *address);

bool host_contains(const char *text, const char *part);

/* The environment as it is now, ended by NULL; NULL before libc knows it. Not a copy. */
char **host_environment(void);

/* ---- what stack.c uses from the rest of the shim ---- */

/* The control page of this process image; NULL before the image was made and when nothing is recorded. */
extern HL_HIDDEN struct hl_control *hl_control_page;

/*
 * The k-th segment of the node table, HL_SEGMENT_NODES nodes, mapped (its file stacks.K is made when needed). NULL when
 * impossible (then it stays impossible). Any thread, also in a signal handler.
 */
struct hl_node *spool_stack_segment(uint32_t k);

/*
 * The number of the module that holds `ip`, or -1. Lock-free where it is known already; an unknown one is looked up
 * (_dl_find_object; on glibc before 2.35 only after a dlopen) and written to the log.
 */
int modules_find(uintptr_t ip);

/* Compares the whole list of modules with what the log says and writes what changed. Takes the loader's list lock. */
void modules_refresh(void);

#endif
