"""What the kinds of owners are called on the page, what they mean, and in which order the waterfall goes through them.

A family shares a colour. The order is the ledger's priority, from what the program asked for to what nobody owns.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KindText:
    label: str
    family: str
    meaning: str


KINDS: dict[str, KindText] = {
    "live": KindText("Live blocks", "live", "Bytes that the program asked for and has not freed."),
    "chunk_overhead": KindText("Chunk headers and rounding", "overhead", "What malloc adds to each live block."),
    "tcache": KindText("Thread caches", "cache", "Freed blocks that malloc keeps at hand for the thread (tcache)."),
    "fastbin": KindText("Fast bins", "cache", "Small freed blocks that malloc has not merged yet."),
    "hole_pinned": KindText("Holes, pinned", "hole-pinned", "Free, on pages shared with a block in use."),
    "hole_reclaimable": KindText("Holes, whole pages", "hole-free", "Free and resident: whole pages could go back."),
    "unsampled": KindText("Free or not sampled", "hole-free", "Heap that the recorded blocks do not stand for."),
    "top": KindText("Top of the heap", "top", "Free space at the end of the heap, not yet given back."),
    "arena": KindText("malloc's own tables", "arena", "Arena headers, thread cache tables, fence posts."),
    "arena_unmodelled": KindText("Thread arenas, unmodelled", "arena", "Rest of arenas that the model does not cover."),
    "foreign_sbrk": KindText("Foreign sbrk", "arena", "Heap space that someone else took with sbrk."),
    "mmap": KindText("mmap by the program", "mapping", "Anonymous memory mapped by a call site."),
    "file_mapping": KindText("Mapped files", "mapping", "Pages of files that are not libraries."),
    "shm": KindText("Shared memory", "mapping", "Pages of shared memory."),
    "stack": KindText("Main stack", "stack", "The stack of the main thread."),
    "thread_stack": KindText("Thread stacks", "stack", "Stacks of other threads."),
    "tls": KindText("Thread-local storage", "stack", "TLS blocks outside of thread stacks."),
    "library_text": KindText("Library code", "library", "Machine code of the program and its libraries."),
    "library_rodata": KindText("Library constants", "library", "Read-only data of program and libraries."),
    "library_data": KindText("Library data", "library", "Initialised variables of program and libraries."),
    "library_relro": KindText("Library relocations", "library", "Read-only after relocation."),
    "library_bss": KindText("Library bss", "library", "Zeroed variables of program and libraries."),
    "private_copy": KindText("Private copies", "library", "Pages of a file that were written to, and so copied."),
    "loader": KindText("Loader", "library", "Anonymous memory of ld.so."),
    "vdso": KindText("vdso", "library", "The kernel's own page in the process."),
    "self": KindText("heapledger itself", "self", "The tracer's pages in the traced process."),
    "smaps_difference": KindText("smaps less pagemap", "self", "What smaps counts and the page map does not."),
    "unexplained": KindText("Unexplained", "unexplained", "Resident pages that no owner could be found for."),
}

#: What kinds of one family are called together, where each of them is too small for a bar of its own.
SMALL_PARTS = {
    "cache": "Caches of malloc",
    "arena": "malloc's own tables",
    "mapping": "Small mappings",
    "stack": "Stacks and thread storage",
    "library": "Other parts of libraries",
    "self": "heapledger itself",
}

#: Position of a kind in the waterfall; kinds that are not known here stand before `unexplained`.
ORDER = {kind: position for position, kind in enumerate(KINDS)}
UNKNOWN_POSITION = ORDER["unexplained"] - 0.5


def kind_text(kind: str) -> KindText:
    """Texts for a kind; one that a newer analyzer brings is shown by its own name."""
    return KINDS.get(kind) or KindText(kind.replace("_", " ").capitalize(), "other", "")


def position(kind: str) -> float:
    return ORDER.get(kind, UNKNOWN_POSITION)
