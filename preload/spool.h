/*
 * spool.h: what the shim leaves for the collector. The only thing preload/ and tracer/spool.py share; tracer/spool.py
 * names these drawings, and a test compares its numbers with this file.
 *
 * A session's spool is one folder ($HEAPLEDGER_SPOOL), made by the collector. Each process image (a fork child, or
 * what an exec started) makes one folder in it, PID.N with the first N that is free, and in it:
 *
 *   control      struct hl_control, one page: who this is, the sequence counter, hand-shakes
 *   ring.K       struct hl_ring (one page) and then `capacity` slots of 32 bytes: the events of one thread at a time
 *   stacks.K     struct hl_node[HL_SEGMENT_NODES]: node i of the trie of call stacks lies in file i / HL_SEGMENT_NODES
 *   log          text, appended: one line an entry, fields separated by tabs (drawn at the end of this file)
 *   maps.start   a copy of /proc/self/smaps, made when the shim was loaded
 *
 * All but log and maps.start are allocated (posix_fallocate) before they are mapped MAP_SHARED: a full disk is an error
 * code here and never a SIGBUS later. They outlive `kill -9` of either side. No file descriptor is kept open.
 * Everything is little endian. A file is born under a name that ends in ".new" and renamed when its header is complete.
 *
 * A slot: four words of 64 bits, written by the thread that owns the ring and by nobody else.
 *
 *        63            48 47        40 39        32 31               9   8    7    6   5      0
 *   w0  |            stack id (32)                 |    span (23)     |done| lap|more| kind (6)|
 *   w1  |   excess (16)  |                    addr (48)                                        |
 *   w2  |    aux (16)    |                    size (48)                                        |
 *   w3  |      tick (24)          |           seq (40)                                         |
 *
 *   kind    HL_MALLOC ...; the meaning of addr, size, arg, arg2, word per kind is the table in store/events.py
 *   more    one or more HL_EXT slots follow and belong to this event (each has its own `more`)
 *   lap     1 while the ring is filled for the first time, then 0, 1, ...: a slot whose lap is not the expected one is
 *           not written yet (a new file is all zeros, so the first lap is 1)
 *   done    the call has returned and the slot is final. A slot that is written but not done is a call in progress: its
 *           seq, stack and arguments are good. The reader waits there.
 *   span    seq_exit - seq, or HL_SPAN_LATE: an HL_LATE slot with the same seq follows somewhere behind in this ring
 *           0: the call never returned (a signal handler left it by longjmp); then addr is no result
 *   excess  allocator results: word at addr-8 minus HL_CHUNK(size); HL_EXCESS_LATE: in the HL_LATE slot; 0 if addr is 0
 *   addr    48 bits, sign-extended by the reader (so MAP_FAILED is all ones)
 *   aux     CALLOC: nmemb if below 0xffff, else 0xffff and arg in HL_EXT;  MEMALIGN: variant << 8 | log2(alignment) if it is
 *           a power of two, else 0xffff and arg, arg2 in HL_EXT
 *   size    FREE: the word at addr-8 (0 for a null pointer). Others: as in the table; all ones: in HL_EXT
 *   seq     the low 40 bits of the entry sequence number
 *   tick    the low 24 bits of (TSC >> tick_shift), not later than the entry: see "Time" below
 *
 *   HL_EXT   w0 kind, lap, more, done (always 1: the event's own slot says when it is final);  first: w1 arg, w2 arg2, w3 size, 64 bits each;  second: w1 the `word` column
 *   HL_LATE  w0 kind, lap, done;  w1 the word at addr-8, w2 seq_exit, w3 seq (all 64 bits)
 *   HL_TIME  w0 kind, lap, done;  w1 TSC >> tick_shift, w2 the sequence counter, w3 the thread's number, all 64 bits: written first
 *            by every thread that takes a ring, and before an event that comes 2^23 or more ticks after the ring's last one, so that
 *            the short fields can be widened and a ring can hold the slots of several threads, one after another
 *
 * Example, malloc(24) = 0x55d0c0de02a0 from stack 7, entry 5, exit 6, in the first lap, word 0x21:
 *   w0 = 00000007 00000381   (stack 7 | span 1 << 9 | done | lap | kind 1)
 *   w1 = 0001 55d0c0de02a0   (word 0x21 - HL_CHUNK(24) 0x20 = 1)   w2 = 0000 000000000018   w3 = tick << 40 | 5
 *
 * Sampling. With sample_bytes above 0 an allocation of s bytes is recorded with probability 1 - exp(-s / sample_bytes), each by
 * itself (sample.h), and FREE only for blocks that were. A realloc is an end and a birth, either in the sample or not:
 *   old, new in it   HL_REALLOC as ever
 *   only the old     HL_FREE of it, from before the real call to after it; its HL_EXT slot is all zeros (or has the size)
 *   only the new     HL_REALLOC with arg 0: where it was before is not known (or it was nowhere)
 *   old, and failed  HL_REALLOC with addr 0, as ever: the old block lives on
 * HL_FREE by free has an HL_EXT slot: arg is 1 if the thread requested nothing since it was given the block, else 2 (sample.h).
 * All other kinds are recorded as ever.
 *
 * Time. Reading the TSC costs more than all the rest of a slot, so the owner reads it only for the first event of a thread, for
 * one that touches a slot whose number is 7 (mod 8), and where control.coarse is not what it was at its last reading (every
 * time while that is 0: nobody keeps it). Other events repeat the tick of the one before them in their ring. So an event's time
 * is that of one of the seven events before it in its thread, and older by no more than the collector's millisecond (four of them
 * after 16 ms in which no traced process did anything).
 *
 * Ordering. The owner reserves slots with one non-atomic xadd on `head` (a signal handler on the same thread then gets the
 * slots behind), takes the entry sequence number, writes the slot with done = 0 (its w0 last), makes the real call, takes
 * the exit number, writes the rest, and sets done. x86-64 keeps stores in order. So when the collector first reads
 * control.seq = S and then every head: each event with seq < S lies in a ring below its head.
 */
#ifndef HEAPLEDGER_SPOOL_H
#define HEAPLEDGER_SPOOL_H

#include <stdint.h>

#define HL_MAGIC_CONTROL "HLCTRL01"
#define HL_MAGIC_RING    "HLRING01"
#define HL_PAGE          4096
#define HL_SEGMENT_NODES 65536u
#define HL_SPAN_LATE     0x7fffffu
#define HL_EXCESS_LATE   0xffffu
#define HL_AUX_EXT       0xffffu
#define HL_SIZE_EXT      0xffffffffffffull

/* The chunk that malloc(n) needs: 8 bytes of overhead, rounded up to 16, at least 32. */
#define HL_CHUNK(n) ((uint64_t)(n) + 23 < 48 ? 32ull : (((uint64_t)(n) + 23) & ~15ull))

enum hl_kind {
    HL_MALLOC = 1, HL_CALLOC = 2, HL_REALLOC = 3, HL_FREE = 4, HL_MEMALIGN = 5, HL_VALLOC = 6, HL_PVALLOC = 7,
    HL_MALLOC_TRIM = 8, HL_MALLOPT = 9,
    HL_MMAP = 16, HL_MUNMAP = 17, HL_MREMAP = 18, HL_MPROTECT = 19, HL_MADVISE = 20, HL_BRK = 21, HL_SBRK = 22,
    HL_THREAD_START = 32, HL_THREAD_END = 33, HL_FORK = 34, HL_EXEC = 35, HL_DLOPEN = 36, HL_DLCLOSE = 37, HL_EXIT = 38,
    HL_TIME = 61, HL_LATE = 62, HL_EXT = 63
};

enum hl_state {
    HL_STARTING = 0,  /* being set up */
    HL_RUNNING  = 1,
    HL_HOLDING  = 2,  /* at its end (or about to exec): waits until `release` is set, at most hold_ms */
    HL_ENDED    = 3,  /* past the hold; nothing is recorded any more */
    HL_STOPPED  = 4   /* recording stopped while the program runs on: see stop_reason */
};

enum hl_stop {
    HL_STOP_NONE = 0, HL_STOP_NO_SPACE = 1, HL_STOP_NO_MEMORY = 2, HL_STOP_COLLECTOR_GONE = 3, HL_STOP_TOLD = 4,
    HL_STOP_CONFINED = 5, /* seccomp would kill the program for our system calls */
    HL_STOP_DENIED = 6    /* the spool is out of reach: another user, another root, files forbidden */
};

struct hl_control {
    char magic[8];              /*   0 */
    uint32_t version;           /*   8  1 */
    uint32_t pid;               /*  12  as the process sees itself; the folder's name has the same number */
    uint32_t ppid;              /*  16  fork child: the pid in the name of the parent's folder (the parent may be gone); else getppid */
    uint32_t parent_image;      /*  20  N of the parent's folder, for a fork child; else all ones */
    uint64_t fork_seq;          /*  24  fork child: the parent's counter at the fork; else 0 */
    uint64_t start_break;       /*  32  sbrk(0) before the first recorded call */
    uint64_t start_ns;          /*  40  CLOCK_MONOTONIC ... */
    uint64_t start_tsc;         /*  48  ... and the TSC (not shifted) at the same moment */
    uint64_t end_ns;            /*  56  the same pair again, at the hold; 0 before */
    uint64_t end_tsc;           /*  64 */
    uint32_t tick_shift;        /*  72 */
    uint32_t hold_ms;           /*  76 */
    uint32_t ring_slots;        /*  80  capacity of the first rings, a power of two; each ring says its own */
    uint32_t stop_reason;       /*  84  enum hl_stop */
    int32_t stop_errno;         /*  88 */
    uint32_t exit_how;          /*  92  at the hold: 0 exit, 1 _exit, 2 quick_exit, 3 exec */
    int32_t exit_status;        /*  96 */
    uint32_t main_tid;          /* 100 */
    uint64_t self_low;          /* 104  the shim's own anonymous memory: [self_low, self_high) holds all of it */
    uint64_t self_high;         /* 112 */
    uint64_t sample_bytes;      /* 120  mean bytes between sampled allocations (Poisson by bytes); 0 = all are recorded */

    _Alignas(128) uint32_t state; /* 128  enum hl_state, a futex */
    uint32_t rings;             /* 132  ring files made so far */
    uint32_t nodes;             /* 136  trie nodes handed out; ids 1 .. nodes-1 (a node with ip 0 is not written yet) */
    uint32_t unlogged;          /* 140  lines that could not be written to the log */
    uint64_t lost;              /* 144  events that could not be recorded */
    uint32_t unseen;            /* 152  fork children that could not make a folder of their own */
    uint32_t waits;             /* 156  how often a thread waited for room in its ring ... */
    uint64_t waited_ns;         /* 160  ... and how long, all together */

    _Alignas(128) uint32_t release; /* 256  collector: 1 = go on; a futex */
    uint32_t told;              /* 260  collector: 1 = stop recording */
    uint64_t heartbeat_ns;      /* 264  collector: CLOCK_MONOTONIC of its last round; 0 = it never came */

    _Alignas(128) uint64_t seq; /* 384  the next sequence number; starts at 1 */

    _Alignas(128) uint32_t coarse; /* 512  collector: one more every millisecond while it lives; 0 = it keeps no time */
};

struct hl_mark {                /* collector: all slots below `position` are in the trace file, and what those from there on are widened against */
    uint64_t position, tick, seq;
    uint32_t thread, pad;
};

/* FREE, not given back but never owned: made ahead for a program that puts the spool out of its own reach (generation 0). */
enum hl_ring_state { HL_RING_FREE = 0, HL_RING_OWNED = 1, HL_RING_LEFT = 2 /* owner said goodbye, may still free blocks */ };

struct hl_ring {
    char magic[8];              /*   0 */
    uint32_t index;             /*   8  K */
    uint32_t tid;               /*  12  owner; 0 = none */
    uint32_t state;             /*  16  enum hl_ring_state; the collector sets FREE once the owner is gone */
    uint32_t capacity;          /*  20 */
    uint32_t generation;        /*  24  how often this ring was taken by a thread */
    uint32_t thread;            /*  28  the thread's number in the process: 0 is main, then in order of first event */
    uint64_t thread_pointer;    /*  32  fs base: the thread's TCB */
    uint64_t stack_low;         /*  40  0 if not known */
    uint64_t stack_high;        /*  48 */
    char name[16];              /*  56  as in /proc/PID/task/TID/comm */
    char pad[56];               /*  72 */
    _Alignas(128) uint64_t head; /* 128  slots reserved since the ring was made (it never goes back; slot = head % capacity) */
    _Alignas(128) uint64_t tail; /* 256  collector: slots below are safe in the trace file, or in a file beside it, and may be used again */
    uint64_t pad1;              /* 264 */
    struct hl_mark mark[2];     /* 272  the one with the higher position holds (the other is being written, or older) */
};

struct hl_node {                /* 16 bytes */
    uint64_t ip;                /* return address, or the marks below; 0 = not written yet */
    uint32_t parent;            /* the caller's node; 0 = outermost. Always smaller than the node's own id */
    uint32_t module;            /* number of the `M` line of the module that holds ip, + 1; 0 = unknown */
};
#define HL_IP_CUT   1ull        /* the stack was deeper than the limit: frames are missing here */
#define HL_IP_LOST  2ull        /* the unwinder could not go on from here */

/*
 * log, one line each; a path has \t, \n and \\ escaped as \t \n \\:
 *   P  exe  argc  libc_version                     once, first
 *   N  namespace                                   that the pids belong to, as in /proc/self/ns/pid; not if that cannot be read
 *   A  argument                                    each argument of the command line
 *   E  NAME=value                                  each variable that matters (GLIBC_TUNABLES, MALLOC_*, LD_PRELOAD, LD_LIBRARY_PATH)
 *   M  number  seq  bias  low  high  build_id  path  a module was loaded (numbers 0, 1, ...); addresses in hex, seq decimal
 *   U  number  seq                                 it was unloaded
 *   S  text                                        what stopped the recording, in words
 */
#endif
