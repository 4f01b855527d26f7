/*
 * Calls every function that the shim stands in for and prints, for each, what the shim should have recorded:
 *   kind addr size arg arg2 word     (decimal kind, the rest hexadecimal; columns as in store/events.py)
 * The program's own view is the oracle: it reads the word before a block itself. Output is buffered in static memory.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static char out[1 << 16];
static size_t used;
#define SAY(kind, addr, size, arg, arg2, word)                                                                         \
    (used += (size_t)snprintf(out + used, sizeof out - used, "%d %lx %lx %lx %lx %lx\n", kind, (unsigned long)(addr),  \
                              (unsigned long)(size), (unsigned long)(arg), (unsigned long)(arg2), (unsigned long)(word)))

static uint64_t word(const void *p) { return p ? ((const uint64_t *)p)[-1] : 0; }
static void *volatile sink;

static void done(void *p)
{
    SAY(4, p, 0, 0, 0, word(p));
    free(p);
}

static void *alloc(int kind, void *p, size_t size, uint64_t arg, uint64_t arg2)
{
    sink = p;
    SAY(kind, p, size, arg, arg2, word(p));
    return p;
}

static void *resize(void *old, size_t size)
{
    uint64_t before = word(old);
    uintptr_t number = (uintptr_t)old;
    void *p = realloc(old, size);
    SAY(3, p, size, number, before, word(p));
    return p;
}

static void blocks(void)
{
    static const size_t sizes[] = {0, 1, 24, 25, 1000, 70000, 200000, 5000000};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
        done(alloc(1, malloc(sizes[i]), sizes[i], 0, 0));
    done(alloc(2, calloc(3, 40), 120, 3, 0));
    done(alloc(2, calloc(70000, 2), 140000, 70000, 0));
    volatile size_t huge = SIZE_MAX / 2;
    alloc(2, calloc(huge, 8), SIZE_MAX, huge, 0);
    alloc(1, malloc(huge), huge, 0, 0);
    void *p = resize(NULL, 10);
    p = resize(p, 4000);
    p = resize(p, 300000);
    p = resize(p, 600000);
    p = resize(p, 20);
    uint64_t before = word(p);
    uintptr_t number = (uintptr_t)p;
    p = reallocarray(p, 7, 11);
    SAY(3, p, 77, number, before, word(p));
    sink = reallocarray(p, huge, 8); /* an overflow: nothing happens in the heap, nothing is recorded */
    resize(p, 0);
    done(NULL);
}

static void aligned(void)
{
    void *p = NULL;
    done(alloc(5, memalign(64, 100), 100, 64, 0));
    done(alloc(5, memalign(1 << 16, 9), 9, 1 << 16, 0));
    volatile size_t odd = 48;
    done(alloc(5, memalign(odd, 10), 10, 48, 0));
    done(alloc(5, aligned_alloc(256, 512), 512, 256, 1));
    if (posix_memalign(&p, 4096, 33) == 0)
        done(alloc(5, p, 33, 4096, 2));
    if (posix_memalign(&p, 24, 33) == EINVAL)
        SAY(5, 0, 33, 24, 2, 0);
    done(alloc(6, valloc(50), 50, 0, 0));
    done(alloc(7, pvalloc(50), 50, 0, 0));
}

static void mappings(void)
{
    char *p = mmap(NULL, 40960, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    SAY(16, p, 40960, 0, PROT_READ + PROT_WRITE + ((MAP_PRIVATE | MAP_ANONYMOUS) << 16), 0);
    int status = mprotect(p, 8192, PROT_READ);
    SAY(19, p, 8192, status, PROT_READ, 0);
    status = madvise(p + 8192, 4096, MADV_DONTNEED);
    SAY(20, p + 8192, 4096, status, MADV_DONTNEED, 0);
    status = mprotect((char *)1, 8192, PROT_READ);
    SAY(19, 1, 8192, (long)status, PROT_READ, 0);
    char *q = mremap(p, 40960, 81920, MREMAP_MAYMOVE);
    SAY(18, q, 81920, (uintptr_t)p, MREMAP_MAYMOVE, 40960);
    char *fixed = q + (1ul << 30);
    p = mremap(q, 81920, 81920, MREMAP_MAYMOVE | MREMAP_FIXED, fixed);
    SAY(18, p, 81920, (uintptr_t)q, MREMAP_MAYMOVE | MREMAP_FIXED, 81920);
    status = munmap(p, 81920);
    SAY(17, p, 81920, status, 0, 0);
    p = mmap64((void *)0x7000, 4096, PROT_READ, MAP_PRIVATE, 99, 8192);
    SAY(16, p, 4096, 0x7000, PROT_READ + (MAP_PRIVATE << 16), 8192);
    char *old = sbrk(0);
    SAY(22, old, 0, 0, 0, 0);
    p = sbrk(12288);
    SAY(22, p, 12288, 0, 0, 0);
    p = sbrk(-4096);
    SAY(22, p, -4096l, 0, 0, 0);
    status = brk(old);
    SAY(21, old, 0, (uintptr_t)old, 0, 0);
}

static void settings(void)
{
    int r = mallopt(M_MMAP_THRESHOLD, 1 << 20);
    SAY(9, r, 1 << 20, (long)M_MMAP_THRESHOLD, 0, 0);
    r = mallopt(M_TRIM_THRESHOLD, -1);
    SAY(9, r, -1l, (long)M_TRIM_THRESHOLD, 0, 0);
    r = mallopt(12345, -2);
    SAY(9, r, -2l, 12345, 0, 0);
    r = malloc_trim(4096);
    SAY(8, r, 4096, 0, 0, 0);
}

int main(void)
{
    sink = malloc(0x12345); /* where the test begins to compare */
    blocks();
    aligned();
    settings();
    mappings();
    return write(1, out, used) == (ssize_t)used ? 0 : 1;
}
