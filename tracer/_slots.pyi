import numpy as np
import numpy.typing as npt

def decode(
    slots: npt.NDArray[np.uint64],
    known: npt.NDArray[np.uint8],
    has_word: npt.NDArray[np.uint8],
    carry: npt.NDArray[np.uint64],
    kind: npt.NDArray[np.uint8],
    wide: npt.NDArray[np.uint64],
    stack: npt.NDArray[np.uint32],
) -> int: ...
