/* Allocations whose sums the tests know, or that it prints itself: sampled WAY [ARGUMENT]. */
#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static uint64_t state = 88172645463325252ull;

static void *volatile sink; /* or the compiler would leave out what is freed at once */

static uint64_t draw(uint64_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (state >> 11) % below;
}

/* ---- sites of known sizes ---- */

#define SITE(name, call)                                                                                               \
    __attribute__((noinline)) static void *name(void)                                                                  \
    {                                                                                                                  \
        void *block = call;                                                                                            \
        __asm__ volatile("" ::: "memory");                                                                             \
        return block;                                                                                                  \
    }

SITE(site_16, malloc(16))
SITE(site_100, malloc(100))
SITE(site_1000, calloc(10, 100))
SITE(site_7000, realloc(NULL, 7000))
SITE(site_30000, memalign(64, 30000))
SITE(site_200000, malloc(200000))

/* Prints size, how often, and where the site's function begins. */
static int way_sites(void)
{
    struct {
        void *(*call)(void);
        int size, count;
    } sites[] = {{site_16, 16, 200000}, {site_100, 100, 100000}, {site_1000, 1000, 20000}, {site_7000, 7000, 3000},
                 {site_30000, 30000, 500}, {site_200000, 200000, 100}};
    for (int round = 0; round < 100; round++)
        for (int i = 0; i < 6; i++)
            for (int k = 0; k < sites[i].count / 100; k++)
                free(sites[i].call());
    for (int i = 0; i < 6; i++)
        printf("%d %d %lx\n", sites[i].size, sites[i].count, (unsigned long)sites[i].call);
    return 0;
}

/* ---- lives of blocks ---- */

#define SLOTS 500

/* Prints at the end of the program: stdio allocates. */
static void said(const char *what, uint64_t old, uint64_t size, const void *block)
{
    static char text[4 << 20];
    static size_t length;
    if (what)
        length += (size_t)snprintf(text + length, sizeof text - length, "%s %lx %lu %lx\n", what, old, size, (unsigned long)block);
    for (size_t done = 0; !what && done < length;)
        done += (size_t)write(1, text + done, length - done);
}

/* Prints each call: what, the old block, the size, the result. A munmap that fails says where they begin. */
static int way_lives(void)
{
    void *blocks[SLOTS] = {NULL};
    munmap((void *)0x1000, 0);
    for (int i = 0; i < 20000; i++) {
        void **at = &blocks[draw(SLOTS)];
        uint64_t size = draw(20) == 0 ? draw(60000) : draw(3000), old = (uint64_t)*at;
        switch (draw(5)) {
        case 0:
            free(*at);
            said("free", old, 0, NULL);
            *at = NULL;
            break;
        case 1:
            size = draw(50) ? size : SIZE_MAX / 2;
            void *moved = realloc(*at, size + 1);
            said("realloc", old, size + 1, moved);
            *at = moved ? moved : *at;
            break;
        default:
            if (*at)
                break;
            *at = draw(2) ? malloc(size) : calloc(1, size);
            said("malloc", 0, size, *at);
        }
    }
    said(NULL, 0, 0, NULL);
    return 0;
}

/* argument: how many blocks live at a time. */
static int way_many(const char *argument)
{
    long count = atol(argument);
    void **blocks = mmap(NULL, (size_t)count * sizeof *blocks, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (long i = 0; i < count; i++)
        blocks[i] = malloc(64);
    for (long i = 0; i < count; i++)
        free(blocks[i]);
    return munmap(blocks, (size_t)count * sizeof *blocks);
}

/* ---- threads that free each other's blocks ---- */

static void *volatile shared[256];

static void *thread(void *seed)
{
    uint64_t x = (uint64_t)seed;
    for (int i = 0; i < 60000; i++) {
        x = x * 6364136223846793005ull + 1442695040888963407ull;
        void *old = __atomic_exchange_n(&shared[x >> 56], NULL, __ATOMIC_SEQ_CST);
        void *block = (x >> 40 & 3) ? malloc((x >> 30 & 511) + 1) : realloc(old, (x >> 30 & 511) + 1);
        if (x >> 40 & 3)
            free(old);
        free(__atomic_exchange_n(&shared[x >> 48 & 255], block, __ATOMIC_SEQ_CST));
    }
    return NULL;
}

static int way_threads(void)
{
    pthread_t threads[4];
    for (uint64_t i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, thread, (void *)(i + 1));
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    for (int i = 0; i < 256; i++)
        free(shared[i]);
    return 0;
}

/* Two children allocate the same. */
static int way_children(void)
{
    for (int i = 0; i < 3; i++)
        free(sink = malloc(5000));
    for (int child = 0; child < 2; child++)
        if (fork() == 0) {
            for (int i = 0; i < 2000; i++)
                free(sink = malloc(1000 + (size_t)i));
            exit(0);
        }
    while (wait(NULL) > 0)
        ;
    return 0;
}

int main(int argc, char **argv)
{
    const char *way = argc > 1 ? argv[1] : "";
    if (!strcmp(way, "sites"))
        return way_sites();
    if (!strcmp(way, "lives"))
        return way_lives();
    if (!strcmp(way, "many"))
        return way_many(argv[2]);
    if (!strcmp(way, "threads"))
        return way_threads();
    if (!strcmp(way, "children"))
        return way_children();
    return 3;
}
