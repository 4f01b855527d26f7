"""Printing: sizes, bars and tables that fit, and strings that cannot talk to the terminal."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from heapledger.analyzer.reports.text import Page, counted, duration, exact_percent, percent, safe, shorten, size


def page(width: int = 80, encoding: str = "utf-8") -> tuple[Page, io.BytesIO]:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    return Page(Console(file=stream, width=width, highlight=False, markup=False, emoji=False)), raw


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1023, "1,023 B"), (1024, "1.0 KiB"), (1048575, "1.0 MiB"), (9 << 20, "9.0 MiB"),
     (2**63, "8.0 EiB"), (None, "not measured")],
)  # fmt: skip
def test_sizes_for_people(count: int | None, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("ns", "text"), [(0, "0 ns"), (1500, "1.5 µs"), (40_200_000, "40.2 ms"), (None, "unknown")])
def test_durations_for_people(ns: int | None, text: str) -> None:
    assert duration(ns) == text


def test_almost_all_is_never_printed_as_all() -> None:
    assert percent(1.0) == "100 %"
    assert percent(0.99999) == "99.9 %"
    assert percent(0.00001) == "<0.1 %"
    assert exact_percent(1_999_999, 2_000_000).startswith("99.99")
    assert not exact_percent(10**12 - 1, 10**12).startswith("100")


@given(st.integers(1, 10**15), st.data())
def test_an_agreement_that_is_not_complete_never_reads_100_percent(whole: int, data: st.DataObject) -> None:
    part = data.draw(st.integers(0, whole))
    assert exact_percent(part, whole).startswith("100") == (part == whole)


def test_one_is_not_many() -> None:
    assert [counted(n, "block") for n in (0, 1, 2000)] == ["0 blocks", "1 block", "2,000 blocks"]


@given(st.text())
def test_no_control_character_reaches_the_terminal(text: str) -> None:
    assert not set(safe(text)) & set(map(chr, [*range(32), 127, *range(128, 160), 0x202E, 0x2066, 0x200B]))


def test_escape_sequences_are_shown_not_obeyed() -> None:
    assert safe("a\x1b]0;evil\x07b") == "a\\x1b]0;evil\\x07b"
    assert safe("x\u202ey") == "x\\u202ey"
    out, raw = page()
    out.line("evil \x1b[31mred\x1b[0m [bold]markup[/bold]")
    assert b"\x1b" not in raw.getvalue()
    assert b"[bold]markup[/bold]" in raw.getvalue()


@given(
    st.lists(st.tuples(st.integers(0, 2**60), st.text(max_size=200), st.text(max_size=200)), max_size=6),
    st.integers(50, 120),
)
def test_tables_fit_the_width_and_never_cut_a_number(rows: list[tuple[int, str, str]], width: int) -> None:
    out, raw = page(width)
    out.table([">number", "left", "right"], [[str(n), a, b] for n, a, b in rows])
    lines = raw.getvalue().decode().split("\n")
    assert all(cell_len(line) <= width for line in lines)
    for (number, _, _), line in zip(rows, lines[1:], strict=False):
        assert line.lstrip().startswith(str(number))


def test_bars_are_as_long_as_their_share_and_something_is_never_nothing() -> None:
    out, _ = page()
    assert out.bar(1.0, 10) == "█" * 10
    assert out.bar(0.5, 10) == "█" * 5
    assert out.bar(0.0001, 10) == "▏"
    assert out.bar(0.0, 10) == ""


def test_an_ascii_terminal_gets_ascii() -> None:
    out, raw = page(encoding="ascii")
    out.line("µ → 你好")
    out.table(["", ">"], [["é", "1"]])
    out.line(out.bar(0.5, 10) + out.spark([0, 1, 2], 2))
    assert raw.getvalue().isascii()
    assert b"#####" in raw.getvalue()


def test_shortening_keeps_the_width_and_both_ends_if_asked() -> None:
    assert shorten("abcdefghij", 7) == "abcd..."
    assert shorten("abcdefghij", 7, middle=True) == "ab...ij"
    assert shorten("abc", 7) == "abc"
