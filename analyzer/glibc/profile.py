"""What differs between glibc versions, as data.

Source of each rule: ../shared/specs/glibc-malloc.md §0, read from glibc's own malloc.c and confirmed by address-exact
runs on real libraries. A version that is not in the table takes the nearest older one and says `confirmed=False`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

#: `realloc` keeps a block that already fits: never; when the slack is at most trim_threshold; when it is below 16.
FITS_NEVER, FITS_TRIM_THRESHOLD, FITS_16 = 0, 1, 2
#: memalign gives its tail back: by an ordinary free when more than 32 bytes, or merged whenever the neighbour is free.
TAIL_FREE, TAIL_MERGE = 0, 1


@dataclass(frozen=True, slots=True)
class Profile:
    """The features of one glibc version that change addresses or system calls."""

    version: str
    tcache_struct_bytes: int = 640  #: request for the tcache heads
    tcache_lazy: bool = False  #: struct only on a tcache-sized malloc, calloc or memalign (2.42)
    calloc_uses_tcache: bool = False
    memalign_uses_tcache: bool = False
    memalign_scans_bins: bool = False  #: only 2.38; not modelled, so that version is never confirmed
    memalign_tail: int = TAIL_FREE
    memalign_front_merges: bool = False  #: front given back by merging, never into the tcache
    realloc_fits: int = FITS_NEVER
    internal_free_uses_tcache: bool = True  #: realloc's leftovers may enter the tcache (until 2.41)
    small_to_own_bin: bool = False  #: a freed small chunk goes to its own bin, not to the unsorted one (2.41)
    strict_request_limit: bool = True  #: requests above PTRDIFF_MAX fail (2.30); before: those that nearly wrap
    aligned_alloc_strict: bool = False  #: aligned_alloc refuses what is not a power of two (2.38)
    threshold_limit: bool = False  #: mallopt refuses an mmap threshold above 32 MiB (before 2.35)
    mxfast_tunable: bool = True
    hugetlb_tunable: bool = True
    tcache_count_max: int = 65535
    confirmed: bool = False  #: proven exact against the real library by this project's tests


_2_27 = Profile(
    "2.27",
    tcache_struct_bytes=576,
    strict_request_limit=False,
    threshold_limit=True,
    mxfast_tunable=False,
    hugetlb_tunable=False,
    tcache_count_max=127,
    confirmed=True,
)
_2_30 = replace(
    _2_27, version="2.30", tcache_struct_bytes=640, strict_request_limit=True, tcache_count_max=65535,
    confirmed=False,
)  # fmt: skip
_2_31 = replace(_2_30, version="2.31", mxfast_tunable=True, confirmed=True)
_2_32 = replace(_2_31, version="2.32", confirmed=False)
_2_35 = replace(_2_32, version="2.35", threshold_limit=False, hugetlb_tunable=True)
_2_36 = replace(_2_35, version="2.36", realloc_fits=FITS_NEVER, confirmed=True)
_2_37 = replace(_2_36, version="2.37", realloc_fits=FITS_TRIM_THRESHOLD, confirmed=False)
_2_38 = replace(
    _2_37, version="2.38", realloc_fits=FITS_16, memalign_uses_tcache=True, memalign_scans_bins=True,
    memalign_front_merges=True, aligned_alloc_strict=True,
)  # fmt: skip
_2_39 = replace(
    _2_38, version="2.39", memalign_scans_bins=False, memalign_tail=TAIL_MERGE, memalign_front_merges=True
)  # fmt: skip
_2_41 = replace(_2_39, version="2.41", calloc_uses_tcache=True, small_to_own_bin=True, confirmed=True)
_2_42 = replace(
    _2_41, version="2.42", tcache_struct_bytes=760, tcache_lazy=True, internal_free_uses_tcache=False, confirmed=False
)

PROFILES: tuple[Profile, ...] = (_2_27, _2_30, _2_31, _2_32, _2_35, _2_36, _2_37, _2_38, _2_39, _2_41, _2_42)

#: Versions that behave as an earlier one in everything that the table tells apart.
_SAME_AS = {"2.28": "2.27", "2.29": "2.27", "2.33": "2.32", "2.34": "2.32", "2.40": "2.39"}


def _number(version: str) -> tuple[int, int]:
    """`2.36`, `2.36-9+deb12u14` or `glibc 2.36` as (2, 36); (0, 0) where there is no number."""
    found = re.search(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def profile_for(version: str, build_id: str | None = None) -> Profile:
    """The profile of a glibc version; of the nearest one, not confirmed, where the version is unknown.

    `build_id` (hex) is for builds whose behaviour is not that of their version; none is known among those modelled.
    """
    wanted = _number(version)
    name = f"{wanted[0]}.{wanted[1]}"
    for profile in PROFILES:
        if profile.version == name:
            return profile
        if profile.version == _SAME_AS.get(name):
            return replace(profile, version=name, confirmed=False)
    if wanted == (0, 0):
        return replace(_2_36, version="unknown", confirmed=False)
    nearest = min(PROFILES, key=lambda p: (abs(_number(p.version)[1] - wanted[1]), _number(p.version)[1]))
    if wanted[0] != 2:
        nearest = PROFILES[-1] if wanted > (2, 0) else PROFILES[0]
    return replace(nearest, version=f"{wanted[0]}.{wanted[1]}", confirmed=False)
