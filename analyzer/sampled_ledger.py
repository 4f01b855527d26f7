"""Who owns each resident page, where the trace holds a sample of malloc's blocks (`sampling`).

The kernel says how much of the heap is resident, the sample says who is likely to own it: a recorded block of s bytes
of which r are resident stands for r/p resident bytes of its call site. What the call sites do not explain of the heap
is free memory, malloc's own, or blocks of which none was recorded: `unsampled`.

Identity (`Ledger.check`): owners sum to the page map, byte for byte. An estimate that exceeds what is resident in its
part of the heap (`owners.HEAP`, `OTHER_ARENAS`, `ANONYMOUS`) is scaled down to it: no owner is ever negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from heapledger.analyzer.kernel.residency import from_vmas
from heapledger.analyzer.kernel.vma import Vma, sane
from heapledger.analyzer.ledger import (
    Int64s,
    Ledger,
    LiveSites,
    Owner,
    Uint64s,
    book_pieces,
    merge,
    no_spans,
    origins_of,
)
from heapledger.analyzer.owners import ANONYMOUS, HEAP, OTHER_ARENAS, Claims, OwnerKind, Piece, tile
from heapledger.analyzer.replay import LiveTable
from heapledger.analyzer.sampling import Doubles, weigh
from heapledger.store.residency import Category

_PARTS = (HEAP, OTHER_ARENAS, ANONYMOUS)


def arena_addresses(vmas: Sequence[Vma], live: LiveTable) -> Uint64s:
    """User pointers of recorded blocks that lie neither in the kernel's [heap] nor in a mapping of their own."""
    inside = np.zeros(len(live), np.bool_)
    for vma in vmas:
        if vma.path == "[heap]":
            inside |= (live.address >= np.uint64(vma.start)) & (live.address < np.uint64(vma.end))
    return np.sort(live.address[~inside & ~live.mmapped])


def balance_sampled(
    vmas: Sequence[Vma],
    live: LiveTable,
    claims: Claims,
    sample_bytes: int,
    *,
    own_since: Sequence[int] = (0,),
    page_size: int = 4096,
) -> Ledger:
    """The books for one snapshot. `live`: the recorded blocks. `own_since`: see `ledger.balance`."""
    ordered = sane(vmas)
    residency, spread = from_vmas(ordered, page_size=page_size)
    copies, _ = from_vmas(ordered, page_size=page_size, categories=(int(Category.ANON),))
    pieces = tile(ordered, claims)
    owners = book_pieces(pieces, no_spans(), residency, copies, own_since)
    part = _parts_of(live.address, pieces)
    ends = live.address + np.minimum(live.requested, np.uint64(1 << 47))
    held = np.where(part >= 0, residency.between(live.address, ends), 0)
    stands_for = weigh(live.requested, sample_bytes, held)
    notes = ["The kernel gave no page map: pages are spread evenly over their mapping."] if spread else []
    scale = np.ones(len(live))
    for number, name in enumerate(_PARTS):
        there = sum(o.rss_bytes for o in owners if o.kind is OwnerKind.UNSAMPLED and o.name == name)
        claimed = float(stands_for.amount[part == number].sum())
        if claimed > there:
            scale[part == number] = there / claimed
    resident = stands_for.amount * scale
    variance = stands_for.amount_variance * scale**2
    sites, taken = _sites(live, part, sample_bytes, resident, variance, own_since)
    left = merge(_less(owners, taken))
    return Ledger(residency.total_bytes, left, sites, True, notes + claims.notes, sample_bytes)


def _parts_of(addresses: Uint64s, pieces: Sequence[Piece]) -> npt.NDArray[np.int8]:
    """Which of `_PARTS` each address lies in; -1: none of them, so its pages have another owner already."""
    where = [p for p in pieces if p.kind is OwnerKind.UNSAMPLED and p.name in _PARTS]
    if not where or not len(addresses):
        return np.full(len(addresses), -1, np.int8)
    starts = np.array([p.start for p in where], np.uint64)
    ends = np.array([p.end for p in where], np.uint64)
    names = np.array([_PARTS.index(p.name) for p in where], np.int8)
    at = np.searchsorted(starts, addresses, side="right") - 1
    inside = (at >= 0) & (addresses < ends[at])
    return np.where(inside, names[at], -1).astype(np.int8)


def _sites(
    live: LiveTable,
    part: npt.NDArray[np.int8],
    sample_bytes: int,
    rss: Doubles,
    rss_variance: Doubles,
    own_since: Sequence[int],
) -> tuple[list[LiveSites], list[int]]:
    """What the recorded blocks stand for, by call stack, apart for each process of the fork chain; and the resident
    bytes that this takes from each of `_PARTS`."""
    origin = origins_of(live.time, own_since)
    w = weigh(live.requested, sample_bytes)
    found: list[LiveSites] = []
    taken = np.zeros(len(_PARTS), np.int64)
    for which in np.unique(origin).tolist():
        mine = origin == which
        stacks, index = np.unique(live.stack[mine], return_inverse=True)
        count = len(stacks)
        columns = (w.amount, w.blocks, rss_variance, w.amount_variance, w.blocks_variance)
        sums = [np.bincount(index, weights=column[mine], minlength=count) for column in columns]
        # Whole bytes of each stack in each part: so the sums over stacks and over parts are the same.
        cell = index * len(_PARTS) + np.maximum(part[mine], 0)
        cells = np.floor(np.bincount(cell, weights=rss[mine], minlength=count * len(_PARTS))).astype(np.int64)
        resident: Int64s = cells.reshape(count, len(_PARTS))
        taken += resident.sum(axis=0)
        requested, blocks = (np.rint(np.minimum(column, 2.0**62)).astype(np.int64) for column in sums[:2])
        found.append(
            LiveSites(int(which), stacks, resident.sum(axis=1), requested, blocks, variances=np.stack(sums[2:]))
        )
    return found, taken.tolist()


def _less(owners: Sequence[Owner], taken: list[int]) -> list[Owner]:
    """The owners without what call sites took from the unsampled ones, by `_PARTS`."""
    left = []
    for owner in owners:
        if owner.kind is OwnerKind.UNSAMPLED and owner.name in _PARTS:
            part = _PARTS.index(owner.name)
            amount = min(taken[part], owner.rss_bytes)
            taken[part] -= amount
            owner = replace(owner, rss_bytes=owner.rss_bytes - amount)
        left.append(owner)
    assert not any(taken), "more was taken than is there"
    return left
