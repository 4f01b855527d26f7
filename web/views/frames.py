"""Call stacks as lines of text. Which frame names a site is the analyzer's business; here it is only printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heapledger.analyzer.reports.report import trimmed
from heapledger.analyzer.sites import Frame, frame_name, short_function
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
    inlined = bool(frame.get("inlined"))
    if not frame.get("function"):
        name = visible(frame_name(analyzer_frame(frame)))
        return FrameLine(shorten(name, 100), "", visible(module) or name, inlined)
    if file:
        suffix = f":{line}" if line else ""
        place, full = f"{short_path(file)}{suffix}", f"{visible(file)}{suffix}"
    else:
        place, full = visible(module.rpartition("/")[2]), visible(module)
    symbol = visible(frame["function"])
    return FrameLine(shorten(short_function(symbol), 100), place, f"{symbol}\n{full}".strip(), inlined)


#: Frames of one stack that a page prints: interpreters have hundreds, and the inner ones tell.
FRAME_LIMIT = 32


def frame_lines(stack: Sequence[Json] | None) -> tuple[FrameLine, ...]:
    """The frames, innermost first; what is cut off is said in a last line."""
    frames = stack or ()
    lines = tuple(frame_line(frame) for frame in frames[:FRAME_LIMIT])
    if len(frames) <= FRAME_LIMIT:
        return lines
    rest = f"{len(frames) - FRAME_LIMIT} outer frames"
    return (*lines, FrameLine("…", rest, f"{rest} are in the JSON", False))


#: Callers of a site that are named beside it.
CALLERS = 2


def analyzer_frame(frame: Json) -> Frame:
    """A frame of the reports' JSON as the analyzer has it."""
    return Frame(
        function=frame.get("function") or "",
        file=frame.get("file"),
        line=frame.get("line"),
        module=frame.get("module") or "",
        address=frame.get("address") or 0,
        inlined=bool(frame.get("inlined")),
        offset=frame.get("offset"),
    )


def site_position(stack: Sequence[Json] | None, site: str) -> int:
    """Index of the frame that the analyzer named `site`; 0 where none is."""
    names = (frame_name(analyzer_frame(frame)) for frame in stack or ())
    return next((index for index, name in enumerate(names) if name == site), 0)


def callers_of(stack: Sequence[Json] | None, site: str) -> str:
    """The functions that called the site, innermost first: what tells two stacks with one site apart."""
    frames = trimmed([dict(frame) for frame in stack or ()])[site_position(stack, site) + 1 :]
    named = [shorten(short_function(frame["function"]), 60) for frame in frames if frame.get("function")]
    return " ‹ ".join(named[:CALLERS])
