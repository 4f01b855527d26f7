"""The call sites of very many call stacks at once.

A stack's site (`sites.site_of`) is its innermost frame that is not a wrapper of malloc. Stacks are nodes of a trie, and
few addresses are wrappers, so all stacks climb together, a frame at a time, until each has found its site: the cost is
that of the distinct addresses among the innermost frames, not that of the stacks.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from heapledger.analyzer.owners import SHIM
from heapledger.analyzer.sites import Frame, is_wrapper
from heapledger.store.ddl import JIT
from heapledger.store.reader import StackFrame, Trace

Sites = npt.NDArray[np.uint32]

#: The number of stacks without any frame.
NO_SITE = 0
_UNKNOWN = np.uint32(0xFFFFFFFF)


def program_frame(frame: StackFrame, biases: Mapping[str, int]) -> Frame | None:
    """A frame as the analyzer has it; None for the shim's own, which stands between a thread's start and its
    function, and is none of the program's. `biases`: load bias by the path of an object."""
    if frame.module == JIT and not frame.function:
        return Frame("", None, None, "", frame.address, False, None)  # nothing to recognize it by in another run
    if frame.module.endswith("/" + SHIM):
        return None
    bias = biases.get(frame.module)
    offset = None if bias is None or frame.address < bias else frame.address - bias
    return Frame(frame.function, frame.file, frame.line, frame.module, frame.address, frame.inlined, offset)


class SiteTable:
    """Numbers for the call sites of one process. `frames[n]`: the frame of site n; None: no call stack."""

    def __init__(self, trace: Trace, process_id: int, biases: Mapping[str, int]) -> None:
        self._trace = trace
        self._nodes = trace.nodes(process_id)
        self._biases = biases
        #: Nodes 1 to n without a gap, as heapledger writes them, need no search.
        count = len(self._nodes.node)
        self._dense = bool((self._nodes.node == np.arange(1, count + 1)).all())
        self._found = np.full(count + 1, _UNKNOWN, np.uint32)  # by index of the node; the last: no node
        self._found[count] = NO_SITE
        self._numbers: dict[tuple[object, ...], int] = {(): NO_SITE}
        #: (address, module) → (the site there or -1 where all is wrappers, the first frame's number or -1).
        self._known: dict[tuple[int, int], tuple[int, int]] = {}
        self._examples: dict[int, int] = {}
        self.frames: list[Frame | None] = [None]

    def __len__(self) -> int:
        return len(self.frames)

    def of(self, stacks: npt.NDArray[np.uint32]) -> Sites:
        """The site's number of each stack."""
        at = self._index(stacks)
        found = self._found[at]
        if (found == _UNKNOWN).any():
            missing = np.unique(at[found == _UNKNOWN])
            sites = self._found[missing] = self._climb(missing)
            for number, first in zip(*(c.tolist() for c in np.unique(sites, return_index=True)), strict=True):
                if number != NO_SITE:
                    self._examples.setdefault(number, int(self._nodes.node[missing[first]]))
            found = self._found[at]
        return found

    def example(self, number: int) -> int:
        """A call stack of the site; 0 where it has none."""
        return self._examples.get(number, 0)

    def key(self, number: int) -> tuple[object, ...]:
        """What makes two sites the same, also of two processes."""
        return _key(self.frames[number])

    def _index(self, stacks: npt.NDArray[np.uint32]) -> npt.NDArray[np.intp]:
        """Index of each stack's node; the one behind the last where there is none."""
        count = len(self._nodes.node)
        wanted = stacks.astype(np.int64)
        if self._dense:
            return np.where((wanted > 0) & (wanted <= count), wanted - 1, count)
        at = np.searchsorted(self._nodes.node, wanted)
        there = at < count
        there[there] = self._nodes.node[at[there]] == wanted[there]
        return np.where(there & (wanted > 0), at, count)

    def _climb(self, index: npt.NDArray[np.intp]) -> Sites:
        """The sites of the nodes at these indices."""
        nodes = self._nodes
        result = np.full(len(index), NO_SITE, np.uint32)
        first = np.full(len(index), -1, np.int64)
        waiting, at = np.arange(len(index)), index
        while len(waiting):
            site, innermost = self._look(nodes.address[at], nodes.module_id[at])
            unset = first[waiting] < 0
            first[waiting[unset]] = innermost[unset]
            done = site >= 0
            result[waiting[done]] = site[done]
            # Parents are older than their children; a file in which they are not has a loop in it.
            parent = np.where(nodes.parent[at] < nodes.node[at], nodes.parent[at], 0)
            above = self._index_of_nodes(parent)
            onward = ~done & (above < len(nodes.node))
            ended = ~done & ~onward & (first[waiting] >= 0)
            result[waiting[ended]] = first[waiting[ended]]
            waiting, at = waiting[onward], above[onward]
        return result

    def _index_of_nodes(self, nodes: npt.NDArray[np.int64]) -> npt.NDArray[np.intp]:
        small = (nodes > 0) & (nodes < 1 << 32)
        return self._index(np.where(small, nodes, 0).astype(np.uint32))

    def _look(
        self, address: npt.NDArray[np.int64], module: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """`_known` of each (address, module); each distinct one is resolved once."""
        addresses, a = np.unique(address, return_inverse=True)
        modules, m = np.unique(module, return_inverse=True)
        pairs, which = np.unique(a * len(modules) + m, return_inverse=True)
        answers = np.array(
            [self._at(int(addresses[pair // len(modules)]), int(modules[pair % len(modules)])) for pair in pairs],
            np.int64,
        ).reshape(-1, 2)
        return answers[which, 0], answers[which, 1]

    def _at(self, address: int, module: int) -> tuple[int, int]:
        key = (address, module)
        if key not in self._known:
            resolved = (program_frame(f, self._biases) for f in self._trace.frames_at(address, module))
            frames = [frame for frame in resolved if frame is not None]
            chosen = [f for f in frames if (f.module if not f.function else not is_wrapper(f.function))]
            site = self._number(chosen[0]) if chosen else -1
            self._known[key] = (site, self._number(frames[0]) if frames else -1)
        return self._known[key]

    def _number(self, frame: Frame) -> int:
        number = self._numbers.setdefault(_key(frame), len(self.frames))
        if number == len(self.frames):
            self.frames.append(frame)
        return number


def _key(frame: Frame | None) -> tuple[object, ...]:
    if frame is None:
        return ()
    if frame.function:
        return (frame.function, frame.file, frame.line, frame.module)
    return (frame.offset or frame.address, frame.module)
