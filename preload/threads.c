/* threads.c: the start and the end of threads. */
#define _GNU_SOURCE
#include <errno.h>
#include <sys/resource.h>

#include "guard.h"
#include "hooks.h"
#include "image.h"

/* setjmp.h's, which libc lets a shorter buffer be given to here (as pthread_cleanup_push does). */
extern int hl_sigsetjmp(void *, int) __asm__("__sigsetjmp") __attribute__((returns_twice));

/* What a new thread has to know; in our own memory, because the program's allocator is none of our business. */
struct start {
    uint32_t used;
    uint32_t known_stack; /* low and size are the program's own stack */
    void *(*routine)(void *);
    thrd_start_t routine_c11;
    void *argument;
    uintptr_t low;
    size_t size;
};

#define STARTS 1024
static struct start *starts;

/* libc's own way to run something when a thread is unwound (pthread_exit, cancellation); in libpthread before 2.34. */
static struct {
    uint32_t ready;
    void (*enter)(__pthread_unwind_buf_t *);
    void (*leave)(__pthread_unwind_buf_t *);
    void (*go_on)(__pthread_unwind_buf_t *);
    int (*stack_of)(const pthread_attr_t *, void **, size_t *);
} libc_threads;

static void threads_prepare(void)
{
    if (__atomic_load_n(&libc_threads.ready, __ATOMIC_ACQUIRE))
        return;
    struct hl_guard g = guard_enter(&hl_image->start_lock);
    if (!libc_threads.ready) {
        libc_threads.enter = (void (*)(__pthread_unwind_buf_t *))host_symbol("__pthread_register_cancel");
        libc_threads.leave = (void (*)(__pthread_unwind_buf_t *))host_symbol("__pthread_unregister_cancel");
        libc_threads.go_on = (void (*)(__pthread_unwind_buf_t *))host_symbol("__pthread_unwind_next");
        libc_threads.stack_of =
            (int (*)(const pthread_attr_t *, void **, size_t *))host_symbol("pthread_attr_getstack");
        if (!starts)
            starts = host_map_private(STARTS * sizeof *starts);
        __atomic_store_n(&libc_threads.ready, 1, __ATOMIC_RELEASE);
    }
    guard_leave(&g);
}

/* A free entry, taken; NULL if there is none (then the thread is recorded from its first event on, without an end). */
static struct start *start_take(void)
{
    for (uint32_t i = 0; starts && i < STARTS; i++)
        if (!starts[i].used && !__atomic_exchange_n(&starts[i].used, 1, __ATOMIC_ACQUIRE))
            return &starts[i];
    return NULL;
}

static void start_give_back(struct start *s)
{
    __atomic_store_n(&s->used, 0, __ATOMIC_RELEASE);
}

/* libc's default size of a thread's stack: the limit, 2 MB if there is none. */
static size_t default_stack_size(void)
{
    struct rlimit limit;
    if (host_frugal || host_call4(SYS_prlimit64, 0, RLIMIT_STACK, NULL, &limit) < 0)
        return 0;
    return limit.rlim_cur == RLIM_INFINITY ? 2u << 20 : limit.rlim_cur;
}

static void start_note_stack(struct start *s, const pthread_attr_t *attributes)
{
    void *low = NULL;
    size_t size = 0;
    s->known_stack = 0;
    if (attributes && libc_threads.stack_of && libc_threads.stack_of(attributes, &low, &size) == 0)
        s->known_stack = (uintptr_t)low + size != 0;
    s->low = s->known_stack ? (uintptr_t)low : 0;
    s->size = size ? size : default_stack_size();
}

/*
 * On a stack that libc made the thread's own structure is the last thing in the mapping, and less than a page: so the mapping
 * ends at the next page. (pthread_getattr_np knows too, but allocates.) A reused larger stack is taken for as large as was asked.
 */
static void apply_stack(const struct start *s)
{
    uintptr_t high = ((uintptr_t)__builtin_thread_pointer() | (HL_PAGE - 1)) + 1;
    size_t size = (s->size + HL_PAGE - 1) & ~(size_t)(HL_PAGE - 1);
    if (s->known_stack)
        record_thread_stack(s->low, s->low + s->size);
    else if (size && size < high)
        record_thread_stack(high - size, high);
}

/* Runs the program's routine; the thread's end is recorded whichever way it ends. */
static void *thread_run(struct start *shared)
{
    struct start s = *shared;
    void *volatile result = NULL;
    __pthread_unwind_buf_t unwinding;
    start_give_back(shared);
    apply_stack(&s);
    record_thread();
    bool guarded = libc_threads.enter && libc_threads.leave && libc_threads.go_on;
    if (guarded) {
        if (hl_sigsetjmp(unwinding.__cancel_jmp_buf, 0)) {
            record_thread_end();
            libc_threads.go_on(&unwinding);
        }
        libc_threads.enter(&unwinding);
    }
    result = s.routine ? s.routine(s.argument) : (void *)(intptr_t)s.routine_c11(s.argument);
    if (guarded)
        libc_threads.leave(&unwinding);
    record_thread_end();
    return result;
}

static void *thread_main(void *shared)
{
    return thread_run(shared);
}

static int thread_main_c11(void *shared)
{
    return (int)(intptr_t)thread_run(shared);
}

HL_EXPORT int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*routine)(void *), void *argument)
{
    struct start *s = NULL;
    if (image_start()) {
        threads_prepare();
        s = start_take();
    }
    if (!s)
        return REAL(pthread_create)(thread, attributes, routine, argument);
    s->routine = routine;
    s->argument = argument;
    start_note_stack(s, attributes);
    int status = REAL(pthread_create)(thread, attributes, thread_main, s);
    if (status)
        start_give_back(s);
    return status;
}

HL_EXPORT int pthread_setname_np(pthread_t thread, const char *name)
{
    int failed = REAL(pthread_setname_np)(thread, name);
    if (!failed)
        record_thread_name((uintptr_t)thread, name); /* a thread is known by the address of its structure */
    return failed;
}

HL_EXPORT int thrd_create(thrd_t *thread, thrd_start_t routine, void *argument)
{
    struct start *s = NULL;
    if (image_start()) {
        threads_prepare();
        s = start_take();
    }
    if (!s)
        return REAL(thrd_create)(thread, routine, argument);
    s->routine = NULL;
    s->routine_c11 = routine;
    s->argument = argument;
    start_note_stack(s, NULL);
    int status = REAL(thrd_create)(thread, thread_main_c11, s);
    if (status != thrd_success)
        start_give_back(s);
    return status;
}
