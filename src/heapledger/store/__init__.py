"""The trace file: the only thing that passes from capture to analysis.

    events.py     what an event is, and the columns it travels in
    schema.py     the tables (SQLAlchemy models)      ddl.py    the same as SQL text, for writers that start fast
    codec.h       64k events as streams that hold only what cannot be predicted      node_codec.h  nodes of stacks
    blocks.py     streams as compressed blobs    planes.py byte planes and zstd, opened with bounds
    residency.py  runs of pages of one category       pyramid.py  timelines that keep every extreme
    writer.py     TraceWriter: while a program runs   background.py  the thread that encodes and writes events
    files.py      what is checked when a file is opened
    reader.py     Trace: everything that reads
    sql.py        events as rows of a virtual table   export.py the trace as other tools' text

`docs/trace-file.md` describes the file for other programs.
"""
