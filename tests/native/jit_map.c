/*
 * A small JIT compiler: machine code made at run time that calls malloc, and a perf map that names it.
 *
 *     jit_map HOW NAME [FOLDER]     NAME: what the map calls the function; FOLDER: where the map is (/tmp)
 *
 * The block that the code asks for has 12,345 bytes and is never freed. HOW: what becomes of program and map, see main.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef void *(*code)(size_t);

static uint8_t *pages;
static size_t used;

/* push %rbp; mov %rsp,%rbp; movabs $target,%rax; call *%rax; pop %rbp; ret: calls `target` with our own argument. */
static code compile(void *target)
{
    uint8_t made[18] = {0x55, 0x48, 0x89, 0xe5, 0x48, 0xb8, [14] = 0xff, 0xd0, 0x5d, 0xc3};
    uint8_t *at = pages + used;
    memcpy(made + 6, &target, 8);
    memcpy(at, made, sizeof made);
    used += 32;
    return (code)(uintptr_t)at;
}

static void nap(long ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&t, &t) && errno == EINTR)
        ;
}

static const char *name, *folder;
static char path[4096];

static FILE *map_open(void)
{
    snprintf(path, sizeof path, "%s/perf-%d.map", folder, (int)getpid());
    FILE *map = fopen(path, "w");
    if (map == NULL) {
        perror(path);
        exit(9);
    }
    return map;
}

static void entry(FILE *map, code function, const char *text)
{
    fprintf(map, "%lx %x %s\n", (unsigned long)(uintptr_t)function, 18, text);
}

static code allocate;
static void *volatile kept;

static void call(void)
{
    kept = allocate(12345);
}

int main(int argc, char **argv)
{
    const char *how = argv[1];
    name = argv[2];
    folder = argc > 3 ? argv[3] : "/tmp";
    pages = mmap(NULL, 1 << 16, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    code inner = compile((void *)(uintptr_t)malloc);
    allocate = compile((void *)(uintptr_t)inner);
    if (strcmp(how, "unnamed") == 0) { /* no map */
        call();
        return 0;
    }
    FILE *map = map_open();
    if (strcmp(how, "late") == 0) { /* as node does: what was written before the end is in the file only after it */
        static char buffer[1 << 16];
        setvbuf(map, buffer, _IOFBF, sizeof buffer);
        entry(map, inner, name);
        call();
        return 0;
    }
    if (strcmp(how, "reuse") == 0)
        fprintf(map, "%lx %x %s\n", (unsigned long)(uintptr_t)pages, 1 << 16, "older");
    entry(map, inner, name);
    entry(map, allocate, "outer");
    fclose(map);
    call();
    if (strcmp(how, "unlink") == 0) {
        nap(500); /* time to be looked at */
        unlink(path);
    } else if (strcmp(how, "kill") == 0) {
        nap(500);
        raise(SIGKILL);
    } else if (strcmp(how, "fork") == 0) { /* the child runs its parent's code; it has no map of its own */
        if (fork() == 0) {
            call();
            exit(0);
        }
        wait(NULL);
    } else if (strcmp(how, "exec") == 0) { /* the next program writes another map to the same file */
        execl("/proc/self/exe", argv[0], "exit", "second", folder, NULL);
        return 8;
    }
    return 0;
}
