"""The tables of a trace file: one self-contained SQLite file a session (`application_id` 0x484c4447, "HLDG").

    session 1 ─── n process ─┬─ n thread        one a ring owner
                             ├─ n module        what was mapped when, with build-id and load bias
                             ├─ n node_block    16k nodes of the trie of call stacks, compressed
                             ├─ n event_block   64k events, compressed
                             ├─ n sample        /proc counters over time
                             ├─ n snapshot ──── n snapshot_vma    maps with VmFlags and residency, page for page
                             ├─ n pyramid       min/max levels of a series, made by the analyzer
                             └─ n fact          results, keyed by analyzer version
    frame (by module and offset) holds resolved symbols; a node's address is resolved through its module.

Identities: an event's `stack` is a node of its process (0: none). seq rises strictly from block to block of a process,
and so do nodes. The sum of a snapshot's rss_bytes over its VMAs is the snapshot's rss_bytes.

Times are ns of CLOCK_MONOTONIC since session.start_ns. Addresses are stored as signed 64-bit integers (SQLite has no
unsigned ones): in the file, values from 2**63 up are negative; the type `Address` widens them again.

`store.ddl` holds these tables as SQL text, so that writing a trace does not have to load SQLAlchemy.
"""

from __future__ import annotations

from typing import Annotated, Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    Text,
    TypeDecorator,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from heapledger.store.ddl import APPLICATION_ID, SCHEMA_VERSION

__all__ = ["APPLICATION_ID", "SCHEMA_VERSION", "Base"]


class Unsigned64(TypeDecorator[int]):
    """0 to 2**64 - 1 in Python, two's complement in the file."""

    impl = BigInteger().with_variant(Integer, "sqlite")
    cache_ok = True

    def process_bind_param(self, value: int | None, dialect: Dialect) -> int | None:
        return value if value is None or value < 1 << 63 else value - (1 << 64)

    def process_result_value(self, value: int | None, dialect: Dialect) -> int | None:
        return value if value is None or value >= 0 else value + (1 << 64)


Address = Annotated[int, mapped_column(Unsigned64)]


class Base(DeclarativeBase):
    type_annotation_map = {  # noqa: RUF012
        # SQLite's integers have 64 bits whatever they are called, but only INTEGER can be the key of the table's tree.
        int: BigInteger().with_variant(Integer, "sqlite"),
        str: Text,
        bytes: LargeBinary,
        dict[str, Any]: JSON,
        list[str]: JSON,
    }


class Session(Base):
    """One run of `heapledger run`, or one import. Exactly one row."""

    __tablename__ = "session"
    id: Mapped[int] = mapped_column(primary_key=True)
    heapledger_version: Mapped[str]
    source: Mapped[str]  # "run", "mtrace", "recover"
    command: Mapped[list[str]]
    cwd: Mapped[str]
    start_ns: Mapped[int]  # CLOCK_MONOTONIC at the start; 0 for imports
    start_unix_ns: Mapped[int]
    end_ns: Mapped[int | None]  # since start_ns; NULL: the session was cut off
    host: Mapped[dict[str, Any]]  # kernel, machine, cpus_online, thp, overcommit, page_size, hostname
    collector: Mapped[dict[str, Any]]  # cpu_s, rounds, spool_bytes, peak_rss_bytes, interval_s, options


class Process(Base):
    """One process image: a program from its start, fork or exec to its end."""

    __tablename__ = "process"
    id: Mapped[int] = mapped_column(primary_key=True)
    pid: Mapped[int]
    image: Mapped[int]  # N of the spool folder PID.N
    parent_id: Mapped[int | None] = mapped_column(ForeignKey("process.id"))
    start: Mapped[str]  # "start" (the command itself), "fork", "exec", "import"
    fork_seq: Mapped[int | None]  # of the parent, for "fork": the child begins with what the parent had before this seq
    exe: Mapped[str]
    argv: Mapped[list[str]]
    environment: Mapped[dict[str, Any]]  # only what matters: GLIBC_TUNABLES, MALLOC_*, LD_*
    libc_path: Mapped[str]
    libc_build_id: Mapped[str]
    libc_version: Mapped[str]  # "2.36"; "" if not known
    start_break: Mapped[Address]  # sbrk(0) before the first event; 0 if not known
    start_ns: Mapped[int]
    end_ns: Mapped[int | None]
    end: Mapped[str]  # "", "exit", "_exit", "quick_exit", "exec", "signal", "stopped", "running", "vanished"
    exit_status: Mapped[int | None]  # as from waitpid where we are the parent, else from the EXIT event
    self_low: Mapped[Address]  # the shim's own memory
    self_high: Mapped[Address]
    page_size: Mapped[int]
    events: Mapped[int]
    lost: Mapped[int]  # events known to be missing
    sample_bytes: Mapped[int]  # mean bytes between recorded allocations (Poisson by bytes); 0: all were recorded
    notes: Mapped[list[str]]  # what went wrong, a line each


class Thread(Base):
    __tablename__ = "thread"
    __table_args__ = (UniqueConstraint("process_id", "number"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    process_id: Mapped[int] = mapped_column(ForeignKey("process.id"))
    number: Mapped[int]  # the events' `thread` column
    tid: Mapped[int]
    name: Mapped[str]
    thread_pointer: Mapped[Address]
    stack_low: Mapped[Address]
    stack_high: Mapped[Address]
    start_ns: Mapped[int | None]
    end_ns: Mapped[int | None]


class Module(Base):
    __tablename__ = "module"
    __table_args__ = (UniqueConstraint("process_id", "number"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    process_id: Mapped[int] = mapped_column(ForeignKey("process.id"))
    number: Mapped[int]  # as the shim counts; -1 for ddl.JIT
    path: Mapped[str]
    build_id: Mapped[str]
    bias: Mapped[Address]
    low: Mapped[Address]
    high: Mapped[Address]
    load_seq: Mapped[int]
    unload_seq: Mapped[int | None]


class NodeBlock(Base):
    """Up to 16,384 nodes of the trie of call stacks: node, parent (0: outermost), address and module of each.

    A node is the frame `address` (a return address; 1: frames were cut here; 2: the unwinder lost its way) called from
    the frame `parent`. See `store.blocks`; `crc` is its `checksum`.
    """

    __tablename__ = "node_block"
    id: Mapped[int] = mapped_column(primary_key=True)
    process_id: Mapped[int] = mapped_column(ForeignKey("process.id"), index=True)
    count: Mapped[int]
    first_node: Mapped[int]
    last_node: Mapped[int]
    crc: Mapped[int]
    data: Mapped[bytes]


class Frame(Base):
    """What an address in a module means. `depth` 0 is the innermost inlined function, the last the real one."""

    __tablename__ = "frame"
    __table_args__ = (Index("frame_by_offset", "module_id", "offset", "depth", unique=True),)
    id: Mapped[int] = mapped_column(primary_key=True)
    module_id: Mapped[int] = mapped_column(ForeignKey("module.id"))
    offset: Mapped[Address]  # return address - bias (the symbol is the one at offset - 1)
    depth: Mapped[int]
    function: Mapped[str]  # demangled; "" if not known
    file: Mapped[str | None]
    line: Mapped[int | None]


class EventBlock(Base):
    """Up to 65,536 events of one process in seq order. See `store.blocks`; `crc` is its `checksum`."""

    __tablename__ = "event_block"
    id: Mapped[int] = mapped_column(primary_key=True)
    process_id: Mapped[int] = mapped_column(ForeignKey("process.id"), index=True)
    count: Mapped[int]
    first_seq: Mapped[int]
    last_seq: Mapped[int]
    first_ns: Mapped[int]
    last_ns: Mapped[int]
    crc: Mapped[int]
    data: Mapped[bytes]


class Sample(Base):
    """Counters of /proc/PID at one moment. Bytes, except the fault counts; NULL where it was not read."""

    __tablename__ = "sample"
    id: Mapped[int] = mapped_column(primary_key=True)
    process_id: Mapped[int] = mapped_column(ForeignKey("process.id"), index=True)
    time_ns: Mapped[int]
    rss: Mapped[int]
    rss_anon: Mapped[int | None]
    rss_file: Mapped[int | None]
    rss_shmem: Mapped[int | None]
    pss: Mapped[int | None]
    swap: Mapped[int | None]
    vm_size: Mapped[int | None]
    vm_hwm: Mapped[int | None]
    vm_pte: Mapped[int | None]
    minor_faults: Mapped[int | None]
    major_faults: Mapped[int | None]
    threads: Mapped[int | None]


class Snapshot(Base):
    """Where every page was at one moment. `seq`: events with a smaller one had been entered."""

    __tablename__ = "snapshot"
    id: Mapped[int] = mapped_column(primary_key=True)
    process_id: Mapped[int] = mapped_column(ForeignKey("process.id"), index=True)
    reason: Mapped[str]  # "start" (maps and smaps' sums only, no pages), "exit", "peak", "request", "exec"
    time_ns: Mapped[int]
    seq: Mapped[int]
    rss_bytes: Mapped[int]  # smaps: the sum of Rss
    pss_bytes: Mapped[int]
    pagemap_bytes: Mapped[int]  # pages that count as resident by pagemap (present, not the zero page)
    page_tables_bytes: Mapped[int | None]  # VmPTE
    threads: Mapped[int | None]
    method: Mapped[str]  # "pagemap_scan", "pagemap", "smaps"
    consistent: Mapped[bool]  # nothing moved while it was read (stopped or held, or two equal readings)
    pause_ns: Mapped[int]  # how long the process was held for it


class SnapshotVma(Base):
    """One line of /proc/PID/smaps and the residency of its pages."""

    __tablename__ = "snapshot_vma"
    snapshot_id: Mapped[int] = mapped_column(ForeignKey("snapshot.id"), primary_key=True)
    start: Mapped[Address] = mapped_column(Unsigned64, primary_key=True)
    end: Mapped[Address]
    perms: Mapped[str]
    offset: Mapped[Address]
    device: Mapped[str]
    inode: Mapped[int]
    path: Mapped[str]
    vm_flags: Mapped[str]
    rss_bytes: Mapped[int]
    pss_bytes: Mapped[int]
    swap_bytes: Mapped[int]
    private_bytes: Mapped[int]  # Private_Clean + Private_Dirty
    anonymous_bytes: Mapped[int]
    runs: Mapped[bytes]  # store.residency: runs of pages of one category


class Pyramid(Base):
    """A level of a min/max pyramid over a series. `data`: store.pyramid's layout; level 0 is the finest."""

    __tablename__ = "pyramid"
    process_id: Mapped[int] = mapped_column(ForeignKey("process.id"), primary_key=True)
    series: Mapped[str] = mapped_column(primary_key=True)
    level: Mapped[int] = mapped_column(primary_key=True)
    analyzer_version: Mapped[str]
    buckets: Mapped[int]
    crc: Mapped[int]
    data: Mapped[bytes]


class Fact(Base):
    """A result of the analyzer, rebuilt when `analyzer_version` is not the current one."""

    __tablename__ = "fact"
    process_id: Mapped[int] = mapped_column(ForeignKey("process.id"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    analyzer_version: Mapped[str]
    value: Mapped[dict[str, Any]]
