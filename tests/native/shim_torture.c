/* Everything at once for ARGV[2] seconds: threads, forks, dlopen of ARGV[1], a timer whose handler maps memory. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void *_Atomic exchange[256];
static volatile int stop;
static int _Atomic forks, loads, failures;

static void on_timer(int number)
{
    (void)number;
    void *p = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(p, 4096);
}

static void *churner(void *seed)
{
    unsigned state = (unsigned)(uintptr_t)seed;
    while (!stop) {
        state = state * 1103515245 + 12345;
        void *p = malloc(16 + (state >> 16) % 3000);
        p = __atomic_exchange_n(&exchange[(state >> 8) % 256], p, __ATOMIC_ACQ_REL);
        if (state % 7 == 0)
            p = realloc(p, 700);
        if (state % 1001 == 0)
            free(memalign(256, state % 9000));
        free(p);
        if (state % 16 == 0)
            usleep(1);
    }
    return NULL;
}

static void *forker(void *nothing)
{
    while (!stop) {
        pid_t child = fork();
        if (child == 0) {
            free(malloc(100));
            _exit(7);
        }
        int status;
        waitpid(child, &status, 0);
        failures += !WIFEXITED(status) || WEXITSTATUS(status) != 7;
        forks++;
        usleep(10000);
    }
    return nothing;
}

static void *loader(void *path)
{
    while (!stop) {
        void *handle = dlopen(path, RTLD_NOW);
        if (handle) {
            ((void (*)(void))dlsym(handle, "loaded"))();
            dlclose(handle);
            loads++;
        }
        usleep(500);
    }
    return NULL;
}

static void *short_life(void *block)
{
    free(malloc(33));
    return block;
}

int main(int argc, char **argv)
{
    pthread_t threads[5], brief;
    struct sigaction action = {.sa_handler = on_timer, .sa_flags = SA_RESTART};
    struct itimerval every = {{0, 500}, {0, 500}}, never = {{0, 0}, {0, 0}};
    double seconds = argc > 2 ? atof(argv[2]) : 1;
    struct timespec begin, now;
    sigaction(SIGALRM, &action, NULL);
    setitimer(ITIMER_REAL, &every, NULL);
    for (uintptr_t i = 0; i < 3; i++)
        pthread_create(&threads[i], NULL, churner, (void *)(i + 1));
    pthread_create(&threads[3], NULL, forker, NULL);
    pthread_create(&threads[4], NULL, loader, argv[1]);
    clock_gettime(CLOCK_MONOTONIC, &begin);
    do {
        if (pthread_create(&brief, NULL, short_life, NULL) == 0)
            pthread_join(brief, NULL);
        usleep(2000);
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while ((double)(now.tv_sec - begin.tv_sec) + (double)(now.tv_nsec - begin.tv_nsec) / 1e9 < seconds);
    stop = 1;
    for (int i = 0; i < 5; i++)
        pthread_join(threads[i], NULL);
    setitimer(ITIMER_REAL, &never, NULL);
    printf("%d %d %d\n", forks > 0, loads > 0, failures);
    return 0;
}
