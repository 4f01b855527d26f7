/* A shared object whose only function allocates; loaded and unloaded by shim_process. */
#include <stdlib.h>

void *shim_loaded_block;

void loaded(void)
{
    shim_loaded_block = malloc(0xabc);
    free(shim_loaded_block);
}
