/* drain_ring.c: ring files, the threads that own them, and when their slots go back. See drain.h. */
#define _GNU_SOURCE
#include "drain_ring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* ---- files ---- */

void *map_file(const char *path, size_t least, size_t *bytes, const char **why)
{
    int fd = open(path, O_RDWR | O_CLOEXEC);
    struct stat stat;
    void *start = MAP_FAILED;
    *why = "it cannot be opened";
    if (fd < 0)
        return NULL;
    if (fstat(fd, &stat) == 0 && (size_t)stat.st_size < least) {
        *why = "it is cut short";
        errno = EINVAL;
    } else {
        *bytes = (size_t)stat.st_size;
        start = mmap(NULL, *bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        *why = "it cannot be mapped";
    }
    int error = errno;
    close(fd);
    errno = error;
    return start == MAP_FAILED ? NULL : start;
}

/* Up to where the trace file holds the ring's slots, as the collector before noted it. */
static void ring_find_mark(struct ring *r)
{
    const struct hl_mark *mark = &r->page->mark[r->page->mark[1].position > r->page->mark[0].position];
    r->at = (struct cursor){mark->position, mark->tick, mark->seq};
    r->done_thread = mark->thread;
}

static struct ring *ring_open(const struct drain *d, uint32_t index, const char **why)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/ring.%u", d->folder, index);
    size_t bytes = 0;
    struct hl_ring *page = map_file(path, HL_PAGE, &bytes, why);
    if (!page)
        return NULL;
    uint32_t capacity = page->capacity;
    struct ring *r = NULL;
    if (memcmp(page->magic, HL_MAGIC_RING, 8))
        *why = "it is not a ring";
    else if (!capacity || capacity > DRAIN_SLOTS_MAX || capacity & (capacity - 1))
        *why = "it claims an impossible number of slots";
    else if (bytes < HL_PAGE + (size_t)capacity * SLOT_BYTES)
        *why = "it is cut short";
    else
        r = calloc(1, sizeof *r);
    if (!r) {
        munmap(page, bytes);
        return NULL;
    }
    r->page = page;
    r->bytes = bytes;
    r->capacity = capacity;
    r->slots = (const uint64_t *)((const char *)page + HL_PAGE);
    if (d->trust_tail || page->head > capacity)
        ring_find_mark(r);
    if (r->at.position && !(r->owner = owner_new(r->done_thread))) {
        munmap(page, bytes);
        free(r);
        return NULL;
    }
    r->done = r->at;
    r->marked = r->at.position;
    r->head_before = r->at.position;
    return r;
}

void owners_free(struct owner *o)
{
    while (o) {
        struct owner *next = o->next;
        if (!o->listed)
            free(o);
        o = next;
    }
}

static void ring_free(struct ring *r)
{
    if (!r)
        return;
    owners_free(r->owner);
    owners_free(r->coming);
    for (struct segment *s = r->segment; s;) {
        struct segment *next = s->next;
        munmap(s->map, s->bytes);
        free(s->path);
        free(s);
        s = next;
    }
    free(r->group.event);
    free(r->open);
    munmap(r->page, r->bytes);
    free(r);
}

void find_rings(struct drain *d)
{
    uint32_t count = load32(&d->control->rings);
    count = count < DRAIN_RINGS_MAX ? count : DRAIN_RINGS_MAX;
    if (count > d->ring_room) {
        uint32_t room = count * 2;
        struct ring **ring = realloc(d->ring, room * sizeof *ring);
        d->ring = ring ? ring : d->ring;
        struct ring **heap = ring ? realloc(d->heap, room * sizeof *heap) : NULL;
        d->heap = heap ? heap : d->heap;
        if (!heap)
            return; /* later, perhaps */
        d->ring_room = room;
    }
    for (; d->ring_count < count; d->ring_count++) {
        const char *why;
        struct ring *r = ring_open(d, d->ring_count, &why);
        d->ring[d->ring_count] = r;
        if (!r && d->bad_count < sizeof d->bad / sizeof *d->bad) {
            d->bad[d->bad_count].index = d->ring_count;
            d->bad[d->bad_count++].why = why;
        }
    }
}

struct drain *drain_new(const char *folder, bool trust_tail, uint64_t written)
{
    struct drain *d = calloc(1, sizeof *d);
    if (!d)
        return NULL;
    pthread_mutex_init(&d->lock, NULL);
    d->trust_tail = trust_tail;
    d->written = d->totals.last_seq = written;
    d->changed_end = &d->changed;
    d->folder = strdup(folder);
    d->encoder = codec_encoder_new();
    char path[4096];
    snprintf(path, sizeof path, "%s/control", folder);
    size_t bytes;
    const char *why;
    d->control = map_file(path, HL_PAGE, &bytes, &why);
    if (d->folder && d->encoder && d->control)
        return d;
    int error = errno ? errno : ENOMEM;
    drain_free(d);
    errno = error;
    return NULL;
}

void drain_free(struct drain *d)
{
    if (!d)
        return;
    for (uint32_t i = 0; i < d->ring_count; i++)
        ring_free(d->ring[i]);
    while (d->changed) {
        struct owner *o = d->changed;
        d->changed = o->changed;
        free(o);
    }
    if (d->control)
        munmap(d->control, HL_PAGE);
    codec_encoder_free(d->encoder);
    pthread_mutex_destroy(&d->lock);
    free(d->open);
    free(d->ring);
    free(d->heap);
    free(d->folder);
    free(d->spill_prefix);
    free(d);
}

/* ---- threads ---- */

struct owner *owner_new(uint32_t number)
{
    struct owner *o = calloc(1, sizeof *o);
    if (o)
        o->row.number = number;
    return o;
}

/* Something new is known of it. */
static void owner_tell(struct drain *d, struct owner *o)
{
    if (o->listed)
        return;
    o->listed = true;
    o->changed = NULL;
    *d->changed_end = o;
    d->changed_end = &o->changed;
}

/* Its last slot was read. */
static void owner_leave(struct drain *d, struct owner *o)
{
    if (!o)
        return;
    if (o->row.started && !o->row.ended) {
        o->row.ended = true;
        o->row.end_ns = d->totals.last_ns > o->row.start_ns ? d->totals.last_ns : o->row.start_ns;
        owner_tell(d, o);
    }
    o->over = true;
    if (!o->listed)
        free(o);
}

void ring_note_owner(struct drain *d, struct ring *r)
{
    const struct hl_ring *page = r->page;
    uint32_t generation = load32(&page->generation);
    if (likely(generation == r->generation))
        return;
    r->generation = generation;
    struct owner *o = r->owner && r->owner->row.number == page->thread ? r->owner : NULL;
    if (!o) {
        o = owner_new(page->thread);
        if (!o)
            return;
        struct owner **end = &r->coming;
        while (*end)
            end = &(*end)->next;
        *end = o;
    }
    o->row.tid = page->tid;
    o->row.thread_pointer = page->thread_pointer;
    o->row.stack_low = page->stack_low;
    o->row.stack_high = page->stack_high;
    memcpy(o->row.name, page->name, sizeof o->row.name);
    o->row.described = o->row.named = true;
    owner_tell(d, o);
}

void ring_note_name(struct drain *d, struct ring *r)
{
    struct owner *o = r->coming ? r->coming : r->owner;
    while (o && o->next)
        o = o->next;
    if (!o || o->row.number != r->page->thread || !memcmp(o->row.name, r->page->name, sizeof o->row.name))
        return;
    memcpy(o->row.name, r->page->name, sizeof o->row.name);
    owner_tell(d, o);
}

void ring_switch(struct drain *d, struct ring *r, uint32_t number)
{
    if (r->owner && r->owner->row.number == number)
        return;
    owner_leave(d, r->owner);
    r->owner = NULL;
    struct owner *o = r->coming;
    while (o && o->row.number != number)
        o = o->next;
    if (!o) {
        r->owner = owner_new(number); /* its ring's header is somebody else's by now (recovery) */
        return;
    }
    while (r->coming != o) {
        struct owner *skipped = r->coming;
        r->coming = skipped->next;
        owner_leave(d, skipped);
    }
    r->coming = o->next;
    o->next = NULL;
    r->owner = o;
}

void thread_event(struct drain *d, struct ring *r, const struct codec_event *e)
{
    struct owner *o = r->owner;
    if (!o)
        return;
    if (e->kind == HL_THREAD_START && !o->row.described) {
        o->row.tid = (uint32_t)e->arg2;
        o->row.thread_pointer = e->addr;
        o->row.stack_low = e->arg;
        o->row.stack_high = e->arg ? e->arg + e->size : 0;
        o->row.described = true;
        owner_tell(d, o);
    }
    if (e->kind == HL_THREAD_END) {
        o->row.ended = true;
        o->row.end_ns = e->time;
        owner_tell(d, o);
    }
    /* Of a thread that began before what the trace file holds only the start itself says when. */
    if (!o->row.started && (!d->written || e->kind == HL_THREAD_START)) {
        o->row.started = true;
        o->row.start_ns = e->time;
        owner_tell(d, o);
    }
}

bool drain_next_thread(struct drain *d, struct drain_thread *row)
{
    struct owner *o = d->changed;
    if (!o)
        return false;
    d->changed = o->changed;
    if (!d->changed)
        d->changed_end = &d->changed;
    o->listed = false;
    *row = o->row;
    if (o->over)
        free(o);
    return true;
}

bool drain_next_bad_ring(struct drain *d, uint32_t *index, const char **why)
{
    if (!d->bad_count)
        return false;
    *index = d->bad[--d->bad_count].index;
    *why = d->bad[d->bad_count].why;
    return true;
}

/* ---- tails ---- */

/* Notes up to where all is committed: the older of the two marks is written, its position last. */
static void set_mark(struct ring *r)
{
    struct hl_mark *mark = &r->page->mark[r->page->mark[0].position > r->page->mark[1].position];
    mark->tick = r->done.tick;
    mark->seq = r->done.seq;
    mark->thread = r->done_thread;
    __atomic_store_n(&mark->position, r->done.position, __ATOMIC_RELEASE);
}

/* Not more than three quarters of a ring are kept back: or the owner would wait for room while we wait for it. */
static bool is_still_open(const struct ring *r, uint64_t position)
{
    uint64_t w0 = load(r->slots + (position & (r->capacity - 1)) * SLOT_WORDS); /* in the ring, whatever was copied */
    if (load(&r->page->head) - position > r->capacity / 4 * 3)
        return false;
    return is_written(r, position, w0) && !(w0 & W0_DONE);
}

void ring_release(struct ring *r)
{
    uint64_t tail = r->done.position > r->spilled ? r->done.position : r->spilled;
    size_t kept = 0;
    for (size_t i = 0; i < r->open_count; i++)
        if (is_still_open(r, r->open[i]))
            r->open[kept++] = r->open[i];
    r->open_count = kept;
    for (size_t i = 0; i < kept; i++)
        tail = r->open[i] < tail ? r->open[i] : tail;
    if (tail > r->page->tail)
        __atomic_store_n(&r->page->tail, tail, __ATOMIC_RELEASE);
}

void look_at_tails(struct drain *d)
{
    pthread_mutex_lock(&d->lock);
    for (uint32_t i = 0; i < d->ring_count; i++) {
        struct ring *r = d->ring[i];
        if (r && r->open_count)
            ring_release(r);
        if (r && r->segment && r->segment->end <= r->done.position)
            segments_drop(d, r, false);
    }
    pthread_mutex_unlock(&d->lock);
}

static void ring_add_open(struct ring *r, uint64_t position)
{
    if (r->open_count == r->open_room) {
        size_t room = r->open_room ? r->open_room * 2 : 8;
        uint64_t *open = realloc(r->open, room * sizeof *open);
        if (!open)
            return; /* its owner may overwrite a slot that is taken already */
        r->open = open;
        r->open_room = room;
    }
    r->open[r->open_count++] = position;
}

void drain_commit(struct drain *d, struct drain_token *t)
{
    pthread_mutex_lock(&d->lock);
    for (size_t i = 0; i < t->open_count; i++)
        ring_add_open(t->open[i].ring, t->open[i].position);
    for (size_t i = 0; i < t->ring_count; i++) {
        struct ring *r = t->ring[i].ring;
        r->done = t->ring[i].at;
        r->done_thread = t->ring[i].thread;
        set_mark(r);
        ring_release(r);
    }
    pthread_mutex_unlock(&d->lock);
    drain_token_free(t);
}

void drain_token_free(struct drain_token *t)
{
    free(t->open);
    free(t);
}

/* ---- rings of threads that have ended ---- */

/* Nothing unfinished lies between what was read and the head. */
static bool is_all_done(const struct ring *r, uint64_t head)
{
    for (uint64_t position = r->at.position; position < head; position++) {
        uint64_t w0 = load(slot_at(r, position));
        if (!is_written(r, position, w0) || !(w0 & W0_DONE))
            return false;
    }
    return true;
}

/* The owner is dead: another thread may have the ring, and goes on behind what lies there. (The state is stored last.) */
static void give_back(struct drain *d, struct ring *r)
{
    uint64_t head = load(&r->page->head);
    if (head - r->page->tail > r->capacity / 2 || !is_all_done(r, head))
        return;
    ring_note_owner(d, r);
    ring_note_name(d, r);
    r->page->tid = 0;
    __atomic_store_n(&r->page->state, HL_RING_FREE, __ATOMIC_RELEASE);
}

void drain_reap(struct drain *d, int pid)
{
    find_rings(d);
    for (uint32_t i = 0; i < d->ring_count; i++) {
        struct ring *r = d->ring[i];
        if (!r || load32(&r->page->state) != HL_RING_LEFT)
            continue;
        if (syscall(SYS_tgkill, pid, r->page->tid, 0) < 0 && errno == ESRCH)
            give_back(d, r);
    }
}

void drain_reap_silent(struct drain *d, uint32_t thread)
{
    for (uint32_t i = 0; i < d->ring_count; i++) {
        struct ring *r = d->ring[i];
        if (r && r->page->thread == thread && load32(&r->page->state) != HL_RING_FREE &&
            load(&r->page->head) == r->at.position)
            give_back(d, r);
    }
}
