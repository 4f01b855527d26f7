"""What a sampled trace says about everything that was allocated.

`heapledger run --sample B` records allocations by a Poisson process over the bytes that are asked for: one of s bytes
is in the trace with probability p = 1 - exp(-s/B), independently of all others. So each that is stands for 1/p blocks
and s/p bytes, and sums of these are unbiased (Horvitz and Thompson 1952). A sum of s/p has the variance s² (1-p)/p², of
which the same sum over the recorded blocks, each divided by p again, is an unbiased estimate:

    total  ~ sum s/p            variance ~ sum s² (1-p)/p²            (blocks: the same with s = 1)

The standard error is the variance's square root. A block much smaller than B stands for about B bytes, with an error of
B; blocks much larger than B are all recorded. A sum of n small blocks is so known to about 1/sqrt(n) of itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

#: A block stands for about this many bytes at most, whatever a file says: so sums stay within 64 bits.
MAX_SAMPLE_BYTES = 1 << 40

Doubles = npt.NDArray[np.float64]


def probability(sizes: npt.ArrayLike, sample_bytes: int) -> Doubles:
    """How likely it is that an allocation of each size is recorded; 1 where `sample_bytes` is 0: all are."""
    s = np.asarray(sizes, np.float64)
    return np.ones(s.shape) if sample_bytes <= 0 else -np.expm1(-s / float(sample_bytes))


@dataclass(slots=True)
class Weighed:
    """Recorded amounts as estimates of all, one entry a block: what it stands for, and the variance of that."""

    blocks: Doubles
    amount: Doubles
    blocks_variance: Doubles
    amount_variance: Doubles


def weigh(sizes: npt.ArrayLike, sample_bytes: int, amounts: npt.ArrayLike | None = None) -> Weighed:
    """What recorded blocks of `sizes` stand for. `amounts`: what is summed, if not the sizes (resident bytes, say)."""
    p = probability(sizes, sample_bytes)
    a = np.asarray(sizes if amounts is None else amounts, np.float64)
    # A block of no bytes is never recorded: one that is there all the same (a hostile file) stands for nothing.
    possible = p > 0
    p = np.where(possible, p, 1.0)
    a = np.where(possible, a, 0.0)
    spread = (1 - p) / (p * p)
    return Weighed(possible / p, a / p, spread, a * a * spread)


def error(variance: float) -> int:
    """The standard error of an estimate, as it is printed."""
    return round(math.sqrt(max(variance, 0.0)))
