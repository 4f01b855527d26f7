/*
 * unwind_cfi.c: call frame information: CIE and FDE (LSB, "Exception Frames"), the instructions and expressions of
 * DWARF 5, sections 6.4 and 2.5. Reads the tables of loaded modules, which are taken at their word; every address that
 * an expression computes is read through unwind_read.
 */
#include "unwind.h"

#include <stddef.h>
#include <string.h>

/* ---- scalars ------------------------------------------------------------------------------------------------------ */

uint64_t cfi_uleb(const uint8_t **at)
{
    uint64_t value = 0;
    for (unsigned shift = 0;; shift += 7) {
        uint8_t byte = *(*at)++;
        if (shift < 64)
            value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80))
            return value;
    }
}

int64_t cfi_sleb(const uint8_t **at)
{
    uint64_t value = 0;
    unsigned shift = 0;
    uint8_t byte;
    do {
        byte = *(*at)++;
        if (shift < 64)
            value |= (uint64_t)(byte & 0x7f) << shift;
        shift += 7;
    } while (byte & 0x80);
    if (shift < 64 && (byte & 0x40))
        value |= ~0ull << shift;
    return (int64_t)value;
}

/* A little-endian number of `bytes` bytes, wherever it lies; moves *at behind it. */
static uint64_t take(const uint8_t **at, unsigned bytes)
{
    uint64_t value = 0;
    for (unsigned i = 0; i < bytes; i++)
        value |= (uint64_t)(*at)[i] << 8 * i;
    *at += bytes;
    return value;
}

static inline uint16_t take_u16(const uint8_t **at) { return (uint16_t)take(at, 2); }
static inline uint32_t take_u32(const uint8_t **at) { return (uint32_t)take(at, 4); }
static inline uint64_t take_u64(const uint8_t **at) { return take(at, 8); }

enum { PE_ABSPTR = 0, PE_ULEB = 1, PE_U2 = 2, PE_U4 = 3, PE_U8 = 4, PE_SLEB = 9, PE_S2 = 10, PE_S4 = 11, PE_S8 = 12,
       PE_PCREL = 0x10, PE_DATAREL = 0x30, PE_INDIRECT = 0x80, PE_OMIT = 0xff };

bool cfi_pointer(const uint8_t **at, uint8_t encoding, uintptr_t data_base, uintptr_t *value)
{
    uintptr_t base = 0;
    if (encoding == PE_OMIT)
        return false;
    switch (encoding & 0x70) {
    case 0: break;
    case PE_PCREL: base = (uintptr_t)*at; break;
    case PE_DATAREL: base = data_base; break;
    default: return false;
    }
    switch (encoding & 0x0f) {
    case PE_ABSPTR: case PE_U8: case PE_S8: *value = take_u64(at); break;
    case PE_ULEB: *value = cfi_uleb(at); break;
    case PE_SLEB: *value = (uintptr_t)cfi_sleb(at); break;
    case PE_U2: *value = take_u16(at); break;
    case PE_S2: *value = (uintptr_t)(int64_t)(int16_t)take_u16(at); break;
    case PE_U4: *value = take_u32(at); break;
    case PE_S4: *value = (uintptr_t)(int64_t)(int32_t)take_u32(at); break;
    default: return false;
    }
    if (*value != 0)
        *value += base;
    if ((encoding & PE_INDIRECT) && *value != 0)
        *value = unwind_word(*value);
    return true;
}

/* ---- CIE and FDE -------------------------------------------------------------------------------------------------- */

struct cfi_entry {
    const uint8_t *cie_program, *cie_end, *fde_program, *fde_end;
    uintptr_t pc_low, pc_bytes;
    uint64_t code_align;
    int64_t data_align;
    uint64_t return_register;
    uint8_t encoding; /* of the FDE's pointers, DW_EH_PE_ */
    bool signal;
};

/* Reads the length of a CIE or FDE, moves *at to what follows, and gives the end; NULL for the terminator. */
static const uint8_t *entry_end(const uint8_t **at)
{
    uint64_t length = take_u32(at);
    if (length == 0xffffffffu)
        length = take_u64(at);
    return length == 0 ? NULL : *at + length;
}

/* Fills in what the CIE says; *sized: an augmentation length follows in the FDE. */
static bool cie_read(const uint8_t *at, struct cfi_entry *entry, bool *sized)
{
    entry->cie_end = entry_end(&at);
    if (entry->cie_end == NULL || take_u32(&at) != 0)
        return false;
    uint8_t version = *at++;
    if (version != 1 && version != 3)
        return false;
    const char *augmentation = (const char *)at;
    at += strlen(augmentation) + 1;
    if (augmentation[0] == 'e' && augmentation[1] == 'h')
        return false; /* gcc 2 */
    entry->code_align = cfi_uleb(&at);
    entry->data_align = cfi_sleb(&at);
    entry->return_register = version == 1 ? *at++ : cfi_uleb(&at);
    entry->signal = false;
    entry->encoding = PE_ABSPTR;
    *sized = augmentation[0] == 'z';
    if (*sized) {
        uint64_t bytes = cfi_uleb(&at);
        const uint8_t *program = at + bytes;
        for (const char *letter = augmentation + 1; *letter; letter++) {
            if (*letter == 'R') {
                entry->encoding = *at++;
            } else if (*letter == 'P') {
                uint8_t personality = *at++;
                uintptr_t unused;
                if (!cfi_pointer(&at, personality & 0x7f, 0, &unused))
                    return false;
            } else if (*letter == 'L') {
                at++;
            } else if (*letter == 'S') {
                entry->signal = true;
            } else {
                break; /* unknown: the length lets us skip it, as the letters behind it */
            }
        }
        at = program;
    } else if (augmentation[0] != 0) {
        return false;
    }
    entry->cie_program = at;
    return true;
}

/* False for a CIE, the terminator, and what we cannot read. *next: the entry behind, NULL at the end. */
static bool fde_read(const uint8_t *fde, struct cfi_entry *entry, const uint8_t **next)
{
    const uint8_t *at = fde;
    bool sized;
    *next = entry->fde_end = entry_end(&at);
    if (entry->fde_end == NULL)
        return false;
    const uint8_t *here = at;
    uint32_t back = take_u32(&at);
    if (back == 0 || !cie_read(here - back, entry, &sized))
        return false;
    if (!cfi_pointer(&at, entry->encoding, 0, &entry->pc_low) ||
        !cfi_pointer(&at, entry->encoding & 0x0f, 0, &entry->pc_bytes))
        return false;
    if (sized) {
        uint64_t bytes = cfi_uleb(&at);
        at += bytes;
    }
    entry->fde_program = at;
    return true;
}

bool cfi_covers(const uint8_t *fde, uintptr_t pc, const uint8_t **next)
{
    struct cfi_entry entry;
    return fde_read(fde, &entry, next) && pc - entry.pc_low < entry.pc_bytes;
}

/* ---- the program -------------------------------------------------------------------------------------------------- */

enum { SAVED_ROWS = 8 };
struct machine {
    const struct cfi_entry *entry;
    uintptr_t pc, location;
    struct cfi_row *row, initial, saved[SAVED_ROWS];
    unsigned depth;
};

static void set_rule(struct cfi_row *row, uint64_t reg, enum cfi_how how, int64_t offset)
{
    if (reg >= UNWIND_REGISTERS)
        return; /* vector registers: nobody's address depends on them */
    row->how[reg] = (uint8_t)how;
    row->at[reg].offset = offset;
}

static void set_expression(struct cfi_row *row, uint64_t reg, enum cfi_how how, const uint8_t **at)
{
    if (reg < UNWIND_REGISTERS) {
        row->how[reg] = (uint8_t)how;
        row->at[reg].expression = *at;
    }
    uint64_t bytes = cfi_uleb(at);
    *at += bytes;
}

static void restore_rule(struct machine *machine, uint64_t reg)
{
    if (reg >= UNWIND_REGISTERS)
        return;
    machine->row->how[reg] = machine->initial.how[reg];
    machine->row->at[reg] = machine->initial.at[reg];
}

static void define_cfa(struct cfi_row *row, uint64_t reg, int64_t offset)
{
    row->cfa_is_expression = false;
    row->cfa_register = (uint32_t)reg;
    row->cfa_offset = offset;
}

/* One of the instructions whose whole byte is the opcode. The numbers are DWARF's (7.24). */
static bool extended(struct machine *machine, uint8_t op, const uint8_t **at)
{
    struct cfi_row *row = machine->row;
    int64_t data = machine->entry->data_align;
    uint64_t reg;
    switch (op) {
    case 0x00: return true; /* nop */
    case 0x01: return cfi_pointer(at, machine->entry->encoding, 0, &machine->location); /* set_loc */
    case 0x02: machine->location += *(*at)++ * machine->entry->code_align; return true;
    case 0x03: machine->location += take_u16(at) * machine->entry->code_align; return true;
    case 0x04: machine->location += take_u32(at) * machine->entry->code_align; return true;
    case 0x05: reg = cfi_uleb(at); set_rule(row, reg, CFI_OFFSET, (int64_t)cfi_uleb(at) * data); return true;
    case 0x06: restore_rule(machine, cfi_uleb(at)); return true;
    case 0x07: set_rule(row, cfi_uleb(at), CFI_UNDEFINED, 0); return true;
    case 0x08: set_rule(row, cfi_uleb(at), CFI_SAME, 0); return true;
    case 0x09: reg = cfi_uleb(at); set_rule(row, reg, CFI_REGISTER, (int64_t)cfi_uleb(at)); return true;
    case 0x0a: /* remember_state */
        if (machine->depth == SAVED_ROWS)
            return false;
        machine->saved[machine->depth++] = *row;
        return true;
    case 0x0b: /* restore_state */
        if (machine->depth == 0)
            return false;
        *row = machine->saved[--machine->depth];
        return true;
    case 0x0c: reg = cfi_uleb(at); define_cfa(row, reg, (int64_t)cfi_uleb(at)); return true;
    case 0x0d: row->cfa_is_expression = false; row->cfa_register = (uint32_t)cfi_uleb(at); return true;
    case 0x0e: row->cfa_offset = (int64_t)cfi_uleb(at); return true;
    case 0x0f: /* def_cfa_expression */
        row->cfa_is_expression = true;
        row->cfa_expression = *at;
        reg = cfi_uleb(at);
        *at += reg;
        return true;
    case 0x10: reg = cfi_uleb(at); set_expression(row, reg, CFI_EXPRESSION, at); return true;
    case 0x11: reg = cfi_uleb(at); set_rule(row, reg, CFI_OFFSET, cfi_sleb(at) * data); return true;
    case 0x12: reg = cfi_uleb(at); define_cfa(row, reg, cfi_sleb(at) * data); return true;
    case 0x13: row->cfa_offset = cfi_sleb(at) * data; return true;
    case 0x14: reg = cfi_uleb(at); set_rule(row, reg, CFI_VAL_OFFSET, (int64_t)cfi_uleb(at) * data); return true;
    case 0x15: reg = cfi_uleb(at); set_rule(row, reg, CFI_VAL_OFFSET, cfi_sleb(at) * data); return true;
    case 0x16: reg = cfi_uleb(at); set_expression(row, reg, CFI_VAL_EXPRESSION, at); return true;
    case 0x2e: (void)cfi_uleb(at); return true; /* GNU_args_size */
    case 0x2f: reg = cfi_uleb(at); set_rule(row, reg, CFI_OFFSET, -(int64_t)cfi_uleb(at) * data); return true;
    default: return false;
    }
}

/* Runs instructions until the location passes pc. */
static bool run(struct machine *machine, const uint8_t *at, const uint8_t *end)
{
    while (at < end && machine->location <= machine->pc) {
        uint8_t op = *at++, low = op & 0x3f;
        switch (op >> 6) {
        case 1: machine->location += low * machine->entry->code_align; break;
        case 2: set_rule(machine->row, low, CFI_OFFSET, (int64_t)cfi_uleb(&at) * machine->entry->data_align); break;
        case 3: restore_rule(machine, low); break;
        default:
            if (!extended(machine, op, &at))
                return false;
        }
    }
    return true;
}

bool cfi_row_at(const uint8_t *fde, uintptr_t pc, struct cfi_row *row)
{
    struct cfi_entry entry;
    struct machine machine;
    const uint8_t *next;
    if (!fde_read(fde, &entry, &next) || pc - entry.pc_low >= entry.pc_bytes || entry.return_register != UNWIND_PC)
        return false;
    memset(row, 0, sizeof *row);
    row->signal = entry.signal;
    machine.entry = &entry;
    machine.row = row;
    machine.depth = 0;
    machine.pc = ~0ull;
    machine.location = 0;
    machine.initial = *row;
    if (!run(&machine, entry.cie_program, entry.cie_end))
        return false;
    machine.initial = *row;
    machine.pc = pc;
    machine.location = entry.pc_low;
    return run(&machine, entry.fde_program, entry.fde_end);
}

/* ---- expressions -------------------------------------------------------------------------------------------------- */

enum { STACK_LIMIT = 32, STEP_LIMIT = 1000 };
struct evaluation {
    const struct unwind_registers *registers;
    struct unwind_memory *memory;
    uint64_t stack[STACK_LIMIT];
    unsigned depth;
};

static bool push(struct evaluation *e, uint64_t value)
{
    if (e->depth == STACK_LIMIT)
        return false;
    e->stack[e->depth++] = value;
    return true;
}

static bool push_register(struct evaluation *e, uint64_t reg, int64_t offset)
{
    if (reg >= UNWIND_REGISTERS || !(e->registers->known >> reg & 1))
        return false;
    return push(e, e->registers->value[reg] + (uint64_t)offset);
}

static bool dereference(struct evaluation *e, unsigned bytes)
{
    uint64_t value;
    if (e->depth < 1 || bytes < 1 || bytes > 8 || !unwind_read(e->memory, e->stack[e->depth - 1], &value))
        return false;
    e->stack[e->depth - 1] = bytes == 8 ? value : value & ((1ull << 8 * bytes) - 1);
    return true;
}

/* second OP top; false if it is not an operation of two operands, or divides by zero. */
static bool binary(uint8_t op, uint64_t second, uint64_t top, uint64_t *result)
{
    int64_t a = (int64_t)second, b = (int64_t)top;
    switch (op) {
    case 0x1a: *result = second & top; return true;
    case 0x1b: if (b == 0 || (b == -1 && a == INT64_MIN)) return false; *result = (uint64_t)(a / b); return true;
    case 0x1c: *result = second - top; return true;
    case 0x1d: if (top == 0) return false; *result = second % top; return true;
    case 0x1e: *result = second * top; return true;
    case 0x21: *result = second | top; return true;
    case 0x22: *result = second + top; return true;
    case 0x24: *result = top < 64 ? second << top : 0; return true;
    case 0x25: *result = top < 64 ? second >> top : 0; return true;
    case 0x26: *result = (uint64_t)(a >> (top < 63 ? top : 63)); return true;
    case 0x27: *result = second ^ top; return true;
    case 0x29: *result = a == b; return true;
    case 0x2a: *result = a >= b; return true;
    case 0x2b: *result = a > b; return true;
    case 0x2c: *result = a <= b; return true;
    case 0x2d: *result = a < b; return true;
    case 0x2e: *result = a != b; return true;
    default: return false;
    }
}

static bool unary(struct evaluation *e, uint8_t op, const uint8_t **at)
{
    if (e->depth < 1)
        return false;
    uint64_t *top = &e->stack[e->depth - 1];
    switch (op) {
    case 0x19: *top = (int64_t)*top < 0 ? -*top : *top; return true;
    case 0x1f: *top = -*top; return true;
    case 0x20: *top = ~*top; return true;
    case 0x23: *top += cfi_uleb(at); return true;
    default: return false;
    }
}

/* dup, drop, over, pick, swap, rot */
static bool shuffle(struct evaluation *e, uint8_t op, const uint8_t **at)
{
    uint64_t *top = e->stack + e->depth, swap;
    unsigned index;
    switch (op) {
    case 0x12: return e->depth >= 1 && push(e, top[-1]);
    case 0x13: return e->depth >= 1 && (e->depth--, true);
    case 0x14: return e->depth >= 2 && push(e, top[-2]);
    case 0x15: index = *(*at)++; return e->depth > index && push(e, top[-1 - (int)index]);
    case 0x16:
        if (e->depth < 2)
            return false;
        swap = top[-1]; top[-1] = top[-2]; top[-2] = swap;
        return true;
    case 0x17:
        if (e->depth < 3)
            return false;
        swap = top[-1]; top[-1] = top[-2]; top[-2] = top[-3]; top[-3] = swap;
        return true;
    default: return false;
    }
}

static bool constant(struct evaluation *e, uint8_t op, const uint8_t **at)
{
    switch (op) {
    case 0x03: return push(e, take_u64(at));
    case 0x08: return push(e, *(*at)++);
    case 0x09: return push(e, (uint64_t)(int64_t)(int8_t)*(*at)++);
    case 0x0a: return push(e, take_u16(at));
    case 0x0b: return push(e, (uint64_t)(int64_t)(int16_t)take_u16(at));
    case 0x0c: return push(e, take_u32(at));
    case 0x0d: return push(e, (uint64_t)(int64_t)(int32_t)take_u32(at));
    case 0x0e: case 0x0f: return push(e, take_u64(at));
    case 0x10: return push(e, cfi_uleb(at));
    default: return push(e, (uint64_t)cfi_sleb(at)); /* 0x11 */
    }
}

static bool operation(struct evaluation *e, const uint8_t **at)
{
    uint8_t op = *(*at)++;
    uint64_t reg;
    int16_t jump;
    if (op >= 0x30 && op <= 0x4f)
        return push(e, op - 0x30u);
    if (op >= 0x70 && op <= 0x8f)
        return push_register(e, op - 0x70u, cfi_sleb(at));
    if (op == 0x92) {
        reg = cfi_uleb(at);
        return push_register(e, reg, cfi_sleb(at));
    }
    if (op == 0x03 || (op >= 0x08 && op <= 0x11))
        return constant(e, op, at);
    if (op >= 0x12 && op <= 0x17)
        return shuffle(e, op, at);
    if (op == 0x06)
        return dereference(e, 8);
    if (op == 0x94)
        return dereference(e, *(*at)++);
    if (op == 0x96)
        return true; /* nop */
    if (op == 0x28 || op == 0x2f) { /* bra, skip */
        jump = (int16_t)take_u16(at);
        if (op == 0x28 && (e->depth < 1 || e->stack[--e->depth] == 0))
            return true;
        *at += jump;
        return true;
    }
    if (op == 0x19 || op == 0x1f || op == 0x20 || op == 0x23)
        return unary(e, op, at);
    if (e->depth < 2 || !binary(op, e->stack[e->depth - 2], e->stack[e->depth - 1], &e->stack[e->depth - 2]))
        return false;
    e->depth--;
    return true;
}

bool cfi_evaluate(const uint8_t *expression, const struct unwind_registers *registers, struct unwind_memory *memory,
                  const uint64_t *first, uint64_t *result)
{
    struct evaluation e;
    e.registers = registers;
    e.memory = memory;
    e.depth = 0;
    if (first != NULL)
        push(&e, *first);
    uint64_t bytes = cfi_uleb(&expression);
    const uint8_t *start = expression, *end = expression + bytes;
    for (unsigned steps = 0; expression < end; steps++)
        if (steps == STEP_LIMIT || expression < start || !operation(&e, &expression))
            return false;
    if (e.depth < 1)
        return false;
    *result = e.stack[e.depth - 1];
    return true;
}
