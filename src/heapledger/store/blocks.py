"""The codec of event columns: 64k events become one small blob a column.

A codec is written into the file as `order.transform.width`, e.g. `time.delta.3`:

    order       `time`: as they happened.  `split`: allocations first, then the rest (FREE and all other kinds): a
                column that means different things for the two compresses better when they are apart
    transform   `plain`   v
                `delta`   v[i] - v[i-1], zigzag             (v[-1] is 0, all arithmetic is modulo 2**64)
                `second`  the difference of the differences, zigzag: seq is almost an arithmetic progression
                `exit`    v - seq, zigzag: a call that nothing overlaps returns one number later
                `chunk`   v - (the chunk that malloc(size) needs + 1) for allocations, v for the rest; zigzag
    width       bytes a residual, 0 to 8; the residuals are stored as byte planes (see store.planes). 0: all are 0

Example: the times 5, 7, 7 become `time.delta.1`: differences 5 2 0, zigzag 10 4 0, planes 0a 04 00, then zstd.
A column may use only `kind`, `size` and `seq` of its own block, so that every block and nearly every column can be
decoded alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from heapledger.errors import TraceError
from heapledger.store import planes
from heapledger.store.events import COLUMNS, Events, Kind
from heapledger.store.planes import U64, unzigzag, zigzag

try:
    from heapledger.store import _kernels
except ImportError:  # it was not built here: numpy does it
    _kernels = None  # type: ignore[assignment]

#: Events a block; the writer fills blocks up to it and the reader refuses larger ones.
BLOCK_EVENTS = 65_536

#: Columns that another one's transform looks at.
_NEEDS: dict[str, tuple[str, ...]] = {"split": ("kind",), "exit": ("seq",), "chunk": ("kind", "size")}

#: (order, transform) by column: what was smallest on allocbench (1 and 4 threads) and CPython's JSON. Where no one was,
#: one that was smallest a few blocks ago is taken (`Encoder`). See bench/store_bench.py --choose.
_BEST: dict[str, tuple[tuple[str, str], ...]] = {
    "kind": (("time", "plain"),),
    "thread": (("time", "plain"),),
    "time": (("time", "delta"),),
    "seq": (("time", "second"),),
    "seq_exit": (("time", "exit"),),
    "addr": (("time", "delta"),),
    "size": (("split", "plain"),),
    "arg": (("split", "plain"),),
    "arg2": (("split", "plain"),),
    "word": (("split", "chunk"),),
    "stack": (("split", "plain"), ("time", "plain")),
}

#: zstd's level by column, where it is not planes.LEVEL: these have few repetitions. Level 1 takes half the time; on
#: allocbench it leaves 1 % less, on CPython's JSON 4 % more.
_LEVELS = {"time": 1, "addr": 1}

#: So many blocks of a process go by before its columns' codecs are compared again.
_COMPARE_EVERY = 8

#: Kinds with a request and a result: the "allocations" of the `split` order.
_IS_ALLOCATION = np.zeros(256, np.bool_)
_IS_ALLOCATION[[Kind.MALLOC, Kind.CALLOC, Kind.REALLOC, Kind.MEMALIGN, Kind.VALLOC, Kind.PVALLOC]] = True

#: In the order of the numbers in _kernels.pyx.
_TRANSFORMS = ("plain", "delta", "second", "exit", "chunk")

_ONE = np.uint64(1)
_WIDTHS = {str(width): width for width in range(9)}


@dataclass(slots=True, frozen=True)
class Column:
    """An encoded column: a row of `event_column`. `crc` is `checksum` of all the rest."""

    codec: str
    raw_bytes: int
    crc: int
    data: bytes


@dataclass
class _Context:
    """What a transform may look at beside its own column."""

    count: int
    columns: Mapping[str, U64]

    @cached_property
    def allocation(self) -> npt.NDArray[np.bool_]:
        """Which events are allocations, by the low byte of `kind`."""
        return _IS_ALLOCATION[self.columns["kind"].astype(np.uint8)]

    @cached_property
    def split(self) -> npt.NDArray[np.intp]:
        """Indices of the allocations, then of the rest."""
        return np.concatenate([np.flatnonzero(self.allocation), np.flatnonzero(~self.allocation)])

    @cached_property
    def unsplit(self) -> npt.NDArray[np.intp]:
        """The place of each event in the `split` order."""
        places = np.empty(self.count, np.intp)
        places[self.split] = np.arange(self.count)
        return places


def checksum(name: str, codec: str, count: int, data: bytes) -> int:
    """CRC-32 over everything that decoding depends on: the column's name, its codec, the block's count, the blob."""
    return zlib.crc32(data, zlib.crc32(f"{name}/{codec}/{count}".encode()))


def _difference(values: U64) -> U64:
    out = values.copy()
    out[1:] -= values[:-1]
    return out


def _chunk_word(context: _Context) -> U64:
    """glibc's request2size(size) + PREV_INUSE for allocations, 0 for other kinds. See HL_CHUNK in preload/spool.h."""
    size = context.columns["size"]
    chunk: U64 = np.maximum((size + np.uint64(23)) & ~np.uint64(15), np.uint64(32)) + _ONE
    chunk[~context.allocation] = 0
    return chunk


_ENCODE: dict[str, Callable[[U64, _Context], U64]] = {
    "plain": lambda v, _: v,
    "delta": lambda v, _: zigzag(_difference(v)),
    "second": lambda v, _: zigzag(_difference(_difference(v))),
    "exit": lambda v, c: zigzag(v - c.columns["seq"]),
    "chunk": lambda v, c: zigzag(v - _chunk_word(c)),
}
_DECODE: dict[str, Callable[[U64, _Context], U64]] = {
    "plain": lambda v, _: v,
    "delta": lambda v, _: np.cumsum(unzigzag(v), dtype=np.uint64),
    "second": lambda v, _: np.cumsum(np.cumsum(unzigzag(v), dtype=np.uint64), dtype=np.uint64),
    "exit": lambda v, c: unzigzag(v) + c.columns["seq"],
    "chunk": lambda v, c: unzigzag(v) + _chunk_word(c),
}


def encode_column(name: str, context: _Context, order: str, transform: str) -> Column:
    """One column with a given codec; `context` holds all columns of the block as u64."""
    encode = _encode_by_numpy if _kernels is None else _encode_compiled
    width, planes_of = encode(name, context, order, transform)
    data = planes.compress(planes_of, _LEVELS.get(name, planes.LEVEL)) if width else b""
    codec = f"{order}.{transform}.{width}"
    return Column(codec, width * context.count, checksum(name, codec, context.count, data), data)


def _encode_by_numpy(name: str, context: _Context, order: str, transform: str) -> tuple[int, bytes]:
    """(width, byte planes) of a column."""
    residual = _ENCODE[transform](context.columns[name], context)
    if order == "split":
        residual = residual[context.split]
    width = planes.width_of(residual)
    return width, planes.split(residual, width) if width else b""


def _encode_compiled(name: str, context: _Context, order: str, transform: str) -> tuple[int, bytes]:
    """The same."""
    assert _kernels is not None
    columns, number = context.columns, _TRANSFORMS.index(transform)
    mask = context.allocation.view(np.uint8)
    return _kernels.encode(columns[name], columns["seq"], columns["size"], mask, number, order == "split")


def context_of(events: Events) -> _Context:
    """The columns of `events` as u64, and which events are allocations."""
    columns = {name: np.ascontiguousarray(getattr(events, name), np.uint64) for name in COLUMNS}
    return _Context(len(events), columns)


def encode_block(events: Events) -> dict[str, Column]:
    """All columns of up to BLOCK_EVENTS events, each with the codec that does best on recorded programs."""
    return Encoder().encode(events)


class Encoder:
    """Encodes the blocks of one process. Where two codecs contend both are tried now and then, the smaller is kept:
    which one that is hardly ever changes within a program, and stacks are dear to compress."""

    def __init__(self) -> None:
        self._blocks = 0
        self._kept = {name: codecs[0] for name, codecs in _BEST.items()}

    def encode(self, events: Events) -> dict[str, Column]:
        """All columns of up to BLOCK_EVENTS events."""
        assert len(events) <= BLOCK_EVENTS, "the writer cuts blocks"
        context = context_of(events)
        compare = self._blocks % _COMPARE_EVERY == 0
        self._blocks += 1
        encoded = {}
        for name, codecs in _BEST.items():
            tried = codecs if compare else (self._kept[name],)
            columns = [(codec, encode_column(name, context, *codec)) for codec in tried]
            self._kept[name], encoded[name] = min(columns, key=lambda pair: len(pair[1].data))
        return encoded


def parse_codec(codec: str) -> tuple[str, str, int]:
    """(order, transform, width) of a codec's name; TraceError if there is no such codec."""
    parts = codec.split(".")
    if len(parts) != 3 or parts[0] not in ("time", "split") or parts[1] not in _DECODE or parts[2] not in _WIDTHS:
        raise TraceError(f"a column is stored in a way this heapledger does not know ({codec[:40]!r})")
    return parts[0], parts[1], _WIDTHS[parts[2]]


def needed_by(order: str, transform: str) -> set[str]:
    """The columns that decoding a column stored in this way looks at."""
    return {*_NEEDS.get(order, ()), *_NEEDS.get(transform, ())}


def needs(codec: str) -> set[str]:
    """`needed_by` for a codec's name."""
    order, transform, _ = parse_codec(codec)
    return needed_by(order, transform)


def verify(name: str, count: int, column: Column) -> None:
    """TraceError unless the column is one that was written with this name, codec and count."""
    if checksum(name, column.codec, count, column.data) != column.crc:
        raise TraceError(f"column {name} is damaged (checksum)")


def decode_block(count: int, columns: Mapping[str, Column], wanted: Iterable[str] | None = None) -> Events:
    """The events of a block; columns that are not `wanted` (None: all) are zeros.

    `columns` holds at least the wanted ones and those they need. TraceError if any of them is damaged or missing; what
    a damaged one can cost is bounded by BLOCK_EVENTS.
    """
    if not 0 <= count <= BLOCK_EVENTS:
        raise TraceError(f"a block claims {count} events")
    wanted = set(COLUMNS if wanted is None else wanted)
    done: dict[str, U64] = {}
    context = _Context(count, done)
    decoded: dict[str, Any] = {}
    for name, dtype in COLUMNS.items():
        if name in wanted:
            decoded[name] = _decode(name, columns, context, done).astype(dtype, copy=False)
        else:
            decoded[name] = np.zeros(count, dtype)
    return Events(**decoded)


def _decode(name: str, columns: Mapping[str, Column], context: _Context, done: dict[str, U64]) -> U64:
    if name in done:
        return done[name]
    if name not in columns:
        raise TraceError(f"column {name} is missing")
    column = columns[name]
    verify(name, context.count, column)
    order, transform, width = parse_codec(column.codec)
    if column.raw_bytes != width * context.count:
        raise TraceError(f"column {name} does not have the size it states")
    for other in needs(column.codec):
        if other == name:
            raise TraceError(f"column {name} needs itself")
        # Only `kind`, `size` and `seq` are ever needed; a hostile file could still make two of them need each other.
        _decode(other, {k: v for k, v in columns.items() if k != name}, context, done)
    residual = planes.unpack(column.data, width, context.count)
    if order == "split" and width:
        residual = residual[context.unsplit]
    done[name] = _DECODE[transform](residual, context)
    return done[name]
