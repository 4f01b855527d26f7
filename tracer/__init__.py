"""Gets events in: looks at a program, launches it, drains its spool into a trace file, samples /proc, names addresses.

target ──▶ launch ──▶ collect ─┬─ image (spool, clock: one process's events)      ──▶ heapledger.store.writer
                               └─ watch (sample, residency, stopped: its memory)
mtrace: a log of glibc's mtrace instead · recover: a spool left by a crash · symbols/, resolve: names for addresses
"""
