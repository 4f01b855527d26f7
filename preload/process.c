/* process.c: fork, exec, _exit. (exit and quick_exit come by the handlers that image.c registers; vfork, posix_spawn and
 * raw clones are recognised by image.c when they run hooks.) */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <unistd.h>

#include "hooks.h"
#include "image.h"
#include "modules.h"

HL_EXPORT pid_t fork(void)
{
    image_fork_before();
    pid_t child = REAL(fork)();
    if (child == 0)
        image_fork_child();
    else
        image_fork_parent(child);
    return child;
}

HL_EXPORT void _exit(int status)
{
    image_hold(1, status);
    REAL(_exit)(status);
    __builtin_unreachable();
}

HL_EXPORT void _Exit(int status)
{
    image_hold(1, status);
    REAL(_exit)(status);
    __builtin_unreachable();
}

/* ---- exec ---- */

static bool starts_with(const char *text, const char *prefix)
{
    while (*prefix && *text == *prefix)
        text++, prefix++;
    return !*prefix;
}

static bool environment_keeps_shim(char *const *environment)
{
    for (; environment && *environment; environment++)
        if (starts_with(*environment, "LD_PRELOAD=") && host_contains(*environment, "libheapledger"))
            return true;
    return false;
}

static bool can_run(int folder, const char *path)
{
    return host_call3(SYS_faccessat, folder, path, X_OK) == 0;
}

/* Whether execvp would find `file` in PATH. `path` (of `room` bytes) receives where. */
static bool found_in_path(const char *file, char *path, size_t room)
{
    const char *folders = getenv("PATH");
    folders = folders ? folders : "/bin:/usr/bin";
    while (true) {
        size_t n = 0;
        while (*folders && *folders != ':' && n + 2 < room)
            path[n++] = *folders++;
        if (n)
            path[n++] = '/';
        for (const char *c = file; *c && n + 1 < room; c++)
            path[n++] = *c;
        path[n] = 0;
        if (can_run(AT_FDCWD, path))
            return true;
        while (*folders && *folders != ':')
            folders++;
        if (!*folders++)
            return false;
    }
}

/*
 * An exec is about to be tried: records it and holds, if it has a chance. True: image_resume must be called should it
 * fail. In a vfork child only the remark is made: the image there is the parent's.
 */
static bool exec_begin(int folder, const char *path, char *const *environment)
{
    if (hl_image->mode != HL_MODE_ON || !path || !can_run(folder, path))
        return false;
    if (!environment_keeps_shim(environment))
        modules_log_remark("child was started without the shim: ", path);
    if (image_is_borrowed())
        return false;
    image_hold(3, 0);
    return true;
}

static bool exec_begin_search(const char *file, char *const *environment)
{
    char path[4096];
    if (hl_image->mode != HL_MODE_ON || !file)
        return false;
    if (host_contains(file, "/"))
        return exec_begin(AT_FDCWD, file, environment);
    return found_in_path(file, path, sizeof path) && exec_begin(AT_FDCWD, path, environment);
}

/* The real exec came back: it failed, and the program goes on. errno is the real call's. */
static int exec_failed(bool begun, int result)
{
    if (begun)
        image_resume();
    return result;
}

HL_EXPORT int execve(const char *path, char *const *argv, char *const *environment)
{
    bool begun = exec_begin(AT_FDCWD, path, environment);
    return exec_failed(begun, REAL(execve)(path, argv, environment));
}

HL_EXPORT int execv(const char *path, char *const *argv)
{
    bool begun = exec_begin(AT_FDCWD, path, host_environment());
    return exec_failed(begun, REAL(execv)(path, argv));
}

HL_EXPORT int execvp(const char *file, char *const *argv)
{
    bool begun = exec_begin_search(file, host_environment());
    return exec_failed(begun, REAL(execvp)(file, argv));
}

HL_EXPORT int execvpe(const char *file, char *const *argv, char *const *environment)
{
    bool begun = exec_begin_search(file, environment);
    return exec_failed(begun, REAL(execvpe)(file, argv, environment));
}

HL_EXPORT int fexecve(int fd, char *const *argv, char *const *environment)
{
    char path[32] = "/proc/self/fd/";
    size_t n = 14;
    char digits[12];
    int count = 0;
    unsigned value = fd < 0 ? 0 : (unsigned)fd;
    do
        digits[count++] = (char)('0' + value % 10);
    while (value /= 10);
    while (count)
        path[n++] = digits[--count];
    path[n] = 0;
    bool begun = fd >= 0 && exec_begin(AT_FDCWD, path, environment);
    return exec_failed(begun, REAL(fexecve)(fd, argv, environment));
}

HL_EXPORT int execveat(int folder, const char *path, char *const *argv, char *const *environment, int flags)
{
    bool begun = (flags & AT_EMPTY_PATH) ? false : exec_begin(folder, path, environment);
    if (!hl_real.execveat && !REAL(execve)) /* before glibc 2.34 nobody could have called it */
        return -1;
    return exec_failed(begun, REAL(execveat)(folder, path, argv, environment, flags));
}

/* The arguments of an execl as an array on the caller's stack: libc does the same. */
#define COLLECT_ARGUMENTS(first, list)                                                                                 \
    va_list list;                                                                                                      \
    size_t count = 1;                                                                                                  \
    va_start(list, first);                                                                                             \
    while (va_arg(list, const char *))                                                                                 \
        count++;                                                                                                       \
    va_end(list);                                                                                                      \
    char *argv[count + 1];                                                                                             \
    va_start(list, first);                                                                                             \
    argv[0] = (char *)(uintptr_t)first;                                                                                \
    for (size_t i = 1; i <= count; i++)                                                                                \
        argv[i] = va_arg(list, char *)

HL_EXPORT int execl(const char *path, const char *first, ...)
{
    COLLECT_ARGUMENTS(first, list);
    va_end(list);
    return execv(path, argv);
}

HL_EXPORT int execlp(const char *file, const char *first, ...)
{
    COLLECT_ARGUMENTS(first, list);
    va_end(list);
    return execvp(file, argv);
}

HL_EXPORT int execle(const char *path, const char *first, ...)
{
    COLLECT_ARGUMENTS(first, list);
    char *const *environment = va_arg(list, char *const *);
    va_end(list);
    return execve(path, argv, environment);
}
