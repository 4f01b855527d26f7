/*
 * Threads that allocate as fast as they can, or in bursts, and count in a shared file what they have done: the oracle of what a
 * trace has to hold after a kill. argv: file, threads, bursts (0: none). File: 64 bytes a thread, the first 8 its count of calls
 * that have returned; thread T allocates blocks of 700 + T bytes.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static volatile uint64_t *counts;
static int bursts;

static void *work(void *argument)
{
    intptr_t t = (intptr_t)argument;
    void *held[64] = {0};
    for (uint64_t i = 0;; i++) {
        free(held[i % 64]);
        held[i % 64] = malloc(700 + t);
        counts[8 * t] = i + 1;
        if (bursts && i % 500 == 499)
            usleep(2000);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    int threads = argc > 2 ? atoi(argv[2]) : 1, fd = open(argv[1], O_RDWR | O_CREAT, 0600);
    bursts = argc > 3 && atoi(argv[3]);
    if (ftruncate(fd, 4096))
        return 1;
    counts = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    printf("%s %d\n", getenv("HEAPLEDGER_SPOOL"), (int)getpid());
    fflush(stdout);
    for (intptr_t t = 1; t < threads; t++) {
        pthread_t id;
        pthread_create(&id, NULL, work, (void *)t);
    }
    work(0);
}
