/* spool.c: making and mapping the files of an image's folder (drawn in spool.h). */
#define _GNU_SOURCE
#include "spool_files.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/resource.h>

#include "guard.h"

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

void spool_path(char *path, size_t room, const char *name, int64_t number, const char *ending)
{
    size_t n = text_put(path, room, hl_image->folder);
    n += text_put(path + n, room - n, name);
    if (number >= 0)
        n += text_put_number(path + n, room - n, (uint64_t)number, 10);
    text_put(path + n, room - n, ending);
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
        long made = host_call2(SYS_mkdir, at, 0700);
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
    char path[HL_PATH];
    spool_path(path, sizeof path, name, number, ".new");
    long fd = host_call3(SYS_open, path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        *error = (int)-fd;
        return NULL;
    }
    long done = allocate((int)fd, bytes);
    void *start = done < 0 ? NULL : host_map_file((int)fd, bytes);
    host_call1(SYS_close, fd);
    if (!start) {
        *error = done < 0 ? (int)-done : ENOMEM;
        host_call1(SYS_unlink, path);
    }
    return start;
}

int spool_publish(const char *name, int64_t number)
{
    char from[HL_PATH], to[HL_PATH];
    spool_path(from, sizeof from, name, number, ".new");
    spool_path(to, sizeof to, name, number, "");
    return (int)host_call2(SYS_rename, from, to);
}

void spool_append(const char *name, const char *text, size_t bytes)
{
    char path[HL_PATH];
    spool_path(path, sizeof path, name, -1, "");
    if (!size_is_allowed(1u << 20))
        return;
    long fd = host_call3(SYS_open, path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    while (fd >= 0 && bytes) {
        long wrote = host_call3(SYS_write, fd, text, bytes);
        if (wrote == -EINTR)
            continue;
        if (wrote <= 0)
            break;
        text += wrote;
        bytes -= (size_t)wrote;
    }
    if (fd >= 0)
        host_call1(SYS_close, fd);
}

void spool_copy(const char *from, const char *name)
{
    char buffer[HL_PAGE];
    char path[HL_PATH];
    if (!size_is_allowed(1u << 24))
        return;
    spool_path(path, sizeof path, name, -1, "");
    long in = host_call2(SYS_open, from, O_RDONLY | O_CLOEXEC);
    long out = host_call3(SYS_open, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    while (in >= 0 && out >= 0) {
        long got = host_call3(SYS_read, in, buffer, sizeof buffer);
        if (got == -EINTR)
            continue;
        if (got <= 0 || host_call3(SYS_write, out, buffer, got) != got)
            break;
    }
    if (in >= 0)
        host_call1(SYS_close, in);
    if (out >= 0)
        host_call1(SYS_close, out);
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
