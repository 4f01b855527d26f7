"""Byte planes: how a column of 64-bit integers becomes a small blob, and how a blob is opened without trusting it.

    values (n x u64)      bytes, little endian        planes: all lowest bytes first, then the next ...
    0x0000000000001234    34 12 00 00 00 00 00 00     34 78 | 12 56          (planes of zeros on top are left out)
    0x0000000000005678    78 56 00 00 00 00 00 00     then one zstd frame, which states its content size

A frame's stated size is compared with what the caller expects before any memory is taken: a 32 KiB bomb that unfolds to
a GiB costs nothing (`max_output_size` of the library does not help: it is ignored when the frame states a size).
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import zstandard

from heapledger.errors import TraceError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    U64 = npt.NDArray[np.uint64]
else:
    from heapledger.late import np

#: zstd-3: level 6 takes twice the time for 2 %.
LEVEL = 3


def zigzag(values: U64) -> U64:
    """Signed values with small magnitudes become small unsigned ones: 0 -1 1 -2 → 0 1 2 3."""
    signed = values.view(np.int64)
    result: U64 = ((signed << np.int64(1)) ^ (signed >> np.int64(63))).view(np.uint64)
    return result


def unzigzag(values: U64) -> U64:
    """Undoes `zigzag`."""
    one = np.uint64(1)
    # 0 - (v & 1) is all ones for odd values.
    result: U64 = (values >> one) ^ (np.uint64(0) - (values & one))
    return result


def width_of(values: U64) -> int:
    """Bytes that the largest of `values` needs: 0 to 8."""
    return (int(values.max()).bit_length() + 7) // 8 if len(values) else 0


def split(values: U64, width: int) -> bytes:
    """The `width` lowest byte planes of `values`, one after another."""
    return np.ascontiguousarray(values).view(np.uint8).reshape(-1, 8)[:, :width].T.tobytes()


def join(data: bytes, width: int, count: int) -> U64:
    """Undoes `split`. `data` holds width * count bytes."""
    planes = np.frombuffer(data, np.uint8).reshape(width, count)
    narrow = 1 if width == 1 else 2 if width == 2 else 4 if width <= 4 else 8
    out = np.zeros((count, narrow), np.uint8)
    for index in range(width):
        out[:, index] = planes[index]
    values: U64 = out.reshape(-1).view(f"<u{narrow}").astype(np.uint64, copy=False)
    return values


#: Level 1 for streams of single bytes: only long repetitions are looked for, in a table of 4 KiB that stays in the L1
#: cache. On allocbench this takes 30 % less time than level 1, for 3 % more bytes; on cc1plus and python 5 % less time.
#: A table of 1 KiB takes another 5 % off allocbench alone and makes the blocks of python 4 % larger.
_QUICK = zstandard.ZstdCompressionParameters(
    window_log=17,
    chain_log=12,
    hash_log=10,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
    write_content_size=True,
)


class _Compressors(threading.local):
    """One a thread: making one costs as much as compressing 20 KiB."""

    def __init__(self) -> None:
        self.thorough = zstandard.ZstdCompressor(level=LEVEL)
        self.quick = zstandard.ZstdCompressor(compression_params=_QUICK)


_compressors = _Compressors()


def compress(data: bytes) -> bytes:
    """One zstd frame that states its content size."""
    return _compressors.thorough.compress(data)


def compress_quickly(data: bytes) -> bytes:
    """The same, for the collector."""
    return _compressors.quick.compress(data)


def decompress(data: bytes, size: int) -> bytes:
    """The content of one zstd frame, which has to be `size` bytes long, no more and no less.

    Raises TraceError for anything else, before memory is taken for the content.
    """
    try:
        if zstandard.frame_content_size(data) != size:
            raise TraceError("a compressed block does not have the size it states")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise TraceError(f"a compressed block cannot be opened ({error})") from error


def pack(values: U64) -> tuple[int, bytes]:
    """(width, compressed planes). Width 0 has no data: all values are 0."""
    width = width_of(values)
    return width, compress(split(values, width)) if width else b""


def unpack(data: bytes, width: int, count: int) -> U64:
    """Undoes `pack`; TraceError where `data` is not `count` values of `width` bytes."""
    if not 0 <= width <= 8:
        raise TraceError(f"a column claims values of {width} bytes")
    if width == 0 or count == 0:
        if data:
            raise TraceError("a column of zeros carries data")
        return np.zeros(count, np.uint64)
    return join(decompress(data, width * count), width, count)
