/* Another malloc, preloaded behind the shim: each block is a mapping of its own, with nothing readable before it. */
#define _GNU_SOURCE
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static char *next = (char *)0x200000000000;

void *malloc(size_t size)
{
    size_t room = (size + 4095) & ~(size_t)4095;
    room += room ? 0 : 4096;
    char *at = __atomic_fetch_add(&next, room + 8192, __ATOMIC_SEQ_CST);
    long got = syscall(SYS_mmap, at, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return got == (long)at ? at : NULL;
}

void free(void *block)
{
    (void)block;
}

void *calloc(size_t count, size_t size)
{
    return malloc(count * size);
}

void *realloc(void *old, size_t size)
{
    void *block = malloc(size);
    if (block && old)
        memcpy(block, old, size < 4096 ? size : 4096);
    return block;
}
