/* spool.c: making and mapping the files of an image's folder (drawn in spool.h). */
#define _GNU_SOURCE
#include "spool_files.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/resource.h>

#include "guard.h"

/*
 * Paths and buffers are static, under file_lock, and not on the stack: a thread's whole stack may have 16 KB, a signal's 8.
 */
static char path[HL_PATH], path_new[HL_PATH], copy_buffer[HL_PAGE];

size_t text_put(char *at, size_t room, const char *text)
{
    size_t n = 0;
    while (text[n] && n + 1 < room) {
        at[n] = text[n];
        n++;
    }
    if (room)
        at[n] = 0;
    return n;
}

size_t text_put_number(char *at, size_t room, uint64_t value, unsigned base)
{
    char digits[24], *d = digits + sizeof digits - 1;
    *d = 0;
    do
        *--d = "0123456789abcdef"[value % base];
    while (value /= base);
    return text_put(at, room, d);
}

/* The path of `name`, then `number` unless it is negative, then `ending`, in this image's folder. */
static void make_path(char at[HL_PATH], const char *name, int64_t number, const char *ending)
{
    size_t n = text_put(at, HL_PATH, hl_image->folder);
    n += text_put(at + n, HL_PATH - n, name);
    if (number >= 0)
        n += text_put_number(at + n, HL_PATH - n, (uint64_t)number, 10);
    text_put(at + n, HL_PATH - n, ending);
}

int spool_make_folder(struct hl_image *image)
{
    for (uint32_t number = 0; number < 1u << 20; number++) {
        char *at = image->folder;
        size_t n = text_put(at, sizeof image->folder, hl_settings.spool);
        n += text_put(at + n, sizeof image->folder - n, "/");
        n += text_put_number(at + n, sizeof image->folder - n, (uint64_t)image->pid, 10);
        n += text_put(at + n, sizeof image->folder - n, ".");
        n += text_put_number(at + n, sizeof image->folder - n, number, 10);
        long made = host_call3(SYS_mkdirat, AT_FDCWD, at, 0700);
        if (made == -EEXIST)
            continue;
        if (made < 0)
            return (int)made;
        text_put(at + n, sizeof image->folder - n, "/");
        image->number = number;
        return 0;
    }
    return -EEXIST;
}

/* A size limit (ulimit -f) would be a signal, not an error: look before. */
static bool size_is_allowed(size_t bytes)
{
    struct rlimit limit;
    long got = host_call4(SYS_prlimit64, 0, RLIMIT_FSIZE, NULL, &limit);
    return got < 0 || limit.rlim_cur == RLIM_INFINITY || bytes <= limit.rlim_cur;
}

static long write_zeros(int fd, size_t bytes)
{
    static const char zeros[HL_PAGE];
    for (size_t at = 0; at < bytes; at += sizeof zeros) {
        long wrote = host_call4(SYS_pwrite64, fd, zeros, sizeof zeros, at);
        if (wrote != (long)sizeof zeros)
            return wrote < 0 ? wrote : -ENOSPC;
    }
    return 0;
}

/* Gives the file its blocks now, so that a full disk is an error here and not a SIGBUS later. */
static long allocate(int fd, size_t bytes)
{
    if (!size_is_allowed(bytes))
        return -EFBIG;
    long done;
    do
        done = host_call4(SYS_fallocate, fd, 0, 0, bytes);
    while (done == -EINTR);
    return done == -EOPNOTSUPP || done == -ENOSYS ? write_zeros(fd, bytes) : done;
}

void *spool_make(const char *name, int64_t number, size_t bytes, int *error)
{
    *error = EPERM;
    if (host_frugal)
        return NULL;
    struct hl_guard g = guard_enter(&hl_image->file_lock);
    make_path(path, name, number, ".new");
    void *start = NULL;
    long fd = host_call4(SYS_openat, AT_FDCWD, path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    long done = fd < 0 ? fd : allocate((int)fd, bytes);
    if (done >= 0)
        start = host_map_file((int)fd, bytes);
    if (fd >= 0)
        host_call1(SYS_close, fd);
    if (!start) {
        *error = done < 0 ? (int)-done : ENOMEM;
        if (fd >= 0)
            host_call3(SYS_unlinkat, AT_FDCWD, path, 0);
    }
    guard_leave(&g);
    return start;
}

int spool_publish(const char *name, int64_t number)
{
    struct hl_guard g = guard_enter(&hl_image->file_lock);
    make_path(path_new, name, number, ".new");
    make_path(path, name, number, "");
    int result = (int)host_call4(SYS_renameat, AT_FDCWD, path_new, AT_FDCWD, path);
    guard_leave(&g);
    return result;
}

static void write_all(int fd, const char *text, size_t bytes)
{
    while (bytes) {
        long wrote = host_call3(SYS_write, fd, text, bytes);
        if (wrote == -EINTR)
            continue;
        if (wrote <= 0)
            return;
        text += wrote;
        bytes -= (size_t)wrote;
    }
}

void spool_append(const char *name, const char *text, size_t bytes)
{
    if (host_frugal || !size_is_allowed(1u << 20)) {
        if (hl_control_page)
            __atomic_fetch_add(&hl_control_page->unlogged, 1, __ATOMIC_RELAXED);
        return;
    }
    struct hl_guard g = guard_enter(&hl_image->file_lock);
    make_path(path, name, -1, "");
    long fd = host_call4(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd >= 0) {
        write_all((int)fd, text, bytes);
        host_call1(SYS_close, fd);
    } else if (hl_control_page) {
        __atomic_fetch_add(&hl_control_page->unlogged, 1, __ATOMIC_RELAXED);
    }
    guard_leave(&g);
}

void spool_copy(const char *from, const char *name)
{
    if (!size_is_allowed(1u << 24))
        return;
    struct hl_guard g = guard_enter(&hl_image->file_lock);
    make_path(path, name, -1, "");
    long in = host_call4(SYS_openat, AT_FDCWD, from, O_RDONLY | O_CLOEXEC, 0);
    long out = host_call4(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    long got = in >= 0 && out >= 0 ? 1 : 0;
    while (got > 0 || got == -EINTR) {
        got = host_call3(SYS_read, in, copy_buffer, sizeof copy_buffer);
        if (got > 0)
            write_all((int)out, copy_buffer, (size_t)got);
    }
    if (in >= 0)
        host_call1(SYS_close, in);
    if (out >= 0)
        host_call1(SYS_close, out);
    guard_leave(&g);
}

static struct hl_node *segments[HL_SEGMENTS]; /* under segment_lock; fork copies it */
static uint32_t segments_made;

void spool_forget(void)
{
    for (uint32_t k = 0; k < segments_made; k++)
        if (segments[k] && segments[k] != HL_NO_SEGMENT)
            host_blank(segments[k], HL_SEGMENT_BYTES);
    for (uint32_t k = 0; k <= segments_made && k < HL_SEGMENTS; k++)
        segments[k] = NULL;
    segments_made = 0;
}

struct hl_node *spool_stack_segment(uint32_t k)
{
    if (k >= HL_SEGMENTS || hl_image->mode != HL_MODE_ON)
        return NULL;
    struct hl_node *have = __atomic_load_n(&segments[k], __ATOMIC_ACQUIRE);
    if (have)
        return have == HL_NO_SEGMENT ? NULL : have;
    struct hl_guard g = guard_enter(&hl_image->segment_lock);
    have = segments[k];
    if (!have) {
        int error = 0;
        have = spool_make("stacks.", k, HL_SEGMENT_BYTES, &error);
        if (have) {
            spool_publish("stacks.", k);
            segments_made = k + 1 > segments_made ? k + 1 : segments_made;
        } else {
            have = HL_NO_SEGMENT;
            spool_append("log", HL_STACKS_FULL, sizeof HL_STACKS_FULL - 1);
        }
        __atomic_store_n(&segments[k], have, __ATOMIC_RELEASE);
    }
    guard_leave(&g);
    return have == HL_NO_SEGMENT ? NULL : have;
}
