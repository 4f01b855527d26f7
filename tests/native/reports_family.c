/*
 * A process with every kind of memory the ledger tells apart, and a fork's child: blocks from before and after the fork,
 * large blocks, the program's own mmap with a hole, shared memory, an aligned block, a file mapping with a written page.
 * With an argument: threads that allocate (arenas that are not modelled), and whose stacks stay.
 */
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define MAPPED (1 << 20)

static void *volatile keep[8];

static void *worker(void *argument)
{
    char *block[200];
    for (int i = 0; i < 200; i++) {
        block[i] = malloc(100 + i);
        memset(block[i], 1, 100);
    }
    for (int i = 0; i < 200; i += 2)
        free(block[i]);
    return argument;
}

static void start_threads(void)
{
    pthread_t thread[2];
    for (int i = 0; i < 2; i++)
        pthread_create(&thread[i], NULL, worker, NULL);
    for (int i = 0; i < 2; i++)
        pthread_join(thread[i], NULL);
}

__attribute__((noinline)) static void map_memory(const char *self)
{
    char *own = mmap(NULL, MAPPED, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(own, 1, MAPPED / 2);
    munmap(own + 4096, 4096);
    char *shared = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    shared[0] = shared[8192] = 1;
    int file = open(self, O_RDONLY);
    char *copy = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
    copy[100] = 1;
    close(file);
    keep[0] = own;
}

int main(int argc, char **argv)
{
    map_memory("/etc/passwd");
    keep[1] = malloc(400000);
    memset(keep[1], 1, 300000);
    keep[2] = aligned_alloc(4096, 10000);
    memset(keep[2], 1, 10000);
    if (argc > 1)
        start_threads();
    pid_t child = fork();
    if (child == 0) {
        keep[3] = malloc(777);
        memset(keep[3], 1, 777);
        free(keep[2]);
        exit(5);
    }
    int status = 0;
    waitpid(child, &status, 0);
    (void)argv;
    return WEXITSTATUS(status);
}
