"""malloc's parameters: from the profile of a version, the tunables, and mallopt. Rules:
../shared/specs/glibc-malloc.md §12."""

from __future__ import annotations

from typing import Any

from heapledger.analyzer.glibc import cyshim as cython
from heapledger.analyzer.glibc.chunk import State, size_for
from heapledger.analyzer.glibc.constants import MMAP_THRESHOLD_MAX_BYTES, PTRDIFF_MAX, TCACHE_SLOTS
from heapledger.analyzer.glibc.fastbin import consolidate


def use_profile(s: State, profile: Any) -> None:
    """Takes over what a glibc version does (a `Profile`)."""
    s.strict_limit = profile.strict_request_limit
    s.tc_struct_size = size_for(s, profile.tcache_struct_bytes)
    s.tc_lazy = profile.tcache_lazy
    s.calloc_tcache = profile.calloc_uses_tcache
    s.memalign_tcache = profile.memalign_uses_tcache
    s.memalign_tail = profile.memalign_tail
    s.memalign_front_merges = profile.memalign_front_merges
    s.aligned_alloc_strict = profile.aligned_alloc_strict
    s.realloc_fits = profile.realloc_fits
    s.internal_tcache = profile.internal_free_uses_tcache
    s.small_to_own_bin = profile.small_to_own_bin
    s.threshold_limited = profile.threshold_limit


def use_settings(s: State, profile: Any, settings: Any) -> None:
    """Takes over the tunables a process was started with (a `Settings`)."""
    if settings.top_pad is not None:
        set_top_pad(s, _as_signed(settings.top_pad))
    if settings.mmap_threshold is not None:
        set_mmap_threshold(s, _as_signed(settings.mmap_threshold))
    if settings.trim_threshold is not None:
        set_trim_threshold(s, _as_signed(settings.trim_threshold))
    if settings.mmap_max is not None and 0 <= settings.mmap_max <= 0x7FFFFFFF:
        set_mmap_max(s, settings.mmap_max)
    if settings.tcache_max is not None and 0 <= settings.tcache_max <= 1032:
        s.tc_bins = min(TCACHE_SLOTS, size_for(s, settings.tcache_max) - 1)
    if settings.tcache_count is not None and 0 <= settings.tcache_count <= profile.tcache_count_max:
        s.tc_limit = settings.tcache_count
    if settings.tcache_unsorted_limit is not None:
        s.tc_unsorted_limit = max(0, min(settings.tcache_unsorted_limit, PTRDIFF_MAX))
    if settings.mxfast is not None and profile.mxfast_tunable:
        set_max_fast(s, _as_signed(settings.mxfast))


def _as_signed(value: int) -> int:
    """A size_t as the signed number of the same bits, kept where it can still be added to."""
    wrapped = ((value + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
    return max(-(1 << 60), min(wrapped, 1 << 60))


@cython.cfunc
@cython.inline
def unsigned(value: cython.longlong) -> cython.longlong:
    """A threshold given as a negative number is one that is never reached."""
    return value if value >= 0 else PTRDIFF_MAX


@cython.cfunc
def set_max_fast(s: State, value: cython.longlong) -> cython.longlong:
    """M_MXFAST: chunks up to (value + 8) rounded down to 16 bytes; 160 is the most allowed."""
    if value < 0 or value > 160:
        return 0
    s.max_fast = (value + 8) >> 4 if value > 7 else 0
    return 1


@cython.cfunc
def set_trim_threshold(s: State, value: cython.longlong) -> cython.longlong:
    s.trim_threshold = unsigned(value)
    s.dynamic = False
    return 1


@cython.cfunc
def set_top_pad(s: State, value: cython.longlong) -> cython.longlong:
    s.top_pad = value
    s.dynamic = False
    return 1


@cython.cfunc
def set_mmap_threshold(s: State, value: cython.longlong) -> cython.longlong:
    if s.threshold_limited and (value < 0 or value > MMAP_THRESHOLD_MAX_BYTES):
        return 0
    s.mmap_threshold = unsigned(value)
    s.dynamic = False
    return 1


@cython.cfunc
def set_mmap_max(s: State, value: cython.longlong) -> cython.longlong:
    # n_mmaps < n_mmaps_max is a comparison of ints: a negative limit is never met.
    s.mmap_max = value
    s.dynamic = False
    return 1


@cython.cfunc
def mallopt(s: State, param: cython.longlong, value: cython.longlong) -> cython.longlong:
    """What mallopt returns. Any call, even of an unknown parameter, consolidates the fastbins."""
    consolidate(s)
    # Both are C ints, whatever a log says.
    param = ((param & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
    value = ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
    if param == 1:
        return set_max_fast(s, value)
    if param == -1:
        return set_trim_threshold(s, value)
    if param == -2:
        return set_top_pad(s, value)
    if param == -3:
        return set_mmap_threshold(s, value)
    if param == -4:
        return set_mmap_max(s, value)
    return 1
