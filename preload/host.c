/* host.c: all that is asked of the operating system and of libc. */
typedef int heapledger_host_unused;
