/*
 * process.c: fork, exec, spawn, _exit. (exit and quick_exit come by the handlers that image.c registers; a vfork child is recognised
 * by image.c when it runs hooks; clones by system call pass through confine.c's syscall, or else show when they run hooks.)
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "hooks.h"
#include "image.h"
#include "modules.h"
#include "program.h"
#include "spool_files.h"

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

/* As fork, without libc's handlers and locks; async-signal-safe, as is all that is done here. */
HL_EXPORT pid_t _Fork(void)
{
    image_fork_before();
    pid_t child = REAL(_Fork) ? hl_real._Fork() : hl_real.fork(); /* a libc before 2.34 has none */
    if (child == 0)
        image_fork_child();
    else
        image_fork_parent(child);
    return child;
}

HL_EXPORT int forkpty(int *terminal, char *name, const struct termios *settings, const struct winsize *size)
{
    image_fork_before();
    int child = REAL(forkpty)(terminal, name, settings, size);
    if (child == 0)
        image_fork_child();
    else
        image_fork_parent(child);
    return child;
}

/* The child's routine; the copy of the parent's stack holds what it needs. */
struct cloned {
    int (*routine)(void *);
    void *argument;
};

static int clone_main(void *given)
{
    struct cloned c = *(struct cloned *)given;
    image_fork_child();
    int status = c.routine(c.argument);
    image_hold(1, status); /* where clone was called from libc ends the child itself */
    return status;
}

/* A child that shares our memory shares the image too; any other is a fork. */
HL_EXPORT int clone(int (*routine)(void *), void *stack, int flags, void *argument, ...)
{
    va_list more;
    va_start(more, argument);
    void *a = va_arg(more, void *), *b = va_arg(more, void *), *c = va_arg(more, void *); /* mean nothing unless the flags say so */
    va_end(more);
    struct cloned cloned = {routine, argument};
    if ((flags & CLONE_VM) || !routine || !stack)
        return REAL(clone)(routine, stack, flags, argument, a, b, c);
    image_fork_before();
    int child = REAL(clone)(clone_main, stack, flags, &cloned, a, b, c);
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

/* ---- starting a program ---- */

#define REMARKS 200 /* a server may start a bare program for each request */

static void remark(const char *why, const char *path)
{
    char text[128];
    uint32_t before = __atomic_fetch_add(&hl_image->remarks, 1, __ATOMIC_RELAXED);
    if (before > REMARKS)
        return;
    size_t n = text_put(text, sizeof text, "child was started without the shim");
    if (*why) {
        n += text_put(text + n, sizeof text - n, " (");
        n += text_put(text + n, sizeof text - n, why);
        n += text_put(text + n, sizeof text - n, ")");
    }
    text_put(text + n, sizeof text - n, ": ");
    if (before == REMARKS)
        modules_log_remark("more children were started without the shim", "");
    else
        modules_log_remark(text, path);
}

/* A program that is about to be started. */
struct start {
    bool possible; /* it is there, and may be run */
    bool held; /* by image_hold: image_resume must be called should the exec fail */
    char *const *environment; /* to start it with */
    struct program_environment clean;
};

/* Says what will not be seen of it, and keeps the shim from programs that cannot bear it. */
static struct start start_look(int folder, const char *path, char *const *environment)
{
    struct start s = {.environment = environment};
    bool inherits = program_environment_has_shim(environment);
    if (!hl_settings.enabled || !path || !can_run(folder, path))
        return s;
    s.possible = true;
    enum program_kind kind = inherits ? program_look(folder, path) : PROGRAM_TRACEABLE;
    if (kind == PROGRAM_TRACEABLE && inherits && program_environment_has_sanitizer(environment))
        kind = PROGRAM_SANITIZED;
    if (kind == PROGRAM_TRACEABLE && inherits && hl_settings.left && !program_environment_reaches_shim(environment))
        kind = PROGRAM_OTHER_ROOT;
    if (kind == PROGRAM_OTHER_ROOT && hl_image->mode == HL_MODE_ON) /* a remark would not reach the log */
        __atomic_fetch_add(&hl_control_page->unseen, 1, __ATOMIC_RELAXED);
    if (program_needs_clean_start(kind)) {
        s.clean = program_clean_environment(environment);
        s.environment = s.clean.list ? s.clean.list : environment;
    }
    if (hl_image->mode == HL_MODE_ON && (!inherits || kind != PROGRAM_TRACEABLE))
        remark(program_reason(kind), path);
    return s;
}

/*
 * An exec is about to be tried: records it and holds, if it has a chance. In a vfork child only the remark is made: the image there
 * is the parent's.
 */
static struct start exec_begin(int folder, const char *path, char *const *environment)
{
    struct start s = start_look(folder, path, environment);
    if (!s.possible || hl_image->mode != HL_MODE_ON || image_is_borrowed())
        return s;
    image_hold(3, 0);
    s.held = true;
    return s;
}

static struct start exec_begin_search(const char *file, char *const *environment)
{
    char path[4096];
    if (file && host_contains(file, "/"))
        return exec_begin(AT_FDCWD, file, environment);
    if (!hl_settings.enabled || !file || !found_in_path(file, path, sizeof path))
        return (struct start){.environment = environment};
    return exec_begin(AT_FDCWD, path, environment);
}

/* The real exec came back: it failed, and the program goes on. errno is the real call's. */
static int exec_failed(struct start *s, int result)
{
    program_environment_free(&s->clean);
    if (s->held)
        image_resume();
    return result;
}

HL_EXPORT int execve(const char *path, char *const *argv, char *const *environment)
{
    struct start s = exec_begin(AT_FDCWD, path, environment);
    return exec_failed(&s, REAL(execve)(path, argv, s.environment));
}

HL_EXPORT int execv(const char *path, char *const *argv)
{
    struct start s = exec_begin(AT_FDCWD, path, host_environment());
    return exec_failed(&s, REAL(execve)(path, argv, s.environment));
}

HL_EXPORT int execvp(const char *file, char *const *argv)
{
    struct start s = exec_begin_search(file, host_environment());
    return exec_failed(&s, REAL(execvpe)(file, argv, s.environment));
}

HL_EXPORT int execvpe(const char *file, char *const *argv, char *const *environment)
{
    struct start s = exec_begin_search(file, environment);
    return exec_failed(&s, REAL(execvpe)(file, argv, s.environment));
}

HL_EXPORT int fexecve(int fd, char *const *argv, char *const *environment)
{
    char path[32];
    size_t n = text_put(path, sizeof path, "/proc/self/fd/");
    text_put_number(path + n, sizeof path - n, fd < 0 ? 0 : (uint64_t)fd, 10);
    struct start s = exec_begin(AT_FDCWD, fd < 0 ? NULL : path, environment);
    return exec_failed(&s, REAL(fexecve)(fd, argv, s.environment));
}

HL_EXPORT int execveat(int folder, const char *path, char *const *argv, char *const *environment, int flags)
{
    struct start s = exec_begin(folder, (flags & AT_EMPTY_PATH) ? NULL : path, environment);
    if (!hl_real.execveat && !REAL(execve)) /* before glibc 2.34 nobody could have called it */
        return -1;
    return exec_failed(&s, REAL(execveat)(folder, path, argv, s.environment, flags));
}

HL_EXPORT int posix_spawn(pid_t *child, const char *path, const posix_spawn_file_actions_t *actions,
                          const posix_spawnattr_t *attributes, char *const *argv, char *const *environment)
{
    struct start s = start_look(AT_FDCWD, path, environment);
    int failed = REAL(posix_spawn)(child, path, actions, attributes, argv, s.environment);
    program_environment_free(&s.clean);
    return failed;
}

static struct start start_look_search(const char *file, char *const *environment)
{
    char path[4096];
    if (file && host_contains(file, "/"))
        return start_look(AT_FDCWD, file, environment);
    if (!hl_settings.enabled || !file || !found_in_path(file, path, sizeof path))
        return (struct start){.environment = environment};
    return start_look(AT_FDCWD, path, environment);
}

HL_EXPORT int posix_spawnp(pid_t *child, const char *file, const posix_spawn_file_actions_t *actions,
                           const posix_spawnattr_t *attributes, char *const *argv, char *const *environment)
{
    struct start s = start_look_search(file, environment);
    int failed = REAL(posix_spawnp)(child, file, actions, attributes, argv, s.environment);
    program_environment_free(&s.clean);
    return failed;
}

/* These start a shell with the environment as it is, out of our sight. */
static void shell_look(const char *command)
{
    if (command && hl_image->mode == HL_MODE_ON && !program_environment_has_shim(host_environment()))
        remark("", command);
}

HL_EXPORT int system(const char *command)
{
    shell_look(command);
    return REAL(system)(command);
}

HL_EXPORT FILE *popen(const char *command, const char *mode)
{
    shell_look(command);
    return REAL(popen)(command, mode);
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
