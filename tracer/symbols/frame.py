"""What a symbolized address looks like."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Frame:
    """One function that was executing at an address.

    `function` is demangled already, `""` where nothing is known. `file` is the path as the compiler recorded it
    (compilation folder, include folder and name joined, not normalised: the same text `addr2line` prints). `line`
    counts from 1; None where the compiler attributed the instruction to no line.
    """

    function: str
    file: str | None
    line: int | None
    inlined: bool
