/* Starts THREADS short threads, AT_ONCE at a time; each makes and frees 20 blocks. */
#include <pthread.h>
#include <stdlib.h>

static void *work(void *argument)
{
    for (int i = 0; i < 20; i++) {
        void *volatile block = malloc(100 + i);
        free(block);
    }
    return argument;
}

int main(int argc, char **argv)
{
    int threads = argc > 1 ? atoi(argv[1]) : 1, at_once = argc > 2 ? atoi(argv[2]) : 1;
    pthread_t running[64];
    for (int i = 0; i < threads; i += at_once) {
        for (int j = 0; j < at_once; j++)
            if (pthread_create(&running[j], NULL, work, NULL))
                return 1;
        for (int j = 0; j < at_once; j++)
            pthread_join(running[j], NULL);
    }
    return 0;
}
