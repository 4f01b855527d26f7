/*
 * What loads code, maps memory and asks the allocator about itself: hazard_place WHAT [PLUGIN]. What is printed must be the same with
 * and without the shim; 77 means that this user or kernel does not allow it.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <iconv.h>
#include <locale.h>
#include <malloc.h>
#include <netdb.h>
#include <pthread.h>
#include <pwd.h>
#include <regex.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *argument;
static void *volatile sink;

#define REFUSED 77

static void churn(int rounds)
{
    void *kept[64] = {0};
    for (int i = 0; i < rounds; i++) {
        free(kept[i % 64]);
        kept[i % 64] = malloc(16 + (size_t)(i * 37) % 3000);
    }
    for (int i = 0; i < 64; i++)
        free(kept[i]);
}

static void *churner(void *nothing)
{
    churn(500);
    return nothing;
}

static int run_threads(int count, void *(*routine)(void *))
{
    pthread_t threads[64];
    int made = 0;
    while (made < count && pthread_create(&threads[made], NULL, routine, NULL) == 0)
        made++;
    for (int i = 0; i < made; i++)
        pthread_join(threads[i], NULL);
    return made;
}

/* ---- plugins */

#ifdef COMMON
const char *common_name(void) { return "host"; }
#endif

struct plugin {
    void *handle;
    void *(*block)(size_t);
    void (*free_block)(void *);
    char *(*text)(void);
    const char *(*name)(void);
};

static int plugin_open(struct plugin *p, void *handle)
{
    if (!handle)
        return puts(dlerror()), 0;
    *(void **)&p->block = dlsym(handle, "plugin_block");
    *(void **)&p->free_block = dlsym(handle, "plugin_free");
    *(void **)&p->text = dlsym(handle, "plugin_text");
    *(void **)&p->name = dlsym(handle, "plugin_name");
    p->handle = handle;
    return 1;
}

/* Blocks go both ways between a plugin and its host. */
static int plugin_use(void *handle)
{
    struct plugin p;
    if (!plugin_open(&p, handle))
        return 1;
    for (int i = 0; i < 100; i++) {
        void *block = p.block(0x1357);
        void *ours = malloc(0x2468);
        memset(block, i, 0x1357);
        p.free_block(ours);
        free(block);
    }
    char *text = p.text();
    printf("%s, %s\n", text, p.name());
    free(text);
    printf("%d\n", dlclose(p.handle));
    return 0;
}

static int plugin_loaded(void) { return plugin_use(dlopen(argument, RTLD_NOW)); }
static int plugin_loaded_lazily(void) { return plugin_use(dlopen(argument, RTLD_LAZY | RTLD_GLOBAL)); }
static int plugin_bound_deeply(void) { return plugin_use(dlopen(argument, RTLD_NOW | RTLD_DEEPBIND)); }

/* Another namespace has a libc and an allocator of its own: what it gave must go back there. */
static int plugin_in_its_own_namespace(void)
{
    struct plugin p;
    if (!plugin_open(&p, dlmopen(LM_ID_NEWLM, argument, RTLD_NOW)))
        return 1;
    for (int i = 0; i < 100; i++)
        p.free_block(p.block(100 + (size_t)i));
    puts(p.name());
    churn(100);
    printf("%d\n", dlclose(p.handle));
    return 0;
}

/* Loaded, used and unloaded again and again: the same addresses, now and then of another file. PLUGIN,PLUGIN */
static int plugins_take_each_others_place(void)
{
    char paths[2][1024] = {"", ""}, *comma = strchr(argument, ',');
    snprintf(paths[0], sizeof paths[0], "%.*s", (int)(comma - argument), argument);
    snprintf(paths[1], sizeof paths[1], "%s", comma + 1);
    int same = 0;
    void *before = NULL;
    for (int i = 0; i < 40; i++) {
        struct plugin p;
        if (!plugin_open(&p, dlopen(paths[i % 2], RTLD_NOW)))
            return 1;
        same += *(void **)&p.block == before;
        before = *(void **)&p.block;
        for (int k = 0; k < 20; k++)
            p.free_block(p.block(100 + (size_t)(i % 2)));
        dlclose(p.handle);
    }
    printf("%d\n", same > 30);
    return 0;
}

static void *loads(void *nothing)
{
    for (int i = 0; i < 30; i++) {
        struct plugin p;
        if (!plugin_open(&p, dlopen(argument, RTLD_NOW)))
            return nothing;
        p.free_block(p.block(100));
        dlclose(p.handle);
    }
    return nothing;
}

static int plugins_in_threads(void) { return !printf("%d\n", run_threads(4, loads)); }

/* ---- libc's own calls */

static int compare(const void *a, const void *b) { return *(const int *)a - *(const int *)b; }

static int calls_of_libc(void)
{
    static int numbers[100000];
    char *line = NULL, *made = NULL;
    size_t room = 0;
    for (int i = 0; i < 100000; i++)
        numbers[i] = (i * 7919) % 100003;
    qsort(numbers, 100000, sizeof *numbers, compare);
    FILE *file = fopen("/etc/passwd", "r");
    int lines = 0;
    while (getline(&line, &room, file) > 0)
        lines++;
    fclose(file);
    free(line);
    if (asprintf(&made, "%d %d %s", numbers[0], lines > 0, strdup("kept")) > 0)
        puts(made);
    free(made);
    regex_t expression;
    printf("%d\n", regcomp(&expression, "^(a|b)*c{2,5}[[:digit:]]+$", REG_EXTENDED));
    printf("%d\n", regexec(&expression, "ababccc42", 0, NULL, 0));
    regfree(&expression);
    iconv_t convert = iconv_open("UTF-16LE", "ISO-8859-15");
    char in[] = "\xa4 euro", out[64], *from = in, *to = out;
    size_t left = sizeof in, free_bytes = sizeof out;
    printf("%d\n", convert != (iconv_t)-1 && iconv(convert, &from, &left, &to, &free_bytes) == 0 && out[1] == 0x20);
    iconv_close(convert);
    struct passwd *root = getpwnam("root");
    puts(root ? root->pw_dir : "?");
    struct addrinfo *found = NULL, hints = {.ai_family = AF_INET, .ai_flags = AI_NUMERICHOST};
    printf("%d\n", getaddrinfo("127.0.0.1", "80", &hints, &found));
    freeaddrinfo(found);
    puts(setlocale(LC_ALL, "C.UTF-8") ? "locale" : "no locale");
    setenv("A_NEW_VARIABLE", "its value", 1);
    puts(getenv("A_NEW_VARIABLE"));
    return 0;
}

/* ---- what the allocator says of itself */

static int allocator_speaks(void)
{
    setvbuf(stdout, NULL, _IONBF, 0);
    mallopt(M_ARENA_MAX, 2);
    mallopt(M_MMAP_THRESHOLD, 1 << 20);
    void *small = malloc(100), *large = malloc(2 << 20), *aligned = aligned_alloc(4096, 8192);
    printf("%zu %zu %zu %zu\n", malloc_usable_size(small), (size_t)(malloc_usable_size(large) > 2 << 20),
           (size_t)(malloc_usable_size(aligned) >= 8192), malloc_usable_size(NULL));
    printf("%d\n", run_threads(6, churner));
    struct mallinfo2 info = mallinfo2();
    printf("%d %zu %d\n", info.arena >= info.uordblks + info.fordblks - 4096, info.hblks, info.hblkhd > 2 << 20);
    int arenas = 0;
    char *text = NULL;
    size_t length = 0;
    FILE *memory = open_memstream(&text, &length);
    printf("%d\n", malloc_info(0, memory));
    fclose(memory);
    for (char *at = text; (at = strstr(at, "<heap nr=")); at++)
        arenas++;
    printf("%d %s", arenas, strstr(text, "</malloc>"));
    free(text);
    printf("%d\n", malloc_trim(0));
    free(small);
    free(large);
    free(aligned);
    return 0;
}

/* ---- memory at places that were asked for */

static int mapped(void *hint, int flags)
{
    char *p = mmap(hint, 1 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | flags, -1, 0);
    if (p == MAP_FAILED)
        return -errno;
    memset(p, 1, 1 << 20);
    return p == hint || !hint;
}

static int maps_at_fixed_addresses(void)
{
    static const uint64_t places[] = {0x10000000, 0x100000000, 0xc000000000, 0x10000000000, 0x100000000000,
                                      0x600000000000, 0x7e8000000000, 0x7fff00000000};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++)
        printf("%d\n", mapped((void *)places[i], MAP_FIXED));
    printf("%d %d\n", mapped(NULL, MAP_32BIT), mapped(NULL, MAP_POPULATE));
    churn(3000);
    printf("%d\n", run_threads(4, churner));
    return 0;
}

/* The kernel's own choice of addresses must not depend on us. */
static int maps_where_the_kernel_likes(void)
{
    char *first = mmap(NULL, 8192, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *second = mmap(NULL, 1 << 20, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *third = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    printf("%ld %ld\n", (long)(first - second), (long)(second - third));
    void *moved = mremap(second, 1 << 20, 3 << 20, MREMAP_MAYMOVE);
    printf("%ld\n", (long)(first - (char *)moved));
    return 0;
}

static int keeps_memory_from_children(void)
{
    char *hidden = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    char *wiped = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    hidden[0] = wiped[0] = 7;
    printf("%d %d\n", madvise(hidden, 8192, MADV_DONTFORK), madvise(wiped, 8192, MADV_WIPEONFORK));
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        churn(200);
        unsigned char there;
        int gone = mincore(hidden, 4096, &there) == -1 && errno == ENOMEM;
        _exit(gone * 2 + (wiped[0] == 0));
    }
    int status = 0;
    waitpid(child, &status, 0);
    printf("%d\n", WEXITSTATUS(status));
    return 0;
}

/* ---- thread-local memory of a size that few have */

#ifdef HUGE
static __thread char huge[3 << 20];

static void *with_huge_tls(void *nothing)
{
    huge[0] = huge[sizeof huge - 1] = 1;
    churn(100);
    return nothing;
}

static int huge_thread_local(void)
{
    huge[5] = 1;
    return !printf("%d\n", run_threads(4, with_huge_tls));
}
#endif

#define ENTRY(name) {#name, name}

static const struct {
    const char *name;
    int (*run)(void);
} table[] = {
    ENTRY(plugin_loaded), ENTRY(plugin_loaded_lazily), ENTRY(plugin_bound_deeply),
    ENTRY(plugin_in_its_own_namespace), ENTRY(plugins_take_each_others_place), ENTRY(plugins_in_threads),
    ENTRY(calls_of_libc), ENTRY(allocator_speaks), ENTRY(maps_at_fixed_addresses), ENTRY(maps_where_the_kernel_likes),
    ENTRY(keeps_memory_from_children),
#ifdef HUGE
    ENTRY(huge_thread_local),
#endif
};

int main(int argc, char **argv)
{
    argument = argc > 2 ? argv[2] : NULL;
    for (size_t i = 0; argc > 1 && i < sizeof table / sizeof *table; i++)
        if (strcmp(argv[1], table[i].name) == 0)
            return table[i].run();
    return 2;
}
