"""Call stacks as lines of text. Which frame names a site is the analyzer's business; here it is only printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heapledger.web.units import short_path, shorten, visible

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class FrameLine:
    function: str
    #: `file.c:12`, or the module where there is no line.
    place: str
    #: The whole symbol and path, for a tooltip.
    full: str
    inlined: bool


def frame_line(frame: Json) -> FrameLine:
    file, line, module = frame.get("file") or "", frame.get("line") or 0, frame.get("module") or ""
    if file:
        suffix = f":{line}" if line else ""
        place, full = f"{short_path(file)}{suffix}", f"{visible(file)}{suffix}"
    else:
        place, full = visible(module.rpartition("/")[2]), visible(module)
    address = frame.get("address")
    unnamed = f"0x{address:x}" if isinstance(address, int) else "?"
    symbol = visible(frame.get("function") or "") or unnamed
    return FrameLine(shorten(symbol, 100), place, f"{symbol}\n{full}".strip(), bool(frame.get("inlined")))


def frame_lines(stack: Sequence[Json] | None) -> tuple[FrameLine, ...]:
    return tuple(frame_line(frame) for frame in stack or ())


def site_frame(stack: Sequence[Json] | None, function: str, file: str | None) -> FrameLine | None:
    """The stack's frame that the analyzer chose as the site; None where it is not among them."""
    for frame in stack or ():
        if (frame.get("function") or "") == function and frame.get("file") == file:
            return frame_line(frame)
    return None
