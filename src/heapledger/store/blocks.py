"""Blocks: 64k events, or 16k nodes of call stacks, as a few compressed streams in one blob.

What the streams hold is the codecs' affair (codec.h, node_codec.h); here they are compressed, packed and opened again
without being trusted. A blob:

    u8 streams | of each: u8 length, name | u8 form | u32 raw bytes | u32 stored bytes | then the contents

`form` is 0 for a content that is stored as it is, 1 for one zstd frame, which states its content size. Everything is
little endian. A stream that is not there is empty. Example: the stream `code` with the bytes 03 00, and nothing else:

    01 | 04 63 6f 64 65 | 00 | 02 00 00 00 | 02 00 00 00 | 03 00

The CRC-32 beside a blob covers what kind of block it is, how many events it has, and the blob: all that decoding
depends on.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from heapledger.errors import TraceError
from heapledger.store import _codec, planes

if TYPE_CHECKING:
    from array import array

    import numpy as np
    import numpy.typing as npt

    from heapledger.store.events import Events

    Int64s = npt.NDArray[np.int64]
    #: What nodes come in: the one from a trace file, the other from the spool.
    Numbers = Int64s | array[int]
else:
    from heapledger.late import np

Streams = list[tuple[str, bytes]]

#: Events a block; the writer fills blocks up to it and the reader refuses larger ones.
BLOCK_EVENTS = _codec.BLOCK_EVENTS
#: Nodes of call stacks a block.
BLOCK_NODES = _codec.BLOCK_NODES

#: A stream that zstd could not bring below this share of its size is stored as it is in the next blocks.
_WORTH = 0.85
_STORED_BLOCKS = 15
#: Streams of so few bytes are not worth a frame.
_FEW_BYTES = 48

_RAW, _ZSTD = 0, 1
_SIZES = struct.Struct("<BII")

_SITES = {"thread", "code", "site", "new"}
_VALUES = _SITES | {"size", "word", "ref", "depth", "old", "far", "odd", "wide"}
#: The streams that each column is made of.
STREAMS_OF: dict[str, set[str]] = {
    "thread": {"thread"},
    "time": {"thread", "gap", "time", "leap"},
    "seq": {"seq"},
    "seq_exit": {"seq"},
    "kind": _SITES,
    "stack": _SITES,
    **dict.fromkeys(("addr", "size", "arg", "arg2", "word"), _VALUES),
}


@dataclass(slots=True)
class Block:
    """An encoded block of events. Times are the least and the greatest of its events."""

    count: int
    first_seq: int
    last_seq: int
    first_ns: int
    last_ns: int
    streams: Streams


class Entry(NamedTuple):
    """A stream in a blob: its content is `blob[low:high]`."""

    name: str
    form: int
    raw_bytes: int
    low: int
    high: int


class Packer:
    """Makes blobs. One a process: what zstd cannot make smaller is not tried in every block."""

    def __init__(self) -> None:
        self._stored: dict[str, int] = {}

    def pack(self, streams: Iterable[tuple[str, bytes]]) -> bytes:
        """The blob of a block."""
        head, contents = [], []
        for name, data in streams:
            if not data:
                continue
            form, content = self._form(name, data)
            label = name.encode()
            head.append(bytes((len(label),)) + label + _SIZES.pack(form, len(data), len(content)))
            contents.append(content)
        return b"".join((bytes((len(head),)), *head, *contents))

    def _form(self, name: str, data: bytes) -> tuple[int, bytes]:
        left = self._stored.get(name, 0)
        if left:
            self._stored[name] = left - 1
        if left or len(data) < _FEW_BYTES:
            return _RAW, data
        frame = planes.compress_quickly(data)
        if len(frame) > _WORTH * len(data):
            self._stored[name] = _STORED_BLOCKS
        return (_ZSTD, frame) if len(frame) < len(data) else (_RAW, data)


def checksum(what: str, count: int, blob: bytes) -> int:
    """CRC-32 over everything that decoding depends on. `what`: "events" or "nodes"."""
    return zlib.crc32(blob, zlib.crc32(f"{what}/{count}".encode()))


def directory(blob: bytes) -> list[Entry]:
    """What streams a blob holds; TraceError where it is not laid out as drawn above."""
    entries: list[Entry] = []
    low, at = 0, 1
    try:
        for _ in range(blob[0]):
            end = at + 1 + blob[at]
            form, raw_bytes, stored = _SIZES.unpack_from(blob, end)
            entries.append(Entry(blob[at + 1 : end].decode("ascii"), form, raw_bytes, low, low + stored))
            at, low = end + _SIZES.size, low + stored
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        raise TraceError("a block has no list of its streams") from error
    if at + low != len(blob) or len({entry.name for entry in entries}) != len(entries):
        raise TraceError("a block is not as long as its streams")
    return [entry._replace(low=entry.low + at, high=entry.high + at) for entry in entries]


def unpack(blob: bytes, wanted: set[str], limit: Callable[[str], int]) -> list[tuple[bytes, bytes]]:
    """The contents of the wanted streams. `limit`: the most bytes that one can have; 0: there is none of this name.
    Nothing is unfolded before its size is known to be within it."""
    found = []
    for name, form, raw_bytes, low, high in directory(blob):
        if raw_bytes > limit(name) or not raw_bytes:
            raise TraceError(f"a stream {name[:20]!r} of {raw_bytes} bytes cannot be")
        if name not in wanted:
            continue
        content = blob[low:high]
        if form == _ZSTD:
            content = planes.decompress(content, raw_bytes)
        elif form != _RAW or len(content) != raw_bytes:
            raise TraceError("a stream is stored in a way this heapledger does not know")
        found.append((name.encode(), content))
    return found


class _Codecs(threading.local):
    """One of each a thread: they are large, and nothing may come between the start and the end of a block."""

    def __init__(self) -> None:
        self.encoder: _codec.Encoder | None = None
        self.decoder: _codec.Decoder | None = None
        self.nodes: _codec.NodeEncoder | None = None


_codecs = _Codecs()


def encode_events(events: Events) -> Block:
    """Up to BLOCK_EVENTS events as a block."""
    from heapledger.store.events import COLUMNS

    assert len(events) <= BLOCK_EVENTS, "the writer cuts blocks"
    encoder = _codecs.encoder = _codecs.encoder or _codec.Encoder()
    columns = [np.ascontiguousarray(getattr(events, name), dtype) for name, dtype in COLUMNS.items()]
    streams = encoder.encode(*columns)
    if not len(events):
        return Block(0, 0, 0, 0, 0, [])
    seq, time = events.seq, events.time
    return Block(len(events), int(seq[0]), int(seq[-1]), int(time.min()), int(time.max()), streams)


def decode_events(count: int, crc: int, blob: bytes, wanted: Iterable[str] | None = None) -> Events:
    """The events of a block; columns that are not `wanted` (None: all) are zeros.

    TraceError if anything is damaged; what a damaged block can cost is bounded by BLOCK_EVENTS.
    """
    from heapledger.store.events import COLUMNS, Events

    if not 0 <= count <= BLOCK_EVENTS:
        raise TraceError(f"a block claims {count} events")
    if checksum("events", count, blob) != crc:
        raise TraceError("a block of events is damaged (checksum)")
    wanted = set(COLUMNS if wanted is None else wanted)
    names: set[str] = set().union(*(STREAMS_OF[name] for name in wanted))
    streams = unpack(blob, names, lambda name: _codec.stream_limit(name, count))
    columns: dict[str, Any] = {
        name: np.empty(count, dtype) if name in wanted else np.zeros(count, dtype) for name, dtype in COLUMNS.items()
    }
    if count and wanted:
        decoder = _codecs.decoder = _codecs.decoder or _codec.Decoder()
        if not decoder.decode(streams, count, {name: columns[name] for name in wanted}):
            raise TraceError("a block of events is damaged (its streams do not fit together)")
    return Events(**columns)


def encode_nodes(node: Numbers, parent: Numbers, address: Numbers, module_id: Numbers) -> Streams:
    """Up to BLOCK_NODES nodes, at least one, as streams."""
    encoder = _codecs.nodes = _codecs.nodes or _codec.NodeEncoder()
    return encoder.encode(node, parent, address, module_id)


def decode_nodes(count: int, crc: int, blob: bytes) -> Sequence[Int64s]:
    """(node, parent, address, module_id) of a block's nodes; TraceError if it is damaged."""
    if not 0 < count <= BLOCK_NODES:
        raise TraceError(f"a block claims {count} nodes")
    if checksum("nodes", count, blob) != crc:
        raise TraceError("a block of call stacks is damaged (checksum)")
    names = {entry.name for entry in directory(blob)}
    streams = unpack(blob, names, lambda name: _codec.node_limit(name, count))
    columns = [np.empty(count, np.int64) for _ in range(4)]
    if not _codec.decode_nodes(streams, *columns):
        raise TraceError("a block of call stacks is damaged (its streams do not fit together)")
    return columns
