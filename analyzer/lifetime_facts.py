"""Call sites by what became of their blocks, as it is stored: the fact `lifetimes` (see facts.py).

    {"allocated", "released", "temporary", "live": amount, "count": sites in all,
     "sites": [{name, function, file, line, module, "stack", "allocated", "released", "temporary", "live": amount,
                "freed_at": [{name, function, file, line, module, "stack", "released": amount}], "freed_at_count"}]}

An amount is [blocks, bytes, standard error of the blocks, of the bytes]. `temporary` is null where it is not known.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from heapledger.analyzer.facts import Names, site_words
from heapledger.analyzer.lifetimes import BLOCKS, BYTES, Amounts, Flows, Lifetimes
from heapledger.analyzer.replay import LiveTable
from heapledger.analyzer.sampling import error, weigh
from heapledger.analyzer.site_table import SiteTable

#: Call sites that are kept: the first so many by each figure.
MAX_BY_FIGURE = 400
#: Places where a call site's blocks are freed that are kept.
MAX_FREED_AT = 5


def lifetimes_fact(lifetimes: Lifetimes, live: LiveTable, names: Names) -> dict[str, Any]:
    """`live`: the process's own blocks that are live at the end."""
    table, flows = names.sites(0), lifetimes.flows()
    held = _live_by_site(live, table, lifetimes.sample_bytes)
    released = _by_site(flows.allocated_by, flows.amounts, len(table))
    temporary = _by_site(flows.allocated_by, flows.temporary, len(table))
    allocated = released + held
    known = lifetimes.knows_temporary
    chosen = _first(held[:, BYTES], allocated[:, BYTES], allocated[:, BLOCKS], temporary[:, BLOCKS])
    by_site = _Grouped(flows)
    return {
        "allocated": _amount(lifetimes.allocated()),
        "released": _amount(released.sum(axis=0)),
        "temporary": _amount(temporary.sum(axis=0)) if known else None,
        "live": _amount(held.sum(axis=0)),
        "count": int(np.count_nonzero(allocated[:, BLOCKS])),
        "sites": [
            {
                **_site(table, number),
                "allocated": _amount(allocated[number]),
                "released": _amount(released[number]),
                "temporary": _amount(temporary[number]) if known else None,
                "live": _amount(held[number]),
                **by_site.freed_at(number, table),
            }
            for number in chosen
        ],
    }


def _live_by_site(live: LiveTable, table: SiteTable, sample_bytes: int) -> Amounts:
    w = weigh(live.requested, sample_bytes)
    columns = np.stack((w.blocks, w.amount, w.blocks_variance, w.amount_variance), axis=1)
    sites = table.of(live.stack)
    return _by_site(sites, columns, len(table))


def _by_site(sites: npt.NDArray[np.uint32], amounts: Amounts, count: int) -> Amounts:
    """Rows summed by call site."""
    sums = [np.bincount(sites, weights=amounts[:, i], minlength=count) for i in range(4)]
    return np.stack(sums, axis=1)


def _first(*figures: npt.NDArray[np.float64]) -> list[int]:
    """Call sites that are among the first by any of the figures; those of the first figure first."""
    chosen: dict[int, None] = {}
    for figure in figures:
        order = np.argsort(-figure, kind="stable")[:MAX_BY_FIGURE]
        chosen.update(dict.fromkeys(order[figure[order] > 0].tolist()))
    return list(chosen)


class _Grouped:
    """Flows by the site that allocated, the largest first."""

    def __init__(self, flows: Flows) -> None:
        self._flows = flows
        self._order = np.lexsort((-flows.amounts[:, BLOCKS], flows.allocated_by))
        self._sites = flows.allocated_by[self._order]

    def freed_at(self, number: int, table: SiteTable) -> dict[str, Any]:
        low, high = (int(np.searchsorted(self._sites, number, side=side)) for side in ("left", "right"))
        rows = self._order[low:high]
        places = [
            {
                **_site(table, int(self._flows.released_by[row])),
                "released": _amount(self._flows.amounts[row]),
            }
            for row in rows[:MAX_FREED_AT].tolist()
        ]
        return {"freed_at": places, "freed_at_count": len(rows)}


def _site(table: SiteTable, number: int) -> dict[str, Any]:
    return {**site_words(table.frames[number]), "stack": [0, table.example(number)]}


def _amount(row: npt.NDArray[np.float64]) -> list[int]:
    blocks, size, blocks_variance, bytes_variance = row.tolist()
    return [round(blocks), round(size), error(blocks_variance), error(bytes_variance)]
