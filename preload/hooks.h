/* hooks.h: the table of interposed functions and the real ones behind them. */
#ifndef HEAPLEDGER_HOOKS_H
#define HEAPLEDGER_HOOKS_H

#include <pthread.h>
#include <spawn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/types.h>
#include <threads.h>

#include "host.h"
#include "record.h"
#include "stack.h"

struct termios;
struct winsize;

#define HL_EXPORT __attribute__((visibility("default"), noinline))

/* X(result, name, parameters): one line for each function of the shim that stands in for one of libc. */
#define HL_HOOKS(X)                                                                                                    \
    X(void *, malloc, (size_t))                                                                                        \
    X(void *, calloc, (size_t, size_t))                                                                                \
    X(void *, realloc, (void *, size_t))                                                                               \
    X(void, free, (void *))                                                                                            \
    X(int, posix_memalign, (void **, size_t, size_t))                                                                  \
    X(void *, memalign, (size_t, size_t))                                                                              \
    X(void *, aligned_alloc, (size_t, size_t))                                                                         \
    X(void *, valloc, (size_t))                                                                                        \
    X(void *, pvalloc, (size_t))                                                                                       \
    X(int, malloc_trim, (size_t))                                                                                      \
    X(int, mallopt, (int, int))                                                                                        \
    X(void *, mmap, (void *, size_t, int, int, int, off_t))                                                            \
    X(int, munmap, (void *, size_t))                                                                                   \
    X(void *, mremap, (void *, size_t, size_t, int, void *))                                                           \
    X(int, mprotect, (void *, size_t, int))                                                                            \
    X(int, madvise, (void *, size_t, int))                                                                             \
    X(int, brk, (void *))                                                                                              \
    X(void *, sbrk, (intptr_t))                                                                                        \
    X(int, pthread_create, (pthread_t *, const pthread_attr_t *, void *(*)(void *), void *))                           \
    X(int, pthread_setname_np, (pthread_t, const char *))                                                              \
    X(int, thrd_create, (thrd_t *, thrd_start_t, void *))                                                              \
    X(pid_t, fork, (void))                                                                                             \
    X(pid_t, _Fork, (void))                                                                                            \
    X(int, forkpty, (int *, char *, const struct termios *, const struct winsize *))                                   \
    X(int, clone, (int (*)(void *), void *, int, void *, ...))                                                         \
    X(int, posix_spawn, (pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *,         \
                         char *const *, char *const *))                                                                \
    X(int, posix_spawnp, (pid_t *, const char *, const posix_spawn_file_actions_t *, const posix_spawnattr_t *,        \
                          char *const *, char *const *))                                                               \
    X(int, system, (const char *))                                                                                     \
    X(FILE *, popen, (const char *, const char *))                                                                     \
    X(void *, dlopen, (const char *, int))                                                                             \
    X(void *, dlmopen, (long, const char *, int))                                                                      \
    X(int, dlclose, (void *))                                                                                          \
    X(void, _exit, (int))                                                                                              \
    X(void, _Exit, (int))                                                                                              \
    X(int, execve, (const char *, char *const *, char *const *))                                                       \
    X(int, execv, (const char *, char *const *))                                                                       \
    X(int, execvp, (const char *, char *const *))                                                                      \
    X(int, execvpe, (const char *, char *const *, char *const *))                                                      \
    X(int, fexecve, (int, char *const *, char *const *))                                                               \
    X(int, execveat, (int, const char *, char *const *, char *const *, int))                                           \
    X(int, chroot, (const char *))                                                                                     \
    X(int, setuid, (uid_t))                                                                                            \
    X(int, seteuid, (uid_t))                                                                                           \
    X(int, setfsuid, (uid_t))                                                                                          \
    X(int, setreuid, (uid_t, uid_t))                                                                                   \
    X(int, setresuid, (uid_t, uid_t, uid_t))                                                                           \
    X(int, prctl, (int, ...))                                                                                          \
    X(long, syscall, (long, ...))

struct hl_real {
#define X(result, name, parameters) result (*name) parameters;
    HL_HOOKS(X)
#undef X
};

/* The definitions behind ours; NULL where this libc has none. Filled by hooks_resolve. */
extern HL_HIDDEN struct hl_real hl_real;

/* True when a block has glibc's header word before it (another malloc behind us may not have one). */
extern HL_HIDDEN bool hl_words;

/* Fills hl_real. Idempotent, any thread; slow, takes the loader's list lock. */
void hooks_resolve(void);

/* The real function; looks it up at the very first call of the process. */
#define REAL(name) (likely(hl_real.name != NULL) ? hl_real.name : (hooks_resolve(), hl_real.name))

/* Where a hook was called from: the three registers that stack_capture starts at. Only in a function of hooks. */
#define CALLER_IP ((uintptr_t)__builtin_return_address(0))
#define CALLER_SP ((uintptr_t)__builtin_frame_address(0) + 16)
#define CALLER_BP (*(const uintptr_t *)__builtin_frame_address(0))
#define CALLER_STACK stack_capture(CALLER_IP, CALLER_SP, CALLER_BP)

#endif
