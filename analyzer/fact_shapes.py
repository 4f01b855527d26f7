"""What stored results have to look like before they are believed: a trace file may come from anywhere.

A shape is a type, a list of one shape, a tuple of shapes (a list of exactly these), a dict of shapes (other keys may
stand beside), `Optional_` of one, or `Map` of one (a dict with any keys). A result that does not fit is made anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Optional_:  # noqa: N801
    shape: Any


@dataclass(frozen=True, slots=True)
class Map:
    shape: Any


_STACK = (int, int)
_PIN = Optional_({"address": int, "bytes": int, "time_ns": int, "stack": _STACK})
_HOLE = {
    "kind": str,
    "address": int,
    "bytes": int,
    "resident_bytes": int,
    "reclaimable_bytes": int,
    "held_by": str,
    "pin": _PIN,
    "freed": [(int, int, int)],
}
_EXAMPLE = {"seq": int, "kind": int, "expected": int, "observed": int, "reason": str}
_AGREEMENT = (
    "predicted",
    "exact",
    "reordered",
    "forced",
    "adopted_bases",
    "word_mismatches",
    "unknown_frees",
    "syscalls_predicted",
)
#: Of a sampled process only the first two are known.
_UNSAMPLED_HEAP = ("heap_bytes", "mmapped_bytes", "hole_bytes", "cached_bytes", "top_bytes")
_HEAP = dict.fromkeys(("live_bytes", "live_blocks"), int) | dict.fromkeys(_UNSAMPLED_HEAP, Optional_(int))
_AMOUNT = (int, int, int, int)
_PLACE = {"name": str, "function": str, "file": Optional_(str), "line": Optional_(int), "module": str, "stack": _STACK}
_AMOUNTS = dict.fromkeys(("allocated", "released", "live"), _AMOUNT) | {"temporary": Optional_(_AMOUNT)}

ANALYSIS = {
    "agreement": dict.fromkeys(_AGREEMENT, int) | {"forced_examples": [_EXAMPLE]},
    "reasons": Map(int),
    "profile": str,
    "confirmed": bool,
    "events": int,
    "peak_live_bytes": int,
    "peak_live_ns": int,
    "peak_live_error": int,
    "sample_bytes": int,
    "heap": _HEAP,
    "snapshots": [int],
    "damaged_events": int,
}
LEDGER = {
    "resident_bytes": int,
    "unexplained_bytes": int,
    "estimated": bool,
    "owners": [
        {
            "kind": str,
            "name": str,
            "rss_bytes": int,
            "bytes": Optional_(int),
            "blocks": Optional_(int),
            "stack": _STACK,
        }
    ],
    "sites": [
        {
            **_PLACE,
            **dict.fromkeys(("rss_bytes", "bytes", "blocks", "rss_error", "bytes_error", "blocks_error"), int),
        }
    ],
    "other_sites": dict.fromkeys(("rss_bytes", "bytes", "blocks", "sites"), int),
    "heap": _HEAP,
    "swap_bytes": int,
    "maps": {"compared": int, "exact": int, "differences": [str]},
    "notes": [str],
}
HOLES = {
    "count": int,
    "total_bytes": int,
    "total_resident_bytes": int,
    "total_reclaimable_bytes": int,
    "holes_below_pin_bytes": int,
    "holes": [_HOLE],
    "top": Optional_(_HOLE),
    "break_pin": _PIN,
    "freed": [(int, int, int)],
    "places": [_PLACE],
    "pins": [{"stack": _STACK, "holes": int, "bytes": int, "resident_bytes": int, "reclaimable_bytes": int}],
}
LEAKS = {
    "groups": [
        {
            "stack": _STACK,
            "inherited": bool,
            "bytes": int,
            "blocks": int,
            "bytes_error": int,
            "blocks_error": int,
            "oldest_ns": int,
            "newest_ns": int,
            "fingerprint": str,
        }
    ],
    "stacks": int,
    "own": _AMOUNT,
    "inherited": _AMOUNT,
}
LIFETIMES = {
    **_AMOUNTS,
    "count": int,
    "sites": [{**_PLACE, **_AMOUNTS, "freed_at": [{**_PLACE, "released": _AMOUNT}], "freed_at_count": int}],
}
#: The first part of a fact's name → its shape.
SHAPES: dict[str, Any] = {
    "analysis": ANALYSIS,
    "ledger": LEDGER,
    "holes": HOLES,
    "leaks": LEAKS,
    "lifetimes": LIFETIMES,
}


def fits(value: Any, shape: Any) -> bool:
    """Whether `value`, as JSON gave it, has this shape. True and False are no integers here."""
    if isinstance(shape, Optional_):
        return value is None or fits(value, shape.shape)
    if isinstance(shape, Map):
        return isinstance(value, dict) and all(fits(v, shape.shape) for v in value.values())
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(k in value and fits(value[k], s) for k, s in shape.items())
    if isinstance(shape, tuple):
        return isinstance(value, list | tuple) and len(value) == len(shape) and all(map(fits, value, shape))
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(v, shape[0]) for v in value)
    return type(value) is shape


def is_sound(name: str, value: Any) -> bool:
    """Whether a stored fact can be worked with."""
    shape = SHAPES.get(name.partition(".")[0])
    return shape is not None and fits(value, shape)
