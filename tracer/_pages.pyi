from array import array
from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]

def tile(
    regions: Buffer, meaning: bytes, start: int, end: int, swaps: bool, page: int
) -> tuple[array[int], bytes, int]: ...
