/* Writes an mtrace log through the system's own libc: every line the log format has, and some leaks. */
#include <mcheck.h>
#include <stdint.h>
#include <stdlib.h>

static void *kept[64];

__attribute__((noinline)) static void *take(size_t bytes) { return malloc(bytes); }
__attribute__((noinline)) static void *grow(void *block, size_t bytes) { return realloc(block, bytes); }

int main(void) {
    mtrace();
    for (int i = 0; i < 64; i++)
        kept[i] = take(16 + 40 * (size_t)i);
    for (int i = 0; i < 64; i += 2)
        kept[i] = grow(kept[i], 5000 + (size_t)i);
    for (int i = 0; i < 64; i += 3)
        free(kept[i]);
    void *zero = realloc(calloc(3, 7), 0); /* frees */
    void *volatile refused = malloc((size_t)1 << 62);
    void *small = realloc(NULL, 10);
    void *volatile unchanged = realloc(small, (size_t)1 << 62); /* fails: the block stays */
    void *aligned = NULL;
    int status = posix_memalign(&aligned, 64, 100);
    free(take(0));
    void *volatile empty = take(0); /* a leak of no bytes */
    muntrace();
    return status || zero || refused || unchanged || !empty;
}
