"""The waterfall and the table beside it: they balance, whatever the report holds."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from heapledger.web.views.kinds import KINDS
from heapledger.web.views.ledger import SITE_BARS, TABLE_ROWS, ledger_view

Owner = dict[str, Any]


def owner(kind: str, size: int, name: str = "", **more: Any) -> Owner:
    return {"kind": kind, "name": name, "rss_bytes": size, "share": 0.0, **more}


def report(owners: list[Owner], difference: int = 0) -> dict[str, Any]:
    pages = sum(o["rss_bytes"] for o in owners)
    unexplained = sum(o["rss_bytes"] for o in owners if o["kind"] == "unexplained")
    return {
        "at": "exit",
        "rss_bytes": pages + difference,
        "smaps_difference_bytes": difference,
        "unexplained_bytes": unexplained,
        "owners": owners,
    }


owners_lists = st.lists(
    st.builds(
        owner,
        st.sampled_from([*KINDS, "a_kind_of_the_future"]),
        st.integers(min_value=0, max_value=2**40),
        st.text(max_size=20),
    ),
    max_size=100,
)


@given(owners_lists)
def test_bars_and_rows_both_sum_to_rss(owners: list[Owner]) -> None:
    view = ledger_view(report(owners), "At exit")
    assert sum(bar.bytes for bar in view.bars) == view.total_bytes == view.owners_sum_bytes
    assert sum(row.bytes for row in view.rows) + view.hidden_bytes == view.total_bytes
    assert view.balances


@given(owners_lists)
def test_each_bar_begins_where_the_one_before_ends(owners: list[Owner]) -> None:
    view = ledger_view(report(owners), "At exit")
    end = 0.0
    for bar in view.bars:
        assert abs(bar.left - end) < 0.001
        end = bar.right
    assert not view.total_bytes or abs(end - 100) < 0.001


def test_unexplained_has_a_bar_and_a_row_even_when_it_is_zero() -> None:
    view = ledger_view(report([owner("live", 4096, "f (a.c:1)", stack=[{}])]), "At exit")
    assert [bar.bytes for bar in view.bars if bar.family == "unexplained"] == [0]
    assert [row.bytes for row in view.rows if row.kind == "unexplained"] == [0]
    assert view.bars[-1].family == "unexplained"


def test_what_smaps_counts_beyond_the_page_map_is_a_bar_of_its_own() -> None:
    view = ledger_view(report([owner("live", 40960, "f")], difference=4096), "At exit")
    assert [bar.bytes for bar in view.bars if bar.label == "smaps less pagemap"] == [4096]
    assert view.owners_sum_bytes == view.total_bytes == 45056
    assert view.balances


def test_books_that_do_not_balance_are_not_called_balanced() -> None:
    broken = report([owner("live", 4096, "f")])
    broken["rss_bytes"] += 8192
    view = ledger_view(broken, "At exit")
    assert not view.balances
    assert view.difference_bytes == 8192


def test_small_call_sites_share_a_bar_and_large_ones_have_their_own() -> None:
    owners = [owner("live", 1000 - i, f"site {i}", stack=[{"function": "f"}]) for i in range(20)]
    owners.append(owner("live", 5000, "(1,234 other call sites)", stack=[]))
    labels = [bar.label for bar in ledger_view(report(owners), "At exit").bars]
    assert labels[:SITE_BARS] == [f"site {i}" for i in range(SITE_BARS)]
    assert labels[SITE_BARS] == "Other call sites"
    assert not any("1,234" in label for label in labels)


def test_small_kinds_of_a_family_share_one_bar_behind_the_large_ones() -> None:
    owners = [owner("live", 10_000), owner("library_bss", 500), owner("library_text", 10), owner("vdso", 20)]
    bars = ledger_view(report(owners), "At exit").bars
    assert [(bar.label, bar.bytes) for bar in bars[1:3]] == [("Library bss", 500), ("Other parts of libraries", 30)]
    assert bars[2].detail == "Library code, vdso"


def test_owners_beyond_the_table_are_summed_in_one_line() -> None:
    owners = [owner("library_text", 4096, f"/lib/{i}.so") for i in range(TABLE_ROWS + 40)]
    view = ledger_view(report(owners), "At exit")
    assert view.hidden_rows == 40
    assert view.hidden_bytes == 40 * 4096
    assert [row.kind for row in view.rows].count("unexplained") == 1
