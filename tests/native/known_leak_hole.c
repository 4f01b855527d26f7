/*
 * A leak and a pinned hole of known size. With an argument it calls malloc_trim(0) at the end: what is left of the hole
 * is then the kernel's word on what could be reclaimed.
 *
 *   heap:  | 1,000 blocks of 10,000 bytes, freed: one hole | pin: 48 bytes, live | top
 *   leak:  7 blocks of 1,234 bytes, their pointers forgotten
 */
#include <malloc.h>
#include <stdlib.h>
#include <string.h>

#define BLOCKS 1000
#define BLOCK_BYTES 10000
#define PIN_BYTES 48
#define LEAKED_BLOCKS 7
#define LEAK_BYTES 1234

static char *block[BLOCKS];
static char *volatile pin;

__attribute__((noinline)) static void leak_some(void)
{
    for (int i = 0; i < LEAKED_BLOCKS; i++)
        memset(malloc(LEAK_BYTES), 1, LEAK_BYTES); /* leak */
}

__attribute__((noinline)) static char *make_pin(void)
{
    return malloc(PIN_BYTES); /* pin */
}

int main(int argc, char **argv)
{
    (void)argv;
    leak_some();
    for (int i = 0; i < BLOCKS; i++) {
        block[i] = malloc(BLOCK_BYTES);
        memset(block[i], 2, BLOCK_BYTES);
    }
    pin = make_pin();
    memset(pin, 3, PIN_BYTES);
    for (int i = 0; i < BLOCKS; i++)
        free(block[i]);
    if (argc > 1)
        malloc_trim(0);
    /* No stdio: it would allocate. */
    return pin[PIN_BYTES - 1] == 3 ? 0 : 1;
}
