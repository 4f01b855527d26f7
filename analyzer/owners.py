"""Who owns memory that is not malloc's: every mapping, cut into pieces that each have one owner.

Pieces of a mapping tile it: they are disjoint, and cover it. Priority where two claims meet (design, "The ledger"): the
tracer's own memory, thread control blocks and stacks, an object's bss, the program's own mmap calls, heaps of other
arenas, and what ld.so made for itself. Blocks of malloc lie on top of the pieces; the ledger takes them out of them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from heapledger.analyzer.kernel.mappings import Region
from heapledger.analyzer.kernel.vma import Vma

PAGE = 4096
#: Heaps of non-main arenas lie at multiples of this (glibc: HEAP_MAX_SIZE on 64 bit).
ARENA_HEAP = 64 << 20
#: glibc's struct pthread and the static TLS around it fit in here; what is farther from a thread pointer is not TLS.
_TLS_BELOW, _TLS_ABOVE = 256 << 10, 64 << 10
#: ld.so allocates its own tables (before malloc works) in small anonymous pieces between the objects.
_LOADER_MAX = 1 << 20
#: A file of a spool image folder, PID.N/..., drawn in preload/spool.h.
_SPOOL_FILE = re.compile(r"/\d+\.\d+/(control|ring\.\d+|stacks\.\d+|log|maps\.start)(\.new)?( \(deleted\))?$")
SHIM = "libheapledger.so"
#: Where malloc's blocks can lie in a sampled trace: names of the pieces of kind `unsampled`.
HEAP, OTHER_ARENAS, ANONYMOUS = "heap", "heaps of other arenas", "anonymous mappings"


class OwnerKind(StrEnum):
    """Stable names of docs/json.md."""

    LIVE = "live"
    CHUNK_OVERHEAD = "chunk_overhead"
    TCACHE = "tcache"
    FASTBIN = "fastbin"
    HOLE_RECLAIMABLE = "hole_reclaimable"
    HOLE_PINNED = "hole_pinned"
    TOP = "top"
    ARENA = "arena"
    ARENA_UNMODELLED = "arena_unmodelled"
    FOREIGN_SBRK = "foreign_sbrk"
    STACK = "stack"
    THREAD_STACK = "thread_stack"
    TLS = "tls"
    LIBRARY_TEXT = "library_text"
    LIBRARY_RODATA = "library_rodata"
    LIBRARY_RELRO = "library_relro"
    LIBRARY_DATA = "library_data"
    LIBRARY_BSS = "library_bss"
    PRIVATE_COPY = "private_copy"
    FILE_MAPPING = "file_mapping"
    MMAP = "mmap"
    SHM = "shm"
    VDSO = "vdso"
    LOADER = "loader"
    SELF = "self"
    UNSAMPLED = "unsampled"
    UNEXPLAINED = "unexplained"


@dataclass(frozen=True, slots=True)
class Piece:
    """A part [start, end) of one mapping. `copies`: anonymous pages in it are private copies of a file's."""

    start: int
    end: int
    kind: OwnerKind
    name: str
    stack: int = 0
    time: int = 0
    copies: bool = False


@dataclass(frozen=True, slots=True)
class ModuleSpan:
    """An object in memory: [low, high) holds all of its segments."""

    path: str
    low: int
    high: int


@dataclass(frozen=True, slots=True)
class ThreadSpan:
    """What is known of a thread's memory; zeros where it is not known."""

    number: int
    name: str
    thread_pointer: int
    stack_low: int
    stack_high: int

    @property
    def label(self) -> str:
        return f"thread {self.number}" + (f" ({self.name})" if self.name else "")


@dataclass(slots=True)
class Claims:
    """All that is known about memory beside malloc's blocks, at one moment."""

    modules: Sequence[ModuleSpan] = ()
    threads: Sequence[ThreadSpan] = ()
    regions: Sequence[Region] = ()
    self_low: int = 0
    self_high: int = 0
    heap_start: int = 0  #: of the main heap; 0: none
    heap_end: int = 0
    arena_blocks: Sequence[int] = ()  #: ascending addresses of live blocks of arenas that are not modelled
    #: Anonymous memory there was before the program's first call, [start, end) each; None: nobody looked then.
    at_start: Sequence[tuple[int, int]] | None = None
    page_size: int = PAGE
    #: The trace holds a sample of malloc's blocks: where its heaps are is known only from the kernel.
    sampled: bool = False
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Claim:
    start: int
    end: int
    kind: OwnerKind
    name: str
    stack: int = 0
    time: int = 0


class _Layer:
    """Claims of one priority: disjoint, by ascending address. The earlier of two that overlap is cut."""

    def __init__(self, claims: Iterable[_Claim]) -> None:
        self._claims: list[_Claim] = []
        for claim in sorted(claims, key=lambda c: c.start):
            if self._claims and self._claims[-1].end > claim.start:
                before = self._claims.pop()
                if before.start < claim.start:
                    self._claims.append(_Claim(before.start, claim.start, before.kind, before.name, before.stack))
            if claim.start < claim.end:
                self._claims.append(claim)
        self._starts = [claim.start for claim in self._claims]

    def overlapping(self, start: int, end: int) -> Iterable[_Claim]:
        """Claims that touch [start, end), clipped to it."""
        at = max(bisect_right(self._starts, start) - 1, 0)
        for i in range(at, len(self._claims)):
            claim = self._claims[i]
            if claim.start >= end:
                return
            if claim.end > start:
                yield _Claim(
                    max(claim.start, start), min(claim.end, end), claim.kind, claim.name, claim.stack, claim.time
                )


def tile(vmas: Sequence[Vma], claims: Claims) -> list[Piece]:
    """Pieces that tile every mapping, by ascending address."""
    layers = _layers(claims, vmas)
    files = _object_paths(vmas, claims.modules)
    pieces: list[Piece] = []
    for index, vma in enumerate(vmas):
        if vma.is_anonymous and not _is_own_name(vma.path):
            pieces += _tile_anonymous(vma, layers, _rest_of(vma, index, vmas, claims))
        else:
            pieces.append(_named_piece(vma, index, vmas, files, claims))
    return pieces


def _is_own_name(path: str) -> bool:
    return path == "[stack]"


def _tile_anonymous(vma: Vma, layers: Sequence[_Layer], rest: tuple[OwnerKind, str]) -> list[Piece]:
    """Paints the layers, the strongest first, each into what the ones before left open; `rest` gets what remains."""
    pieces: list[Piece] = []
    gaps = [(vma.start, vma.end)]
    for layer in layers:
        left: list[tuple[int, int]] = []
        for start, end in gaps:
            at = start
            for claim in layer.overlapping(start, end):
                if at < claim.start:
                    left.append((at, claim.start))
                pieces.append(Piece(claim.start, claim.end, claim.kind, claim.name, claim.stack, claim.time))
                at = claim.end
            if at < end:
                left.append((at, end))
        gaps = left
        if not gaps:
            break
    pieces += [Piece(start, end, *rest) for start, end in gaps]
    return sorted(pieces, key=lambda p: p.start)


def _layers(claims: Claims, vmas: Sequence[Vma]) -> list[_Layer]:
    """The claims on anonymous memory, the strongest first."""
    own = [_Claim(claims.self_low, claims.self_high, OwnerKind.SELF, "shim memory")]
    mapped = (_Claim(r.start, r.end, OwnerKind.MMAP, "", r.stack, r.time) for r in claims.regions)
    return [
        _Layer(own),
        _Layer(_thread_tls(claims)),
        _Layer(_thread_stacks(claims)),
        _Layer(_brk(claims, vmas)),
        _Layer(_bss(claims)),
        _Layer(mapped),
        _Layer(_main_tls(claims, vmas)),
        _Layer(_Claim(start, end, OwnerKind.LOADER, "ld.so") for start, end in claims.at_start or ()),
    ]


def _thread_tls(claims: Claims) -> Iterable[_Claim]:
    """TLS at the high end of a stack that libc made: from the page of the thread pointer up (an estimate by a page)."""
    for thread in claims.threads:
        if thread.stack_low < thread.thread_pointer < thread.stack_high:
            low = thread.thread_pointer & -claims.page_size
            yield _Claim(max(low, thread.stack_low), thread.stack_high, OwnerKind.TLS, thread.label)


def _thread_stacks(claims: Claims) -> Iterable[_Claim]:
    """Stacks in anonymous memory: of all threads but one that runs on the kernel's [stack]."""
    for thread in claims.threads:
        if thread.stack_low < thread.stack_high:
            yield _Claim(thread.stack_low, thread.stack_high, OwnerKind.THREAD_STACK, thread.label)


def _main_tls(claims: Claims, vmas: Sequence[Vma]) -> Iterable[_Claim]:
    """TLS that ld.so or libc mapped apart: the mapping around a thread pointer, within the reach of TLS."""
    starts = [vma.start for vma in vmas]
    for thread in claims.threads:
        pointer = thread.thread_pointer
        if not pointer or thread.stack_low <= pointer < thread.stack_high:
            continue
        at = bisect_right(starts, pointer) - 1
        if at >= 0 and pointer < vmas[at].end:
            low, high = pointer - _TLS_BELOW & -claims.page_size, pointer + _TLS_ABOVE & -claims.page_size
            yield _Claim(max(low, vmas[at].start), min(high, vmas[at].end), OwnerKind.TLS, thread.label)


def _brk(claims: Claims, vmas: Sequence[Vma]) -> Iterable[_Claim]:
    """The main heap and what the kernel's [heap] has behind it: chunks are the ledger's, the rest is nobody's."""
    if claims.heap_start < claims.heap_end:
        ends = [vma.end for vma in vmas if vma.path == "[heap]" and vma.end > claims.heap_start]
        end = max([_up(claims.heap_end, claims.page_size), *ends])
        yield _Claim(claims.heap_start, end, OwnerKind.UNEXPLAINED, "[heap]")


def _bss(claims: Claims) -> Iterable[_Claim]:
    """Anonymous memory inside an object: what its file does not cover."""
    for module in claims.modules:
        end = _up(module.high, claims.page_size)
        if module.path.endswith("/" + SHIM):
            yield _Claim(module.low, end, OwnerKind.SELF, SHIM)
        else:
            yield _Claim(module.low, end, OwnerKind.LIBRARY_BSS, module.path)


def _rest_of(vma: Vma, index: int, vmas: Sequence[Vma], claims: Claims) -> tuple[OwnerKind, str]:
    """Who owns what nobody claimed of an anonymous mapping."""
    if vma.path == "[heap]":
        if claims.sampled:
            return OwnerKind.UNSAMPLED, HEAP
        # Below malloc's first chunk (what lies behind its top is claimed): taken by somebody else's brk.
        return OwnerKind.FOREIGN_SBRK, ""
    if _is_arena_heap(vma, index, vmas, claims.arena_blocks):
        return (OwnerKind.UNSAMPLED, OTHER_ARENAS) if claims.sampled else (OwnerKind.ARENA_UNMODELLED, "")
    small = claims.at_start is None and not vma.path and vma.end - vma.start <= _LOADER_MAX
    if small and _between_objects(vma, claims.modules):
        return OwnerKind.LOADER, "ld.so"
    if claims.sampled and not vma.path:
        return OwnerKind.UNSAMPLED, ANONYMOUS
    return OwnerKind.UNEXPLAINED, vma.path or "anonymous"


def _is_arena_heap(vma: Vma, index: int, vmas: Sequence[Vma], blocks: Sequence[int]) -> bool:
    """A heap of another arena: 64 MiB-aligned, and it holds a block of one, or is followed by the unused part of one.

    The unused part is one PROT_NONE mapping up to the next 64 MiB border (glibc reserves whole heaps).
    """
    if blocks:
        # Only blocks known not to lie in the main heap are listed, so one inside is proof enough.
        at = bisect_right(blocks, vma.start)
        if at < len(blocks) and blocks[at] < vma.end:
            return True
    if vma.start % ARENA_HEAP or not vma.is_writable:
        return False
    border = vma.start + ARENA_HEAP
    after = vmas[index + 1] if index + 1 < len(vmas) else None
    return vma.end == border or (
        after is not None
        and after.start == vma.end
        and after.is_anonymous
        and not after.is_accessible
        and after.end >= border
    )


def _between_objects(vma: Vma, modules: Sequence[ModuleSpan]) -> bool:
    """In the area where ld.so maps shared objects: at most its own allowance away from one of them."""
    return any(m.low - _LOADER_MAX <= vma.end and vma.start <= m.high + _LOADER_MAX for m in modules)


def _object_paths(vmas: Sequence[Vma], modules: Sequence[ModuleSpan]) -> set[str]:
    """Paths of files that are objects: listed as modules, or mapped executable."""
    return {m.path for m in modules} | {vma.path for vma in vmas if vma.is_file and vma.is_executable}


def _named_piece(vma: Vma, index: int, vmas: Sequence[Vma], objects: set[str], claims: Claims) -> Piece:
    """The owner of a mapping that its name, or its file, tells."""
    path = vma.path.removesuffix(" (deleted)")
    if _SPOOL_FILE.search(vma.path) or (claims.self_low <= vma.start and vma.end <= claims.self_high):
        return Piece(vma.start, vma.end, OwnerKind.SELF, "spool")
    if path.endswith("/" + SHIM):
        return Piece(vma.start, vma.end, OwnerKind.SELF, SHIM)
    if vma.path == "[stack]":
        return Piece(vma.start, vma.end, OwnerKind.STACK, "main")
    if vma.is_kernel:
        return Piece(vma.start, vma.end, OwnerKind.VDSO, "[vdso]" if vma.path == "[vdso]" else vma.path)
    if vma.is_shm:
        return Piece(vma.start, vma.end, OwnerKind.SHM, vma.path or "shared anonymous")
    if vma.path in objects or path in objects:
        kind = _segment(vma, index, vmas)
        copies = kind in (OwnerKind.LIBRARY_TEXT, OwnerKind.LIBRARY_RODATA)
        return Piece(vma.start, vma.end, kind, path, copies=copies)
    return Piece(vma.start, vma.end, OwnerKind.FILE_MAPPING, vma.path, copies=not vma.is_shared)


def _segment(vma: Vma, index: int, vmas: Sequence[Vma]) -> OwnerKind:
    """Which part of an object a mapping of it is.

    RELRO is read-only memory that was written while it was relocated: its pages are anonymous, and it lies directly
    below the object's writable data, or stands last where there is none.
    """
    if vma.is_executable:
        return OwnerKind.LIBRARY_TEXT
    if vma.is_writable:
        return OwnerKind.LIBRARY_DATA
    after = vmas[index + 1] if index + 1 < len(vmas) else None
    same_file_follows = after is not None and after.start == vma.end and after.path == vma.path
    last_read_only = not same_file_follows or (after is not None and after.is_writable)
    if vma.anonymous_bytes and last_read_only:
        return OwnerKind.LIBRARY_RELRO
    return OwnerKind.LIBRARY_RODATA


def _up(address: int, page_size: int) -> int:
    return (address + page_size - 1) & -page_size
