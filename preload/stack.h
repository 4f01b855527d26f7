/*
 * stack.h: the call stack of a hook's caller, as a node of the trie in stacks.K (spool.h: struct hl_node).
 *
 *   stack.c        walks the stack: memo, previous stack, rules
 *   stack_full.c   what is rare: walks with all registers, captures inside captures, uncommon steps
 *   stack_state.h  what a thread remembers
 *   stack_table.h  whole stack -> node
 *   stack_trie.c   (parent, ip) -> node
 *   unwind.h       one step
 *
 * A node's ip is a return address, or pc + 1 for a frame that a signal interrupted: ip - 1 is always inside the
 * instruction that was executing.
 */
#ifndef HEAPLEDGER_STACK_H
#define HEAPLEDGER_STACK_H

#include <stdbool.h>
#include <stdint.h>

/*
 * The node of the stack whose innermost frame is `ip`, a return address into the program, with rsp = sp once that return
 * is done and rbp = bp. 0 if there is none (no control page, no memory). Exact: the same as a full unwind at this
 * moment. Async-signal-safe, no lock, errno untouched, no memory of the program's allocator.
 */
uint32_t stack_capture(uintptr_t ip, uintptr_t sp, uintptr_t bp);

/* Once, before stack_capture and not from a signal handler. max_depth: frames kept, 1 to 4096. 0, or -1: no memory (then
 * every stack is 0). */
int stack_init(unsigned max_depth);

/* Code was unloaded or loaded: forget what was learned of it. Call after dlclose returns (and before, if another thread
 * may load at the same address meanwhile), and after dlopen. Any thread, lock-free. */
void stack_flush(void);

/* Forgets the stacks seen (not the rules for code, and no nodes): the next capture of each thread is a whole walk. For
 * benchmarks and tests. */
void stack_forget(void);

/* In a fork child, before its first stack_capture: the image is a new one, forget all nodes. Only one thread runs. */
void stack_fork_child(void);

/* Optional, at a thread's start: makes its state now rather than in its first capture. */
void stack_thread_init(void);

/* How captures of this thread went; for benchmarks and tests. */
struct stack_counters {
    uint64_t captures;
    uint64_t hits;       /* the memo or the previous walk had it, and every word it depends on was the same */
    uint64_t rejoined;   /* walked until the previous stack, and the rest of that was the same */
    uint64_t walked;     /* walked to the end by rules */
    uint64_t full;       /* walked with all registers */
    uint64_t nested;     /* a signal handler inside a capture */
    uint64_t lost;       /* ended in HL_IP_LOST */
    uint64_t frames;     /* steps taken by rules */
    uint64_t added;      /* stacks that the table did not know */
    uint64_t compared;   /* with libgcc's; in the check build */
    uint64_t exhausted;  /* no memory for a node: the id is that of the callers known, or 0 */
};
bool stack_counters(struct stack_counters *counters);

/* ---- stack_trie.c ---- */

/* A stack as a number: stack_table.h. */
struct stack_state { uint64_t lane[2]; };

/* The node for a call at `ip` under `parent`, made if it is new; `state` is that of the stack with it. 0: out of memory, or
 * ids (the caller counts). Any thread, async-signal-safe, lock-free; two threads get the same node. */
uint32_t trie_child(uint32_t parent, uint64_t ip, struct stack_state state);

/* Asks for the lines that trie_child will read. */
void trie_prefetch(struct stack_state state);

/* The node that many callers up; 0 behind the outermost. */
uint32_t trie_ancestor(uint32_t node, uint32_t steps);

/* The frames of a node, innermost first, at most `limit`; gives how many. For checks. */
unsigned trie_path(uint32_t node, uint64_t *ips, unsigned limit);

/* Forgets all nodes (they are another image's). Only one thread runs. */
void trie_forget(void);

#endif
