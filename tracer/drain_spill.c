/*
 * drain_spill.c: slots that wait for the encoder, copied from a ring to a file beside the trace.
 *
 * The program must not wait for a slow encoder or a slow disk as long as there is another place for its events: one write makes
 * room in the ring. A segment is a file PREFIX.K.FIRST (K the ring, FIRST its first position, in hex), a page of header and
 * the slots as they are:
 *
 *   0  "HLSPILL1"   8  ring   16  first   24  end     64-bit numbers; slots [first, end) begin at 4096
 *
 * It gets its name when it is whole, and only then does the ring's tail move; it goes when the trace file holds all of it.
 * So it is as durable as the ring. Segments of a ring follow each other without a gap, and end in front of a slot that was not
 * final, so that nobody writes to what was copied.
 */
#define _GNU_SOURCE
#include "drain_ring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MAGIC "HLSPILL1"

struct header {
    char magic[8];
    uint64_t ring, first, end;
};

const uint64_t *segment_slot(const struct ring *r, uint64_t position)
{
    const struct segment *s = r->segment;
    while (s->end <= position)
        s = s->next;
    return s->slots + (position - s->first) * SLOT_WORDS;
}

void segments_drop(struct drain *d, struct ring *r, bool all)
{
    while (r->segment && (all || r->segment->end <= r->done.position)) {
        struct segment *s = r->segment;
        r->segment = s->next;
        d->spilling -= s->bytes;
        munmap(s->map, s->bytes);
        unlink(s->path);
        free(s->path);
        free(s);
    }
    if (!r->segment)
        r->spilled = 0;
}

/* Takes over `map`. False: no memory, or it does not go on where the last one ends. */
static bool segment_append(struct drain *d, struct ring *r, const char *path, void *map, size_t bytes)
{
    const struct header *header = map;
    struct segment **end = &r->segment;
    while (*end)
        end = &(*end)->next;
    struct segment *s = calloc(1, sizeof *s);
    char *name = strdup(path);
    if (!s || !name || (r->segment && header->first != r->spilled)) {
        free(s);
        free(name);
        munmap(map, bytes);
        return false;
    }
    s->first = header->first;
    s->end = header->end;
    s->map = map;
    s->bytes = bytes;
    s->slots = (const uint64_t *)((const char *)map + HL_PAGE);
    s->path = name;
    *end = s;
    r->spilled = s->end;
    d->spilling += bytes;
    return true;
}

/* Where the ring's copy may end: in front of the first slot that is not final, and behind a whole event. */
static uint64_t final_slots(const struct ring *r, uint64_t from, uint64_t head)
{
    uint64_t end = from;
    for (uint64_t position = from; position < head; position++) {
        uint64_t w0 = load(slot_at(r, position));
        if (!is_written(r, position, w0) || !(w0 & W0_DONE))
            break;
        if (!(w0 & W0_MORE))
            end = position + 1;
    }
    return end;
}

static bool write_all(int fd, const void *data, size_t bytes)
{
    for (const char *at = data; bytes;) {
        ssize_t wrote = write(fd, at, bytes);
        if (wrote < 0 && errno == EINTR)
            continue;
        if (wrote <= 0)
            return false;
        at += wrote;
        bytes -= (size_t)wrote;
    }
    return true;
}

/* Written rather than mapped and copied: that would cost a page fault for every 4 KB. Mapped to be read later. */
static void *segment_make(const char *path, const struct header *header, const struct ring *r)
{
    static const char zeros[HL_PAGE - sizeof *header];
    uint64_t count = header->end - header->first, at = header->first & (r->capacity - 1);
    uint64_t straight = r->capacity - at < count ? r->capacity - at : count;
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0)
        return NULL;
    void *map = MAP_FAILED;
    if (write_all(fd, header, sizeof *header) && write_all(fd, zeros, sizeof zeros) &&
        write_all(fd, r->slots + at * SLOT_WORDS, straight * SLOT_BYTES) &&
        write_all(fd, r->slots, (count - straight) * SLOT_BYTES))
        map = mmap(NULL, HL_PAGE + count * SLOT_BYTES, PROT_READ, MAP_SHARED, fd, 0);
    close(fd);
    if (map != MAP_FAILED)
        return map;
    unlink(path);
    return NULL;
}

static bool spill_ring(struct drain *d, struct ring *r, uint64_t limit)
{
    uint64_t from = r->spilled > r->page->tail ? r->spilled : r->page->tail;
    uint64_t head = load(&r->page->head);
    if (head - from > r->capacity || r->open_count)
        return false;
    uint64_t end = final_slots(r, from, head), count = end - from;
    size_t bytes = HL_PAGE + count * SLOT_BYTES;
    if (count < r->capacity / 8 || d->spilling + bytes > limit)
        return false;
    char whole[4200], path[sizeof whole + 4];
    snprintf(whole, sizeof whole, "%s.%x.%llx", d->spill_prefix, r->page->index, (unsigned long long)from);
    snprintf(path, sizeof path, "%s.new", whole);
    const struct header header = {MAGIC, r->page->index, from, end};
    void *map = segment_make(path, &header, r);
    if (!map)
        return false;
    if (rename(path, whole) < 0) {
        munmap(map, bytes);
        unlink(path);
        return false;
    }
    if (!segment_append(d, r, whole, map, bytes))
        return false;
    d->totals.spilled_bytes += count * SLOT_BYTES;
    ring_release(r);
    return true;
}

bool drain_spill(struct drain *d, double least, uint64_t limit)
{
    bool done = false;
    find_rings(d);
    pthread_mutex_lock(&d->lock);
    for (uint32_t i = 0; i < d->ring_count && d->spill_prefix; i++) {
        struct ring *r = d->ring[i];
        if (r && (double)(load(&r->page->head) - r->page->tail) >= least * r->capacity)
            done |= spill_ring(d, r, limit);
    }
    pthread_mutex_unlock(&d->lock);
    return done;
}

int drain_set_spill(struct drain *d, const char *prefix)
{
    free(d->spill_prefix);
    d->spill_prefix = strdup(prefix);
    return d->spill_prefix ? 0 : ENOMEM;
}

bool drain_add_segment(struct drain *d, const char *path)
{
    size_t bytes = 0;
    const char *why;
    find_rings(d);
    char *map = map_file(path, HL_PAGE, &bytes, &why);
    if (!map)
        return false;
    const struct header *header = (const struct header *)map;
    struct ring *r = header->ring < d->ring_count ? d->ring[header->ring] : NULL;
    bool good = !memcmp(header->magic, MAGIC, 8) && r && header->end > header->first &&
                header->end - header->first <= DRAIN_SLOTS_MAX &&
                bytes >= HL_PAGE + (header->end - header->first) * SLOT_BYTES && header->first <= r->page->tail &&
                header->end <= r->page->tail + r->capacity && header->end > r->at.position &&
                (r->segment || header->first <= r->at.position);
    if (!good) {
        munmap(map, bytes);
        return false;
    }
    return segment_append(d, r, path, map, bytes);
}
