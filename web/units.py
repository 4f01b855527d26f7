"""Figures as text. The exact value stands beside the rounded one, in an attribute: see templates/figures.html."""

from __future__ import annotations

import datetime as dt
from pathlib import PurePosixPath

UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")

#: Letters of an identifier that a table cell shows; C++ symbols run to thousands.
LABEL_LIMIT = 160


def format_bytes(count: int) -> str:
    """Three significant digits and a binary unit.

    >>> [format_bytes(n) for n in (0, 1023, 1536, 300_000_000, -4096)]
    ['0 B', '1,023 B', '1.50 KiB', '286 MiB', '-4.00 KiB']
    """
    value, unit = float(abs(count)), 0
    while value >= 1023.5 and unit + 1 < len(UNITS):
        value /= 1024
        unit += 1
    sign = "-" if count < 0 else ""
    if unit == 0:
        return f"{sign}{abs(count):,} B"
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{sign}{value:,.{digits}f} {UNITS[unit]}"


def exact_bytes(count: int) -> str:
    return f"{count:,} byte{'' if count == 1 else 's'}"


def format_count(count: int) -> str:
    return f"{count:,}"


def format_share(share: float) -> str:
    """`share` of 1 in percent; something tiny is not called nothing, nor almost all called all.

    >>> [format_share(s) for s in (0, 0.0001, 0.25, 0.99999, 1)]
    ['0 %', '< 0.1 %', '25.0 %', '> 99.9 %', '100 %']
    """
    if share == 0:
        return "0 %"
    if share == 1:
        return "100 %"
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{share * 100:.1f} %"


def format_duration(ns: int | None) -> str:
    """
    >>> [format_duration(n) for n in (None, 850, 2_500_000, 1_234_567_890, 3_725_000_000_000)]
    ['not known', '850 ns', '2.50 ms', '1.23 s', '1 h 2 min']
    """
    if ns is None:
        return "not known"
    if ns < 1_000:
        return f"{ns} ns"
    if ns < 1_000_000:
        return f"{ns / 1e3:.3g} µs"
    if ns < 1_000_000_000:
        return f"{ns / 1e6:.2f} ms"
    seconds = ns / 1e9
    if seconds < 120:
        return f"{seconds:.2f} s"
    minutes = int(seconds // 60)
    if minutes < 60:
        return f"{minutes} min {int(seconds % 60)} s"
    return f"{minutes // 60} h {minutes % 60} min"


def format_date(unix_ns: int) -> str:
    """Local time, to the second; years outside of the calendar (hostile files) are called unknown."""
    try:
        moment = dt.datetime.fromtimestamp(unix_ns / 1e9).astimezone()
    except (OverflowError, OSError, ValueError):
        return "not known"
    return moment.strftime("%Y-%m-%d %H:%M:%S")


def iso_date(unix_ns: int) -> str:
    try:
        return dt.datetime.fromtimestamp(unix_ns / 1e9, tz=dt.UTC).isoformat(timespec="seconds")
    except (OverflowError, OSError, ValueError):
        return ""


def visible(text: str) -> str:
    """Control characters and bidirectional overrides shown as escapes: they could disguise what stands there."""
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, limit: int = LABEL_LIMIT) -> str:
    """Cuts the middle: the beginning of a C++ symbol names the class, its end the method."""
    text = visible(text)
    if len(text) <= limit:
        return text
    head = limit * 2 // 3
    return f"{text[:head]}…{text[-(limit - head - 1) :]}"


def short_path(path: str) -> str:
    """The last two parts of a path.

    >>> short_path("/usr/src/app/parse.c"), short_path("parse.c")
    ('app/parse.c', 'parse.c')
    """
    parts = PurePosixPath(path).parts
    return visible("/".join(parts[-2:])) if len(parts) > 2 else visible(path)
