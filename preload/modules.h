/* modules.h: which objects are loaded where; the M and U lines of the log. modules_find, modules_refresh: see host.h. */
#ifndef HEAPLEDGER_MODULES_H
#define HEAPLEDGER_MODULES_H

#include "host.h"

/* As glibc's struct dl_find_object (2.35): the first three members. */
struct dl_found {
    unsigned long long flags;
    void *start, *end;
    struct link_map *map;
    void *eh_frame;
    unsigned long long reserved[7];
};

/* _dl_find_object and gnu_get_libc_version of this libc, or NULL. Set by hooks_resolve. */
extern HL_HIDDEN int (*hl_find_object)(void *, struct dl_found *);
extern HL_HIDDEN const char *(*hl_libc_version)(void);

/* The number of the module that holds ip if it is in the table, else -1. Lock-free. */
int modules_find_known(uintptr_t ip);

/* Writes P, A and E lines: the first of a log. */
void modules_log_process(void);

/* A fork child's log begins with the modules it inherited, numbered anew. Single-threaded; does not ask the loader. */
void modules_log_again(void);

/* A dlopen has begun (any thread): until the next refresh an unknown address is reason enough to look. */
void modules_expect(void);
bool modules_expected(void);

/* Writes one S line. */
void modules_log_remark(const char *text, const char *path);

#endif
