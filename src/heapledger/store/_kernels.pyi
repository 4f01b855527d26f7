import numpy as np
import numpy.typing as npt

def encode(
    values: npt.NDArray[np.uint64],
    seq: npt.NDArray[np.uint64],
    size: npt.NDArray[np.uint64],
    allocation: npt.NDArray[np.uint8],
    transform: int,
    split: bool,
) -> tuple[int, bytes]: ...
