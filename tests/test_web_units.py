"""Figures as text: rounded, but never misleading."""

from __future__ import annotations

import doctest
import re

from hypothesis import given
from hypothesis import strategies as st

from heapledger.web import units

FACTOR = {name: 1024**power for power, name in enumerate(units.UNITS)}


def test_the_examples_in_the_docstrings_are_true() -> None:
    result = doctest.testmod(units)
    assert result.attempted >= 4
    assert result.failed == 0


@given(st.integers(min_value=-(2**63), max_value=2**63))
def test_rounded_bytes_are_within_half_a_percent_of_the_exact_ones(count: int) -> None:
    number, unit = units.format_bytes(count).split(" ")
    assert abs(float(number.replace(",", "")) * FACTOR[unit] - count) <= 0.006 * abs(count)


@given(st.floats(min_value=0, max_value=1))
def test_a_share_is_only_called_nothing_or_all_when_it_is(share: float) -> None:
    text = units.format_share(share)
    assert (text == "0 %") == (share == 0)
    assert (text == "100 %") == (share == 1)


@given(st.text(max_size=500), st.integers(min_value=4, max_value=200))
def test_shortened_text_fits_and_holds_no_control_characters(text: str, limit: int) -> None:
    short = units.shorten(text, limit)
    assert len(short) <= limit
    assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", short)


def test_impossible_dates_are_called_unknown() -> None:
    assert units.format_date(2**63 - 1) == "not known" or units.format_date(2**63 - 1).startswith("22")
    assert units.format_date(10**25) == "not known"
    assert units.iso_date(10**25) == ""
    assert units.iso_date(0) == "1970-01-01T00:00:00+00:00"
