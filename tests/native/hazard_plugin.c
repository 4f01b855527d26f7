/*
 * A plugin for hazard_place.c. Allocates in its constructor and when asked; has thread-local memory of its own that is reached the
 * short way (initial-exec), so that it must fit in what the loader keeps in reserve. NAME: what plugin_name returns.
 */
#include <stdlib.h>
#include <string.h>

#ifndef NAME
#define NAME "plugin"
#endif

static __thread char local[1024] __attribute__((tls_model("initial-exec")));
static void *kept;

__attribute__((constructor)) static void loaded(void) { kept = malloc(0x1111); }
__attribute__((destructor)) static void unloaded(void) { free(kept); }

void *plugin_block(size_t size)
{
    local[0]++;
    return malloc(size);
}

void plugin_free(void *block) { free(block); }
char *plugin_text(void) { return strdup("a text of the plugin's, for its host to free"); }

/* A host may have a function of this name too (-DCOMMON): which one answers is what RTLD_DEEPBIND decides. */
const char *common_name(void) { return NAME; }
const char *plugin_name(void) { return common_name(); }
