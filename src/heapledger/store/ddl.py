"""The tables of `store.schema` as SQL text, for writers that must start fast: loading SQLAlchemy takes 0.2 s.

`python -m heapledger.store.ddl` rewrites TABLES from the models; a test fails when the two differ.
"""

from __future__ import annotations

from pathlib import Path

APPLICATION_ID = 0x484C4447
#: Raised whenever a table or a codec changes; files of other versions are refused.
SCHEMA_VERSION = 3
#: The path of the module that code belongs to which is in no object: what JIT compilers made. Its bias is 0.
JIT = "[JIT]"


def render() -> str:
    """The CREATE statements for the models in `store.schema`."""
    from sqlalchemy.dialects import sqlite
    from sqlalchemy.schema import CreateIndex, CreateTable

    from heapledger.store.schema import Base

    statements = []
    for table in Base.metadata.sorted_tables:
        statements.append(str(CreateTable(table).compile(dialect=sqlite.dialect())))
        for index in sorted(table.indexes, key=lambda index: str(index.name)):
            statements.append(str(CreateIndex(index).compile(dialect=sqlite.dialect())))
    lines = ";\n".join(statement.strip().replace("\t", "    ") for statement in statements).splitlines()
    return "\n".join(line.rstrip() for line in lines) + ";\n"


TABLES = """\
CREATE TABLE process (
    id INTEGER NOT NULL,
    pid INTEGER NOT NULL,
    image INTEGER NOT NULL,
    parent_id INTEGER,
    start TEXT NOT NULL,
    fork_seq INTEGER,
    exe TEXT NOT NULL,
    argv JSON NOT NULL,
    environment JSON NOT NULL,
    libc_path TEXT NOT NULL,
    libc_build_id TEXT NOT NULL,
    libc_version TEXT NOT NULL,
    start_break INTEGER NOT NULL,
    start_ns INTEGER NOT NULL,
    end_ns INTEGER,
    "end" TEXT NOT NULL,
    exit_status INTEGER,
    self_low INTEGER NOT NULL,
    self_high INTEGER NOT NULL,
    page_size INTEGER NOT NULL,
    events INTEGER NOT NULL,
    lost INTEGER NOT NULL,
    sample_bytes INTEGER NOT NULL,
    notes JSON NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY(parent_id) REFERENCES process (id)
);
CREATE TABLE session (
    id INTEGER NOT NULL,
    heapledger_version TEXT NOT NULL,
    source TEXT NOT NULL,
    command JSON NOT NULL,
    cwd TEXT NOT NULL,
    start_ns INTEGER NOT NULL,
    start_unix_ns INTEGER NOT NULL,
    end_ns INTEGER,
    host JSON NOT NULL,
    collector JSON NOT NULL,
    PRIMARY KEY (id)
);
CREATE TABLE event_block (
    id INTEGER NOT NULL,
    process_id INTEGER NOT NULL,
    count INTEGER NOT NULL,
    first_seq INTEGER NOT NULL,
    last_seq INTEGER NOT NULL,
    first_ns INTEGER NOT NULL,
    last_ns INTEGER NOT NULL,
    crc INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY(process_id) REFERENCES process (id)
);
CREATE INDEX ix_event_block_process_id ON event_block (process_id);
CREATE TABLE fact (
    process_id INTEGER NOT NULL,
    name TEXT NOT NULL,
    analyzer_version TEXT NOT NULL,
    value JSON NOT NULL,
    PRIMARY KEY (process_id, name),
    FOREIGN KEY(process_id) REFERENCES process (id)
);
CREATE TABLE module (
    id INTEGER NOT NULL,
    process_id INTEGER NOT NULL,
    number INTEGER NOT NULL,
    path TEXT NOT NULL,
    build_id TEXT NOT NULL,
    bias INTEGER NOT NULL,
    low INTEGER NOT NULL,
    high INTEGER NOT NULL,
    load_seq INTEGER NOT NULL,
    unload_seq INTEGER,
    PRIMARY KEY (id),
    UNIQUE (process_id, number),
    FOREIGN KEY(process_id) REFERENCES process (id)
);
CREATE TABLE node_block (
    id INTEGER NOT NULL,
    process_id INTEGER NOT NULL,
    count INTEGER NOT NULL,
    first_node INTEGER NOT NULL,
    last_node INTEGER NOT NULL,
    crc INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY(process_id) REFERENCES process (id)
);
CREATE INDEX ix_node_block_process_id ON node_block (process_id);
CREATE TABLE pyramid (
    process_id INTEGER NOT NULL,
    series TEXT NOT NULL,
    level INTEGER NOT NULL,
    analyzer_version TEXT NOT NULL,
    buckets INTEGER NOT NULL,
    crc INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (process_id, series, level),
    FOREIGN KEY(process_id) REFERENCES process (id)
);
CREATE TABLE sample (
    id INTEGER NOT NULL,
    process_id INTEGER NOT NULL,
    time_ns INTEGER NOT NULL,
    rss INTEGER NOT NULL,
    rss_anon INTEGER,
    rss_file INTEGER,
    rss_shmem INTEGER,
    pss INTEGER,
    swap INTEGER,
    vm_size INTEGER,
    vm_hwm INTEGER,
    vm_pte INTEGER,
    minor_faults INTEGER,
    major_faults INTEGER,
    threads INTEGER,
    PRIMARY KEY (id),
    FOREIGN KEY(process_id) REFERENCES process (id)
);
CREATE INDEX ix_sample_process_id ON sample (process_id);
CREATE TABLE snapshot (
    id INTEGER NOT NULL,
    process_id INTEGER NOT NULL,
    reason TEXT NOT NULL,
    time_ns INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    rss_bytes INTEGER NOT NULL,
    pss_bytes INTEGER NOT NULL,
    pagemap_bytes INTEGER NOT NULL,
    page_tables_bytes INTEGER,
    threads INTEGER,
    method TEXT NOT NULL,
    consistent BOOLEAN NOT NULL,
    pause_ns INTEGER NOT NULL,
    PRIMARY KEY (id),
    FOREIGN KEY(process_id) REFERENCES process (id)
);
CREATE INDEX ix_snapshot_process_id ON snapshot (process_id);
CREATE TABLE thread (
    id INTEGER NOT NULL,
    process_id INTEGER NOT NULL,
    number INTEGER NOT NULL,
    tid INTEGER NOT NULL,
    name TEXT NOT NULL,
    thread_pointer INTEGER NOT NULL,
    stack_low INTEGER NOT NULL,
    stack_high INTEGER NOT NULL,
    start_ns INTEGER,
    end_ns INTEGER,
    PRIMARY KEY (id),
    UNIQUE (process_id, number),
    FOREIGN KEY(process_id) REFERENCES process (id)
);
CREATE TABLE frame (
    id INTEGER NOT NULL,
    module_id INTEGER NOT NULL,
    "offset" INTEGER NOT NULL,
    depth INTEGER NOT NULL,
    function TEXT NOT NULL,
    file TEXT,
    line INTEGER,
    PRIMARY KEY (id),
    FOREIGN KEY(module_id) REFERENCES module (id)
);
CREATE UNIQUE INDEX frame_by_offset ON frame (module_id, "offset", depth);
CREATE TABLE snapshot_vma (
    snapshot_id INTEGER NOT NULL,
    start INTEGER NOT NULL,
    "end" INTEGER NOT NULL,
    perms TEXT NOT NULL,
    "offset" INTEGER NOT NULL,
    device TEXT NOT NULL,
    inode INTEGER NOT NULL,
    path TEXT NOT NULL,
    vm_flags TEXT NOT NULL,
    rss_bytes INTEGER NOT NULL,
    pss_bytes INTEGER NOT NULL,
    swap_bytes INTEGER NOT NULL,
    private_bytes INTEGER NOT NULL,
    anonymous_bytes INTEGER NOT NULL,
    runs BLOB NOT NULL,
    PRIMARY KEY (snapshot_id, start),
    FOREIGN KEY(snapshot_id) REFERENCES snapshot (id)
);
"""


def main() -> None:
    path = Path(__file__)
    head, marker, rest = path.read_text().partition('\nTABLES = """\\\n')
    path.write_text(head + marker + render() + rest[rest.index('"""') :])


if __name__ == "__main__":
    main()
