"""Numbers the mechanism files share. `_amalgamate.py` writes them into the compiled source as literals.

Sizes are in granules of 16 bytes (MALLOC_ALIGNMENT) unless the name says bytes: a chunk of 32 bytes has size 2.
"""

from __future__ import annotations

# What a chunk is; the numbers of `states.ChunkState`. 0: no chunk starts at this granule.
LIVE = 1
TCACHE = 2
FASTBIN = 3
FREE = 4
TOP = 5
FENCE = 6
TCACHE_STRUCT = 7
FOREIGN = 8

GRANULE_BYTES = 16
MIN_CHUNK = 2
MIN_BYTES = 32

# Bin b's list head is granule 2*b of the link array; chunks begin behind the heads.
FIRST = 256
UNSORTED = 2
SMALL_LIMIT = 64  # chunks below are small: 1024 bytes
FAST_SLOTS = 11  # chunk sizes 2..10 are the most that mallopt allows
TCACHE_SLOTS = 64
TCACHE_FIRST = 2  # size of a chunk in tcache bin 0
MAX_UNSORTED_ITERATIONS = 10000
CONSOLIDATION_SIZE = 4096  # 64 KiB

# Nothing larger can be mapped: 128 TiB of user address space.
ADDRESS_LIMIT_BYTES = 0x800000000000
HUGE = 0x400000000000000  # a size, in granules, that cannot be had but can still be reckoned with
REFUSED_FROM = -87  # the first request, less 2**64, that every glibc refuses
BYTES_LIMIT = 0x4000000000000000

DEFAULT_TOP_PAD_BYTES = 131072
DEFAULT_TRIM_BYTES = 131072
DEFAULT_MMAP_BYTES = 131072
MMAP_THRESHOLD_MAX_BYTES = 33554432
DEFAULT_MMAP_MAX = 65536
PTRDIFF_MAX = 0x7FFFFFFFFFFFFFFF

# Answers of the allocation functions that are not granules.
FAILED = 0
MAPPED = -1

# Where a chunk came from, so that a wrong prediction can be put back.
FROM_ARENA = 0
FROM_TCACHE = 1
FROM_FASTBIN = 2

# State of a thread's tcache.
TC_NONE = 0
TC_READY = 1
TC_OFF = 2

# Kinds of blocks outside the heap.
BLOCK_MAPPED = 1
BLOCK_ADOPTED = 2

# The system calls malloc makes.
SYS_BRK_QUERY = 0
SYS_BRK = 1
SYS_MMAP = 2
SYS_MUNMAP = 3
SYS_MREMAP = 4
SYS_MADVISE = 5

# Why a prediction gave way; the numbers of `replay.ForcedClass`.
WHY_ADDRESS = 1
WHY_SIZE = 2
WHY_OTHER_ARENA = 3
WHY_FOREIGN_BREAK = 4
WHY_OUTSIDE = 5
WHY_OVERLAP = 6
WHY_FAILED = 7
WHY_RESULT = 8
WHY_UNBACKED = 9
WHY_UNKNOWN_OLD = 10
WHY_COUNT = 11

# Kinds of events; the numbers of `store.events.Kind`.
KIND_MALLOC = 1
KIND_CALLOC = 2
KIND_REALLOC = 3
KIND_FREE = 4
KIND_MEMALIGN = 5
KIND_VALLOC = 6
KIND_PVALLOC = 7
KIND_MALLOC_TRIM = 8
KIND_MALLOPT = 9
KIND_BRK = 21
KIND_SBRK = 22
KIND_THREAD_END = 33

MAX_EXAMPLES = 100
REACH_BYTES = 0x40000000  # how far beyond the heap an observed address may lie and still be taken for its own: 1 GiB
MAX_THREADS = 4096  # threads beyond are given no tcache

FITS_NEVER = 0
FITS_TRIM_THRESHOLD = 1
FITS_16 = 2
TAIL_FREE = 0
TAIL_MERGE = 1
