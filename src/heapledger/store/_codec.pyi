from array import array

import numpy as np
import numpy.typing as npt

BLOCK_EVENTS: int
BLOCK_NODES: int

def stream_limit(name: str, count: int) -> int: ...
def node_limit(name: str, count: int) -> int: ...

class Encoder:
    def encode(
        self,
        kind: npt.NDArray[np.uint8],
        thread: npt.NDArray[np.uint32],
        time: npt.NDArray[np.uint64],
        seq: npt.NDArray[np.uint64],
        seq_exit: npt.NDArray[np.uint64],
        addr: npt.NDArray[np.uint64],
        size: npt.NDArray[np.uint64],
        arg: npt.NDArray[np.uint64],
        arg2: npt.NDArray[np.uint64],
        word: npt.NDArray[np.uint64],
        stack: npt.NDArray[np.uint32],
    ) -> list[tuple[str, bytes]]: ...

class Decoder:
    def decode(
        self, streams: list[tuple[bytes, bytes]], count: int, columns: dict[str, npt.NDArray[np.generic]]
    ) -> bool: ...

class NodeEncoder:
    def encode(
        self,
        node: npt.NDArray[np.int64] | array[int],
        parent: npt.NDArray[np.int64] | array[int],
        address: npt.NDArray[np.int64] | array[int],
        module_id: npt.NDArray[np.int64] | array[int],
    ) -> list[tuple[str, bytes]]: ...

def decode_nodes(
    streams: list[tuple[bytes, bytes]],
    node: npt.NDArray[np.int64],
    parent: npt.NDArray[np.int64],
    address: npt.NDArray[np.int64],
    module_id: npt.NDArray[np.int64],
) -> bool: ...
