"""numpy, imported when something of it is used for the first time.

`heapledger run` does without: importing it takes as long as all else that happens before a program starts and after it
has ended. Modules on the way of `run` that have use for it otherwise write

    if TYPE_CHECKING:
        import numpy as np
    else:
        from heapledger.late import np
"""

from __future__ import annotations

import os
from typing import Any

_THREADS = "OPENBLAS_NUM_THREADS"


class _Numpy:
    def __getattr__(self, name: str) -> Any:
        unset = _THREADS not in os.environ
        os.environ.setdefault(_THREADS, "1")  # the BLAS in it, which nothing here uses, starts one for each CPU
        try:
            import numpy
        finally:
            if unset:
                os.environ.pop(_THREADS, None)
        value = getattr(numpy, name)
        setattr(self, name, value)  # asked for once
        return value


np = _Numpy()
