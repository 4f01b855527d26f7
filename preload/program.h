/* program.h: what a program that is about to be started will make of the shim, and the environment that it gets. */
#ifndef HEAPLEDGER_PROGRAM_H
#define HEAPLEDGER_PROGRAM_H

#include "host.h"

enum program_kind {
    PROGRAM_TRACEABLE,   /* or not known: what cannot be read or is no program */
    PROGRAM_STATIC,      /* nothing can be preloaded, nothing happens */
    PROGRAM_OTHER_USER,  /* setuid, setgid: the loader drops the preload by itself */
    PROGRAM_OTHER_ROOT,  /* these four do not start, or complain, with the shim in LD_PRELOAD: where it cannot be opened ... */
    PROGRAM_OTHER_LIBC,  /* ... musl ... */
    PROGRAM_OTHER_WORD,  /* ... a 32-bit program ... */
    PROGRAM_SANITIZED    /* ... or one whose sanitizer insists on being the first library */
};

/*
 * Looks at the file that exec would be given, and at its interpreter if it is a script. System calls only; a descriptor is open
 * meanwhile. Async-signal-safe, any thread, also in a vfork child; 3 KB of stack.
 */
enum program_kind program_look(int folder, const char *path);

/* Why such a program is not traced, in words; "" for one that is. */
const char *program_reason(enum program_kind kind);

/* True where the shim must be left out of LD_PRELOAD, or the program would not be as it is untraced. */
static inline bool program_needs_clean_start(enum program_kind kind)
{
    return kind >= PROGRAM_OTHER_ROOT;
}

/* An environment without the shim, in memory of our own; `list` is NULL when there was none. */
struct program_environment {
    char **list;
    size_t bytes;
};

/* A copy of `environment` whose LD_PRELOAD has no libheapledger in it (none at all, if nothing else was). */
struct program_environment program_clean_environment(char *const *environment);
void program_environment_free(struct program_environment *clean);

/* True when LD_PRELOAD in `environment` (may be NULL) names the shim; and when that file can be opened from here. */
bool program_environment_has_shim(char *const *environment);
bool program_environment_reaches_shim(char *const *environment);

/* True when LD_PRELOAD also names a sanitizer's library. */
bool program_environment_has_sanitizer(char *const *environment);

#endif
