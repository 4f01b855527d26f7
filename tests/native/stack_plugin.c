/* stack_plugin.c: built twice, with frames of different size at the same offsets, to be loaded at the same address. */
#ifndef FRAME_BYTES
#define FRAME_BYTES 64
#endif

int plugin_calls(void (*call)(void));

int plugin_calls(void (*call)(void))
{
    volatile char frame[FRAME_BYTES];
    frame[0] = 1;
    call();
    frame[FRAME_BYTES - 1] = 1;
    call();
    return frame[0];
}
