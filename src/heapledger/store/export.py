"""A trace in other tools' formats, as lines of text.

The order of the events needs care. An allocation takes effect when it returns and a release when it is called, so an
allocation stands at its exit number, a release at its entry number, and a realloc is one of each:

    thread 1   malloc  seq 5 ............... exit 8 → p          written:   7 free q, 8 malloc p, 9 free p
    thread 2              free q seq 7          free p seq 9

In a program with one thread this is simply the order of the calls, and both halves of a realloc stand together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from heapledger.store.events import ALLOCATOR_KINDS, COLUMNS, Events, Kind
from heapledger.store.reader import Trace

U64 = npt.NDArray[np.uint64]

_NEW_KINDS = np.array(sorted(ALLOCATOR_KINDS - {Kind.FREE, Kind.REALLOC}), np.uint8)


@dataclass(slots=True, frozen=True)
class Operations:
    """What happened to blocks, in order: + taken, - given back, < and > the halves of a realloc, ! one that failed."""

    key: U64  #: the sequence number at which it took effect
    mark: npt.NDArray[np.uint8]  #: the ASCII code of the operation
    address: U64
    size: U64
    stack: npt.NDArray[np.uint32]

    def take(self, index: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> Operations:
        return Operations(self.key[index], self.mark[index], self.address[index], self.size[index], self.stack[index])

    def rows(self) -> Iterator[tuple[int, int, int, int]]:
        """(mark, address, size, stack) of each operation."""
        columns = (self.mark.tolist(), self.address.tolist(), self.size.tolist(), self.stack.tolist())
        return zip(*columns, strict=True)


def operations(trace: Trace, process_id: int) -> Iterator[Operations]:
    """All operations of a process in the order in which they took effect, a portion at a time."""
    rest: Operations | None = None
    for events in trace.events(process_id):
        found = _joined(([rest] if rest else []) + _operations_of(events))
        found = found.take(np.argsort(found.key, kind="stable"))
        # What took effect later than this portion's last entry may still be overtaken by the next one's.
        done = found.key <= events.seq[-1]
        yield found.take(done)
        rest = found.take(~done)
    if rest is not None:
        yield rest


def _joined(parts: list[Operations]) -> Operations:
    return Operations(
        np.concatenate([part.key for part in parts]),
        np.concatenate([part.mark for part in parts]),
        np.concatenate([part.address for part in parts]),
        np.concatenate([part.size for part in parts]),
        np.concatenate([part.stack for part in parts]),
    )


def _operations_of(events: Events) -> list[Operations]:
    """A call that never returned took nothing; one that failed "takes" address 0."""
    nothing = np.uint64(0)
    new = np.isin(events.kind, _NEW_KINDS)
    realloc = events.kind == Kind.REALLOC
    had, got = realloc & (events.arg != nothing), realloc & (events.addr != nothing)
    freed_by_zero = had & ~got & (events.size == nothing)
    returned = (events.seq_exit != nothing) | (events.addr != nothing)
    failed = had & ~got & ~freed_by_zero & returned
    entry, back = events.seq, np.maximum(events.seq_exit, events.seq)
    return [
        _part("+", back, events, (new | (realloc & ~had)) & returned, events.addr),
        _part("-", entry, events, (events.kind == Kind.FREE) & (events.addr != nothing), events.addr),
        _part("-", entry, events, freed_by_zero, events.arg),
        _part("<", entry, events, had & got, events.arg),
        _part(">", back, events, had & got, events.addr),
        _part("!", entry, events, failed, events.arg),
    ]


def _part(mark: str, key: U64, events: Events, which: npt.NDArray[np.bool_], address: U64) -> Operations:
    marks = np.full(int(np.count_nonzero(which)), ord(mark), np.uint8)
    return Operations(key[which], marks, address[which], events.size[which], events.stack[which])


def mtrace(trace: Trace, process_id: int) -> Iterator[str]:
    """A log as glibc's mtrace writes it; the system's `mtrace` script reads it. See tracer/mtrace.py for the format."""
    callers: dict[int, str] = {0: ""}
    yield "= Start\n"
    for found in operations(trace, process_id):
        for stack in np.unique(found.stack).tolist():
            if stack not in callers:
                callers[stack] = _caller(trace, process_id, stack)
        lines = []
        for mark, address, size, stack in found.rows():
            # As glibc prints them: %p of a null pointer, %#lx of a zero.
            amount = "" if mark in b"-<" else f" {size:#x}" if size else " 0"
            lines.append(f"{callers[stack]}{chr(mark)} {f'{address:#x}' if address else '(nil)'}{amount}\n")
        yield "".join(lines)
    yield "= End\n"


def _caller(trace: Trace, process_id: int, stack: int) -> str:
    """`@ ./app:(main)[0x1186] `: without blanks inside, at which the script would split it."""
    path, function, offset = trace.site(process_id, stack)
    if not path and not offset:
        return f"@ {''.join(function.split())} " if function else ""
    name = f"({function})" if function and not set(function) & set(" \t\r\n()[]:") else ""
    colon = ":" if path else ""
    return f"@ {''.join(path.split())}{colon}{name}[{offset:#x}] "


def folded(trace: Trace, process_id: int, *, live: bool) -> Iterator[str]:
    """`outermost;...;innermost bytes`, a line a stack: flamegraph.pl and speedscope read it.

    The bytes are all that were ever requested there, or (`live`) those that were not given back by the end.
    """
    for stack, size in sorted((_live_bytes if live else _requested_bytes)(trace, process_id).items()):
        frames = trace.stack(process_id, stack)
        names = [
            (frame.function or f"{frame.module}+{frame.address:#x}").replace(";", ":") for frame in reversed(frames)
        ]
        line = ";".join(" ".join(name.split()) for name in names) or "[no stack]"
        if size:
            yield f"{line} {size}\n"


def _requested_bytes(trace: Trace, process_id: int) -> Counter[int]:
    total: Counter[int] = Counter()
    for found in operations(trace, process_id):
        taken = np.isin(found.mark, np.frombuffer(b"+>", np.uint8)) & (found.address != np.uint64(0))
        stacks, where = np.unique(found.stack[taken], return_inverse=True)
        # Sums are made of integers: bincount's weights are floats, exact only up to 2**53.
        sums = np.zeros(len(stacks), np.uint64)
        np.add.at(sums, where, found.size[taken])
        total.update(dict(zip(stacks.tolist(), sums.tolist(), strict=True)))
    return total


def _live_bytes(trace: Trace, process_id: int) -> Counter[int]:
    live: dict[int, tuple[int, int]] = {}
    for found in operations(trace, process_id):
        for mark, address, size, stack in found.rows():
            if mark in b"+>":
                live[address] = (stack, size)
            elif mark in b"-<":
                live.pop(address, None)
    live.pop(0, None)  # calls that failed
    total: Counter[int] = Counter()
    for stack, size in live.values():
        total[stack] += size
    return total


def csv(trace: Trace, process_id: int) -> Iterator[str]:
    """Every event and every column as numbers; `kind` by name, addresses in hexadecimal."""
    yield ",".join(COLUMNS) + "\n"
    names = {int(kind): kind.name.lower() for kind in Kind}
    formats = [
        (lambda v: names.get(v, str(v))) if name == "kind" else hex if name == "addr" else str for name in COLUMNS
    ]
    for events in trace.events(process_id):
        columns = [map(form, getattr(events, name).tolist()) for form, name in zip(formats, COLUMNS, strict=True)]
        yield "".join(",".join(row) + "\n" for row in zip(*columns, strict=True))
