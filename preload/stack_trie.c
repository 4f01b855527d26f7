/*
 * stack_trie.c: the trie of call stacks. Nodes lie in files (spool.h); here is the index from (parent, ip) to the node.
 * It is looked at when a stack is new to the table of whole stacks (stack_table.h), and it alone decides.
 *
 * The index is a row of tables, each eight times the one before, made when first needed:
 *
 *   table    an array of buckets of one cache line: eight entries, 0 = free, filled in order
 *
 *      63      48 47      32 31            0
 *     |  epoch   |   tag    |   node id     |
 *
 *   epoch    the low bits of unwind_epoch() when the node's module was last compared. Once code has been unloaded the same
 *            address can be another module's: in a new epoch the node must have the right module to be the one wanted.
 *
 * A key lives in the first table whose bucket for it had room. Entries are never removed, so two threads that look for
 * the same key walk the same way and meet at the same free entry, where one compare-and-swap decides. The loser's node
 * has been handed out already: it stays, complete, with no stack pointing to it.
 */
#include "host.h"
#include "stack.h"
#include "stack_table.h"
#include "unwind.h"

#include <stddef.h>

#define MADV_DONTNEED_NUMBER 4 /* <sys/mman.h> would declare the functions that the shim defines */

enum { TABLES = 5, ENTRIES = 8, SEGMENTS = 4096 };
struct bucket { _Alignas(64) uint64_t entry[ENTRIES]; };

/* 2^13 buckets (512 KB, 64 K nodes), 2^16, 2^19, 2^22, 2^25 (2 GB, untouched pages cost nothing). */
static struct bucket *tables[TABLES];
static struct hl_node *segments[SEGMENTS];

static uint64_t table_buckets(unsigned table) { return 1ull << (13 + 3 * table); }

static struct bucket *table_get(unsigned table)
{
    struct bucket *made, *none = NULL, *got = __atomic_load_n(&tables[table], __ATOMIC_ACQUIRE);
    if (likely(got != NULL))
        return got;
    size_t bytes = table_buckets(table) * sizeof *made;
    made = table_map(bytes);
    if (made == NULL)
        return NULL;
    if (__atomic_compare_exchange_n(&tables[table], &none, made, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
        return made;
    host_unmap(made, bytes); /* but for what the alignment took */
    return none;
}

static struct hl_node *node_at(uint32_t id)
{
    uint32_t k = id / HL_SEGMENT_NODES;
    if (k >= SEGMENTS)
        return NULL;
    struct hl_node *segment = __atomic_load_n(&segments[k], __ATOMIC_ACQUIRE);
    if (unlikely(segment == NULL)) {
        segment = spool_stack_segment(k);
        if (segment == NULL)
            return NULL;
        __atomic_store_n(&segments[k], segment, __ATOMIC_RELEASE);
    }
    return &segment[id % HL_SEGMENT_NODES];
}

static uint32_t module_of(uint64_t ip)
{
    return ip <= HL_IP_LOST ? 0 : (uint32_t)(modules_find(ip - 1) + 1);
}

/*
 * Hands out and writes a node. The reader takes a node with ip 0 for one not written yet: ip is stored last. An id whose
 * segment cannot be had stays unwritten, and so do all behind it: the counter is put back where nobody came after.
 */
static uint32_t node_make(uint32_t parent, uint64_t ip)
{
    struct hl_control *control = hl_control_page;
    if (control == NULL)
        return 0;
    uint32_t zero = 0;
    __atomic_compare_exchange_n(&control->nodes, &zero, 1, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    uint32_t id = __atomic_fetch_add(&control->nodes, 1, __ATOMIC_RELAXED);
    struct hl_node *node = id == 0 ? NULL : node_at(id);
    if (node == NULL) {
        uint32_t behind = id + 1;
        __atomic_compare_exchange_n(&control->nodes, &behind, id, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
        return 0;
    }
    node->parent = parent;
    node->module = module_of(ip);
    __atomic_store_n(&node->ip, ip, __ATOMIC_RELEASE);
    return id;
}

static uint64_t entry_of(uint32_t tag, uint32_t id)
{
    return (uint64_t)(unwind_epoch() & 0xffff) << 48 | (uint64_t)(tag & 0xffff) << 32 | id;
}

/* Does the entry lead to the node of this call? Brings its epoch up to date. */
static bool entry_is(uint64_t *at, uint64_t entry, uint32_t tag, uint32_t parent, uint64_t ip)
{
    uint64_t now = entry_of(tag, (uint32_t)entry);
    if (((entry ^ now) >> 32 & 0xffff) != 0)
        return false;
    const struct hl_node *node = node_at((uint32_t)entry);
    if (node == NULL || node->ip != ip || node->parent != parent)
        return false;
    if (likely(entry == now))
        return true;
    if (node->module != module_of(ip))
        return false;
    __atomic_compare_exchange_n(at, &entry, now, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return true;
}

static struct bucket *bucket_of(struct bucket *table, unsigned t, struct stack_state state)
{
    return &table[state.lane[0] & (table_buckets(t) - 1)];
}

void trie_prefetch(struct stack_state state)
{
    for (unsigned t = 0; t < TABLES; t++) {
        struct bucket *table = __atomic_load_n(&tables[t], __ATOMIC_RELAXED);
        if (table != NULL)
            __builtin_prefetch(bucket_of(table, t, state));
    }
}

/* Puts `made` (0: not made yet; kept for the next table if the bucket fills up) in a free entry, or finds the node. */
static uint32_t bucket_child(struct bucket *bucket, uint32_t tag, uint32_t parent, uint64_t ip, uint32_t *made,
                             bool *failed)
{
    for (unsigned i = 0; i < ENTRIES; i++) {
        uint64_t entry = __atomic_load_n(&bucket->entry[i], __ATOMIC_ACQUIRE);
        if (entry == 0) {
            if (*made == 0 && (*made = node_make(parent, ip)) == 0) {
                *failed = true;
                return 0;
            }
            if (__atomic_compare_exchange_n(&bucket->entry[i], &entry, entry_of(tag, *made), false,
                                            __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
                return *made;
        }
        if (entry_is(&bucket->entry[i], entry, tag, parent, ip))
            return (uint32_t)entry;
    }
    return 0;
}

uint32_t trie_child(uint32_t parent, uint64_t ip, struct stack_state state)
{
    uint32_t made = 0;
    bool failed = false;
    for (unsigned t = 0; t < TABLES && !failed; t++) {
        struct bucket *table = table_get(t);
        if (table == NULL)
            return made;
        uint32_t id = bucket_child(bucket_of(table, t, state), (uint32_t)(state.lane[0] >> 48), parent, ip, &made,
                                   &failed);
        if (id != 0)
            return id;
    }
    return made;
}

uint32_t trie_ancestor(uint32_t node, uint32_t steps)
{
    while (steps-- > 0) {
        const struct hl_node *at = node_at(node);
        if (at == NULL)
            return 0;
        node = at->parent;
    }
    return node;
}

unsigned trie_path(uint32_t node, uint64_t *ips, unsigned limit)
{
    unsigned count = 0;
    while (node != 0 && count < limit) {
        const struct hl_node *at = node_at(node);
        if (at == NULL)
            break;
        ips[count++] = at->ip;
        node = at->parent;
    }
    return count;
}

void trie_forget(void)
{
    for (unsigned t = 0; t < TABLES; t++)
        if (tables[t] != NULL)
            host_call3(SYS_madvise, tables[t], table_buckets(t) * sizeof(struct bucket), MADV_DONTNEED_NUMBER);
    for (unsigned k = 0; k < SEGMENTS; k++)
        segments[k] = NULL;
}
