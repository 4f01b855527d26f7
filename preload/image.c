/* image.c: a process image starts, forks, execs and is held at its end. */
#define _GNU_SOURCE
#include "image.h"

#include <errno.h>
#include <linux/futex.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>

#include "guard.h"
#include "hooks.h"
#include "loader.h"
#include "modules.h"
#include "sample.h"
#include "spool_files.h"
#include "stack.h"

/* Stands in until the first image is made; afterwards hl_image points to memory that fork wipes. */
static struct hl_image first_image;
struct hl_image *hl_image = &first_image;
struct hl_settings hl_settings;
struct hl_control *hl_control_page;

/* The image this memory belonged to last: survives fork, so that a child knows its parent. Plain memory. */
static struct {
    struct hl_control *control;
    uint32_t pid, number; /* of its folder */
} last_image;

/* The parent's counter at a fork in progress on this thread; 0 outside of fork(). */
static __thread uint64_t fork_seq;

#define NS_PER_MS 1000000ull
#define HOLD_STEP_MS 50
#define HOLD_FIRST_MS 500  /* for a collector that never came */
#define HOLD_STALE_MS 2000 /* a heartbeat older than this: the collector is gone */

/* ---- settings ---- */

static const char *after_prefix(const char *text, const char *prefix)
{
    while (*prefix && *text == *prefix)
        text++, prefix++;
    return *prefix ? NULL : text;
}

static uint64_t parse_number(const char *text)
{
    uint64_t value = 0;
    while (*text >= '0' && *text <= '9' && value < 1ull << 60)
        value = value * 10 + (uint64_t)(*text++ - '0');
    return value;
}

static uint32_t clamp(uint64_t value, uint32_t low, uint32_t high)
{
    return value < low ? low : value > high ? high : (uint32_t)value;
}

static void parse_option(const char *text)
{
    const char *value;
    if ((value = after_prefix(text, "hold_ms=")))
        hl_settings.hold_ms = clamp(parse_number(value), 0, 3600000);
    else if ((value = after_prefix(text, "ring_slots=")))
        hl_settings.ring_slots = clamp(parse_number(value), 1024, 1u << 22);
    else if ((value = after_prefix(text, "depth=")))
        hl_settings.depth = clamp(parse_number(value), 1, 4096);
    else if ((value = after_prefix(text, "quiet=")))
        hl_settings.quiet = parse_number(value) != 0;
    else if ((value = after_prefix(text, "free_stacks=")))
        hl_settings.free_stacks = parse_number(value) != 0;
    else if ((value = after_prefix(text, "sample=")))
        hl_settings.sample_bytes = parse_number(value);
    else if ((value = after_prefix(text, "sample_seed=")))
        hl_settings.sample_seed = parse_number(value);
}

static void parse_options(const char *text)
{
    while (*text) {
        parse_option(text);
        while (*text && *text++ != ',')
            ;
    }
    uint32_t slots = 1024;
    while (slots < hl_settings.ring_slots)
        slots *= 2;
    hl_settings.ring_slots = slots;
}

static void settings_read(void)
{
    if (hl_settings.ready)
        return;
    hl_settings = (struct hl_settings){.hold_ms = 10000, .ring_slots = 131072, .depth = 128, .free_stacks = true};
    for (char **e = host_environment(); e && *e; e++) {
        const char *value = after_prefix(*e, "HEAPLEDGER_SPOOL=");
        if (value && *value) {
            hl_settings.enabled = *value == '/';
            text_put(hl_settings.spool, sizeof hl_settings.spool, value);
        }
        if ((value = after_prefix(*e, "HEAPLEDGER_OPTIONS=")))
            parse_options(value);
    }
    host_note_stderr();
    hl_settings.ready = true;
    sample_init(hl_settings.sample_bytes, hl_settings.sample_seed);
    hl_capture = hl_settings.enabled && hl_settings.sample_bytes ? HL_CAPTURE_SAMPLE : HL_CAPTURE_ALL;
}

/* ---- start ---- */

struct parent {
    bool exists, over;
    uint32_t pid, number;
    uint64_t seq;
};

static void control_fill(struct hl_control *c, uint64_t start_break, const struct parent *parent)
{
    uint64_t low, high;
    host_far_range(&low, &high);
    __builtin_memcpy(c->magic, HL_MAGIC_CONTROL, 8);
    c->version = 1;
    c->pid = (uint32_t)hl_image->pid;
    c->ppid = parent->exists ? parent->pid : (uint32_t)host_call0(SYS_getppid);
    c->parent_image = parent->number;
    c->fork_seq = parent->seq;
    c->start_break = start_break;
    c->start_ns = host_now_ns();
    c->start_tsc = host_tsc();
    c->tick_shift = HL_TICK_SHIFT;
    c->hold_ms = hl_settings.hold_ms;
    c->ring_slots = hl_settings.ring_slots;
    c->main_tid = (uint32_t)host_tid();
    c->self_low = low;
    c->self_high = high;
    c->sample_bytes = hl_settings.sample_bytes;
    c->seq = 1;
    c->nodes = 1;
}

/*
 * Lets go of what was inherited through fork. The parent's pages are replaced rather than unmapped: a signal handler may have
 * forked in the middle of a hook, which then finishes in the child (and whose event is lost there).
 */
static void forget_parent(void)
{
    host_blank(last_image.control, HL_PAGE);
    last_image.control = NULL;
    record_forget();
    spool_forget();
    stack_fork_child();
    sample_fork_child();
}

static void start_failed(int error)
{
    hl_image->mode = HL_MODE_OFF;
    if (!hl_settings.quiet && error)
        host_complain(error == ENOMEM ? "heapledger: the limits leave no memory for it; this process is not recorded\n"
                                      : "heapledger: the spool folder cannot be used; this process is not recorded\n");
}

/* What an exec finds in the environment makes it start without us. In place: the text is the program's own, on its stack. */
static void environment_disable(void)
{
    for (char **e = host_environment(); e && *e; e++) {
        const char *value = after_prefix(*e, "HEAPLEDGER_SPOOL=");
        if (value)
            (*e)[value - *e] = 0;
    }
}

/* The log and the copy of the mappings come before the control file gets its name: who sees that file finds them whole. */
static void image_describe(void)
{
    bool child = hl_control_page->parent_image != ~0u;
    modules_log_process();
    if (child)
        modules_log_again();
    else
        modules_refresh();
    spool_copy("/proc/self/smaps", "maps.start");
}

/* What a fork child has to know of its parent; all ones and 0 for an image that has none. Forgets the parent. */
static struct parent parent_take(void)
{
    struct parent p = {.number = ~0u};
    if (!last_image.control)
        return p;
    p.exists = true;
    p.pid = last_image.pid;
    p.number = last_image.number;
    p.seq = fork_seq ? fork_seq : last_image.control->seq;
    p.over = last_image.control->state >= HL_ENDED;
    fork_seq = 0;
    forget_parent();
    return p;
}

/*
 * The stack that the kernel made for the first thread: at its very end lie the name of the program's file and a null pointer. How far
 * down it may grow says the limit; nothing is known of it if that is unlimited.
 */
static void note_main_stack(void)
{
    const char *file = (const char *)getauxval(AT_EXECFN);
    struct rlimit limit;
    if (!file || hl_image->pid != host_tid() || host_call4(SYS_prlimit64, 0, RLIMIT_STACK, NULL, &limit) < 0)
        return;
    while (*file)
        file++;
    uintptr_t high = ((uintptr_t)file + 1 + sizeof(void *) + HL_PAGE - 1) & ~(uintptr_t)(HL_PAGE - 1);
    if (limit.rlim_cur < high)
        record_thread_stack((high - limit.rlim_cur) & ~(uintptr_t)(HL_PAGE - 1), high);
}

#define LEAST_SPACE (32ull << 20) /* of address space, or of private memory the second: with less nothing is recorded */
#define LEAST_DATA (8ull << 20)

/* Whether the limits on memory leave room for us beside the program. */
static bool memory_is_scarce(void)
{
    struct rlimit space, data;
    if (host_call4(SYS_prlimit64, 0, RLIMIT_AS, NULL, &space) < 0 || host_call4(SYS_prlimit64, 0, RLIMIT_DATA, NULL, &data) < 0)
        return false;
    return space.rlim_cur < LEAST_SPACE || data.rlim_cur < LEAST_DATA;
}

static bool image_make(void)
{
    uint64_t start_break = (uint64_t)host_call1(SYS_brk, 0);
    struct hl_control *of_parent = last_image.control;
    int error = 0, made = 0;
    hl_image->pid = host_pid();
    if (!of_parent || of_parent->state < HL_ENDED) {
        made = memory_is_scarce() ? -ENOMEM : spool_make_folder(hl_image);
        if (made < 0 && of_parent)
            __atomic_fetch_add(&of_parent->unseen, 1, __ATOMIC_RELAXED);
    }
    struct parent parent = parent_take();
    if (parent.over) { /* it had stopped recording: so does the child */
        start_failed(0);
        return false;
    }
    struct hl_control *control = made < 0 ? NULL : spool_make("control", -1, HL_PAGE, &error);
    if (!control) {
        error = made < 0 ? -made : error;
        if (error == EACCES || error == EPERM || error == ENOENT)
            environment_disable(); /* what it starts can do no better, and need not say so again */
        start_failed(parent.exists ? 0 : error); /* of a child it is counted in its parent's control page */
        return false;
    }
    control_fill(control, start_break, &parent);
    hl_control_page = control;
    last_image.control = control;
    last_image.pid = (uint32_t)hl_image->pid;
    last_image.number = hl_image->number;
    if (!parent.exists) {
        (void)stack_init(hl_settings.depth); /* without memory for it every stack is 0 */
        note_main_stack();
        loader_note_start();
    }
    hl_image->mode = HL_MODE_ON;
    image_describe();
    control->state = HL_RUNNING;
    spool_publish("control", -1);
    __atomic_store_n(&hl_image->live, 1, __ATOMIC_SEQ_CST);
    hl_live = &hl_image->live;
    return true;
}

/* Moves hl_image to memory that fork wipes. */
static bool image_place(void)
{
    if (hl_image != &first_image)
        return true;
    struct hl_image *place = host_map_wiped(sizeof *place);
    if (place)
        hl_image = place;
    return place != NULL;
}

bool image_start(void)
{
    if (likely(hl_image->mode == HL_MODE_ON))
        return true;
    hooks_resolve();
    settings_read();
    if (!hl_settings.enabled || hl_image->mode == HL_MODE_OFF) {
        hl_image->mode = HL_MODE_OFF;
        return false;
    }
    if (!image_place()) {
        start_failed(ENOMEM);
        return false;
    }
    struct hl_guard g = guard_enter(&hl_image->start_lock);
    bool on = hl_image->mode == HL_MODE_ON || (hl_image->mode == HL_MODE_NEW && image_make());
    guard_leave(&g);
    return on;
}

/* ---- stop ---- */

static void recording_off(void)
{
    __atomic_store_n(&hl_image->mode, HL_MODE_OFF, __ATOMIC_SEQ_CST);
    __atomic_store_n(&hl_image->live, 0, __ATOMIC_SEQ_CST);
}

void image_stop(enum hl_stop reason, int error, const char *text)
{
    uint32_t mode = HL_MODE_ON;
    if (!__atomic_compare_exchange_n(&hl_image->mode, &mode, HL_MODE_OFF, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        return;
    uint64_t signals;
    host_signals_block(&signals);
    recording_off();
    hl_control_page->stop_reason = reason;
    hl_control_page->stop_errno = error;
    uint32_t running = HL_RUNNING; /* a process that is being held stays so, or nobody would let it go */
    __atomic_compare_exchange_n(&hl_control_page->state, &running, HL_STOPPED, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    char line[256];
    size_t n = text_put(line, sizeof line, "S\t");
    n += text_put(line + n, sizeof line - n, text);
    n += text_put(line + n, sizeof line - n, "\n");
    spool_append("log", line, n);
    if (!hl_settings.quiet && reason != HL_STOP_TOLD) {
        n = text_put(line, sizeof line, "heapledger: recording stopped: ");
        n += text_put(line + n, sizeof line - n, text);
        text_put(line + n, sizeof line - n, "; the program runs on\n");
        host_complain(line);
    }
    host_signals_restore(&signals);
}

void image_confine(void)
{
    environment_disable();
    hl_settings.enabled = false;
    image_stop(HL_STOP_CONFINED, 0, "the program forbids itself (seccomp) the system calls of recording");
}

void image_forbid_files(void)
{
    if (hl_image->mode == HL_MODE_ON && !image_is_borrowed())
        modules_log_remark("the program forbids itself (seccomp) files: its children are not recorded, nor many new threads", "");
    image_leave();
    environment_disable();
    hl_settings.enabled = false;
    host_frugal = true;
}

void image_leave(void)
{
    hl_settings.left = true;
    if (hl_image->mode != HL_MODE_ON || image_is_borrowed() || __atomic_exchange_n(&hl_image->left, 1, __ATOMIC_SEQ_CST))
        return;
    record_prepare();
    (void)spool_stack_segment(hl_control_page->nodes / HL_SEGMENT_NODES + 1);
}

/* ---- the end ---- */

bool image_is_borrowed(void)
{
    return hl_image->mode == HL_MODE_ON && host_pid() != hl_image->pid;
}

/* True when waiting on is pointless: told to go on, out of time, or nobody there. */
static bool hold_is_over(uint64_t waited_ms, uint64_t now_ns)
{
    struct hl_control *c = hl_control_page;
    uint64_t beat = __atomic_load_n(&c->heartbeat_ns, __ATOMIC_ACQUIRE);
    if (__atomic_load_n(&c->release, __ATOMIC_ACQUIRE) == 1 || c->told || waited_ms >= c->hold_ms)
        return true;
    return beat == 0 ? waited_ms >= HOLD_FIRST_MS : now_ns > beat && now_ns - beat > HOLD_STALE_MS * NS_PER_MS;
}

static void hold_wait(void)
{
    uint64_t began = host_now_ns(), now = began;
    while (!hold_is_over((now - began) / NS_PER_MS, now)) {
        struct timespec step = {.tv_nsec = HOLD_STEP_MS * NS_PER_MS};
        host_call4(SYS_futex, &hl_control_page->release, FUTEX_WAIT, 0, &step);
        now = host_now_ns();
    }
}

/*
 * What was loaded out of our sight (by libc itself) shows up here. Not in a fork child that loaded nothing: another thread of
 * the parent may have held the loader's list lock at the fork.
 */
static void hold_modules(void)
{
    if (hl_control_page->parent_image == ~0u || modules_expected())
        modules_refresh();
}

void image_hold(uint32_t how, int status)
{
    if (!image_start() || image_is_borrowed())
        return;
    if (__atomic_exchange_n(&hl_image->ended, 1, __ATOMIC_SEQ_CST))
        return;
    struct hl_control *c = hl_control_page;
    struct hl_values v = {.arg = (uint64_t)(int64_t)status, .arg2 = how};
    hold_modules();
    record_instant(how == 3 ? HL_EXEC : HL_EXIT, how == 3 ? 0 : 1, &v);
    c->exit_how = how;
    c->exit_status = status;
    c->end_tsc = host_tsc();
    c->end_ns = host_now_ns();
    uint32_t running = HL_RUNNING;
    if (!__atomic_compare_exchange_n(&c->state, &running, HL_HOLDING, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        return;
    host_call3(SYS_futex, &c->state, FUTEX_WAKE, 1 << 30);
    hold_wait();
    if (how == 3)
        return;
    recording_off();
    __atomic_store_n(&c->state, HL_ENDED, __ATOMIC_SEQ_CST);
}

void image_resume(void)
{
    if (hl_image->mode != HL_MODE_ON || host_pid() != hl_image->pid)
        return;
    struct hl_control *c = hl_control_page;
    __atomic_store_n(&c->release, 0, __ATOMIC_SEQ_CST);
    c->end_ns = c->end_tsc = 0;
    uint32_t holding = HL_HOLDING;
    __atomic_compare_exchange_n(&c->state, &holding, HL_RUNNING, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    __atomic_store_n(&hl_image->ended, 0, __ATOMIC_SEQ_CST);
}

/* ---- fork ---- */

void image_fork_before(void)
{
    if (hl_image->mode == HL_MODE_ON)
        fork_seq = __atomic_load_n(&hl_control_page->seq, __ATOMIC_SEQ_CST);
}

void image_fork_child(void)
{
    image_start();
}

void image_fork_parent(pid_t child)
{
    fork_seq = 0;
    struct hl_values v = {.arg = (uint64_t)(int64_t)child};
    record_instant(HL_FORK, 1, &v);
}

/* ---- loading and unloading of the shim ---- */

extern int __cxa_atexit(void (*)(void *), void *, void *);
extern int __cxa_at_quick_exit(void (*)(void *), void *);

/* libc passes the exit status as a second argument to every handler. */
static void at_exit(void *nothing, int status)
{
    (void)nothing;
    image_hold(0, status);
}

static void at_quick_exit_(void *nothing, int status)
{
    (void)nothing;
    image_hold(2, status);
}

/*
 * Handlers run in reverse order: registered before the program's first one (and before _dl_fini), ours is the last. They are
 * registered for no object (NULL), so that our own unloading does not run them early.
 */
__attribute__((constructor)) static void shim_loaded(void)
{
    if (!image_start())
        return;
    record_thread();
    __cxa_atexit((void (*)(void *))(void *)at_exit, NULL, NULL);
    __cxa_at_quick_exit((void (*)(void *))(void *)at_quick_exit_, NULL);
}
