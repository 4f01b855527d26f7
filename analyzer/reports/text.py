"""Printing: sizes, bars, tables that fit in 80 columns, and strings that cannot talk to the terminal."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_EIGHTHS = " ▏▎▍▌▋▊▉"
_SPARKS = "▁▂▃▄▅▆▇█"
_ASCII_SPARKS = "_.:-=+*#"
#: A column of text is not cut below this.
_LEAST_WIDTH = 12


def size(count: int | float | None) -> str:
    """Bytes for people: `0 B`, `999 B`, `9.0 MiB`; `not measured` for None."""
    if count is None:
        return "not measured"
    value, unit = float(count), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    # 1023.97 would be printed as 1024.0 of the smaller unit.
    if unit and abs(round(value, 1)) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{int(value):,} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def about(count: int, standard_error: int | None) -> str:
    """An estimate of bytes: `~41.2 ± 3.0 MiB`; exact ones (None) as `size` has them."""
    if standard_error is None:
        return size(count)
    unit = 0
    while count >= 1024 ** (unit + 1) and unit < len(_UNITS) - 1:
        unit += 1
    digits = 1 if unit else 0
    if 0 < standard_error / 1024**unit < 0.05:
        return f"~{size(count)} ± {size(standard_error)}"
    return f"~{count / 1024**unit:,.{digits}f} ± {standard_error / 1024**unit:,.{digits}f} {_UNITS[unit]}"


def about_count(count: int, standard_error: int | None) -> str:
    """An estimate of a number: `~1,200 ± 30`; exact ones (None) as they are."""
    return f"{count:,}" if standard_error is None else f"~{count:,} ± {standard_error:,}"


def counted(count: int, noun: str) -> str:
    """`1 block`, `2,000 blocks`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(ns: int | None) -> str:
    """Nanoseconds for people."""
    if ns is None:
        return "unknown"
    for factor, unit in ((3600e9, "h"), (60e9, "min"), (1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if abs(ns) >= factor:
            return f"{ns / factor:.3g} {unit}" if ns / factor < 1000 else f"{ns / factor:,.0f} {unit}"
    return f"{ns} ns"


def percent(share: float) -> str:
    """A share of 1; never `100 %` unless it is all, and never `0 %` unless it is nothing."""
    if share >= 1:
        return "100 %"
    if share <= 0:
        return "0 %"
    return "<0.1 %" if share < 0.001 else f"{min(share * 100, 99.9):.1f} %"


def exact_percent(part: int, whole: int) -> str:
    """`part` of `whole` in percent, with as many digits as it takes to tell it from 100."""
    if part == whole:
        return "100 %"
    for digits in (1, 2, 3, 4, 6):
        text = f"{part / whole * 100:.{digits}f}"
        if not text.startswith("100"):
            return text + " %"
    return "just under 100 %"


def safe(text: str) -> str:
    """`text` without characters that a terminal would act on, or that would reorder what is around it."""
    if text.isprintable():
        return text
    return "".join(c if _is_harmless(c) else _escaped(c) for c in text)


def _is_harmless(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shorten(text: str, width: int, *, middle: bool = False) -> str:
    """At most `width` characters; what is cut is marked by `...`."""
    if len(text) <= width:
        return text
    if width <= 3:
        return text[:width]
    if middle:
        head = (width - 3) // 2
        return text[:head] + "..." + text[len(text) - (width - 3 - head) :]
    return text[: width - 3] + "..."


class Page:
    """A console and what is needed to print a report on it."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.plain = not console.encoding.lower().startswith("utf")

    @property
    def width(self) -> int:
        return self.console.width

    def _encodable(self, text: str) -> str:
        encoding = self.console.encoding
        return text.encode(encoding, "backslashreplace").decode(encoding) if self.plain else text

    def line(self, text: str = "", style: str = "") -> None:
        """One paragraph, wrapped at the console's width."""
        self.console.print(Text(self._encodable(safe(text)), style=style), soft_wrap=False)

    def heading(self, text: str) -> None:
        self.line()
        self.line(text, style="bold")

    def notes(self, notes: Iterable[str]) -> None:
        """Limits of the figures, if there are any."""
        notes = list(dict.fromkeys(notes))
        if notes:
            self.heading("Notes")
            for note in notes:
                self.line(f"* {note}", style="yellow")

    def bar(self, share: float, width: int) -> str:
        """A bar of `share` of `width` columns; anything above nothing is seen."""
        eighths = round(min(max(share, 0.0), 1.0) * width * 8)
        if share > 0:
            eighths = max(eighths, 1)
        if self.plain:
            return "#" * max(round(eighths / 8), int(share > 0))
        return "█" * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")

    def spark(self, values: Sequence[float], top: float) -> str:
        """A line of small bars; a blank where there is nothing (or no value: a negative number)."""
        ramp = _ASCII_SPARKS if self.plain else _SPARKS
        cells = []
        for value in values:
            level = 0 if top <= 0 else min(int(value / top * len(ramp)), len(ramp) - 1)
            cells.append(" " if value <= 0 else ramp[level])
        return "".join(cells)

    def table(
        self, columns: Sequence[str], rows: Iterable[Sequence[str]], *, styles: dict[int, str] | None = None
    ) -> None:
        """Rows under small headings. A heading that begins with `>` marks a column of numbers: these are never cut.

        What does not fit is cut off the last column of text.
        """
        cells = [[self._encodable(safe(cell)) for cell in row] for row in rows]
        heads = [column.lstrip(">") for column in columns]
        widths = [max(cell_len(text) for text in column) for column in zip(heads, *cells, strict=True)]
        flexible = [i for i, column in enumerate(columns) if not column.startswith(">")]
        too_wide = sum(widths) + 2 * (len(widths) - 1) - self.width
        for index in reversed(flexible):
            cut = min(max(too_wide, 0), max(widths[index] - _LEAST_WIDTH, 0))
            widths[index] -= cut
            too_wide -= cut
        right = [column.startswith(">") for column in columns]
        if any(heads):
            self.console.print(_row(heads, widths, right, ["dim"] * len(heads)))
        row_styles = [(styles or {}).get(i, "") for i in range(len(heads))]
        for row in cells:
            self.console.print(_row(row, widths, right, row_styles))


def _row(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool], styles: Sequence[str]) -> Text:
    """One line of a table, without trailing blanks."""
    line = Text(no_wrap=True, overflow="ignore")
    for index, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        text = cell if cell_len(cell) <= width else set_cell_size(cell, width - 3) + "..."
        space = " " * (width - cell_len(text))
        line.append("  " if index else "")
        line.append(space + text if right[index] else text + space, styles[index])
    line.rstrip()
    return line
