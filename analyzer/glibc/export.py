"""What others may know of a state: counters, and its chunks and blocks as plain lists of columns."""

from __future__ import annotations

from typing import Any

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.chunk import State, address_of, clone, new_longs, new_state, top_end
from heapledger.analyzer.glibc.constants import FIRST, GRANULE_BYTES, LIVE, WHY_COUNT
from heapledger.analyzer.glibc.options import use_profile, use_settings
from heapledger.analyzer.glibc.shadow import copy_shadow, new_shadow
from heapledger.analyzer.glibc.top import heap_address


def create(profile: Any, settings: Any, start_break: int, page: int, limit_bytes: int) -> State:
    """The state of a process that starts: profile of its libc, its tunables, its break (0: not known)."""
    s = new_state(start_break, page, limit_bytes)
    new_shadow(s)
    use_profile(s, profile)
    use_settings(s, profile, settings)
    return s


def copy(s: State) -> State:
    """An independent copy."""
    t = clone(s)
    copy_shadow(s, t)
    return t


def counters(s: State) -> dict[str, int]:
    """Agreement and place."""
    return {
        "predicted": s.predicted,
        "exact": s.exact,
        "forced": s.forced,
        "adopted_bases": s.adopted_bases,
        "word_mismatches": s.word_mismatches,
        "unknown_frees": s.unknown_frees,
        "syscalls_predicted": s.syscalls,
        "break_address": s.brk if s.base_known else 0,
        "heap_start": heap_address(s) if s.base_known else 0,
        "heap_end": top_end(s),
        "mmap_threshold": s.mmap_threshold,
        "trim_threshold": s.trim_threshold,
    }


def examples(s: State) -> list[tuple[int, int, int, int, int]]:
    """(seq, kind, expected, observed, why) of the first forced events."""
    return list(s.examples)


def reasons(s: State) -> list[int]:
    """How many events were forced, by reason: entry WHY_ADDRESS is how many for that."""
    return [s.why[i] for i in range(WHY_COUNT)]


def forget_agreement(s: State) -> None:
    """Counts from nothing."""
    s.predicted = s.exact = s.forced = s.adopted_bases = s.word_mismatches = s.unknown_frees = s.syscalls = 0
    s.why = new_longs(WHY_COUNT)
    s.examples = []


def keep_log(s: State) -> None:
    """From now on, every predicted system call is remembered."""
    s.log = []


def taken_log(s: State) -> list[tuple[int, int]]:
    """(call, length) of the predicted system calls since `keep_log`."""
    return list(s.log or [])


def chunk_count(s: State) -> int:
    """How many chunks the heap has."""
    count: cython.longlong = 0
    g: cython.longlong = FIRST
    end: cython.longlong = s.top + s.head[s.top] if s.top else FIRST
    while g < end:
        count += 1
        g += s.head[g]
    return count


def write_chunks(
    s: State,
    start: cython.long_view,
    size: cython.long_view,
    state: cython.long_view,
    requested: cython.long_view,
    stack: cython.long_view,
    seq: cython.long_view,
    time: cython.long_view,
) -> None:
    """Fills the columns (zeroed, `chunk_count` long) with every chunk of the heap by ascending address."""
    i: cython.longlong = 0
    g: cython.longlong = FIRST
    end: cython.longlong = s.top + s.head[s.top] if s.top else FIRST
    while g < end:
        start[i] = address_of(s, g)
        size[i] = s.head[g] * GRANULE_BYTES
        state[i] = s.state[g]
        if s.state[g] == LIVE:
            requested[i] = s.head[g] * GRANULE_BYTES - s.link[g + 1]
            stack[i] = s.link[g] & 0xFFFFFFFF
            seq[i] = s.when[g]
            time[i] = s.when[g + 1]
        i += 1
        g += s.head[g]


def blocks(s: State) -> list[tuple[int, int, int, int, int, int, int, int]]:
    """Blocks outside the heap: (user address, base, length, requested, stack, seq, time, kind), by ascending
    address."""
    found = []
    for i in range(s.b_mask + 1):
        if s.b_key[i]:
            found.append(
                (
                    s.b_key[i],
                    s.b_base[i],
                    s.b_length[i],
                    s.b_requested[i],
                    s.b_stack[i],
                    s.b_seq[i],
                    s.b_time[i],
                    s.b_kind[i],
                )
            )
    return sorted(found)
