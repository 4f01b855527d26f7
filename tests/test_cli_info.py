"""`heapledger info`, `import` and `export` as a user meets them."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from heapledger.store.events import Events, Kind
from heapledger.store.writer import TraceWriter

Run = Callable[..., subprocess.CompletedProcess[str]]


def some_events(count: int) -> Events:
    events = Events.empty(count)
    events.seq = 1 + 2 * np.arange(count, dtype=np.uint64)
    events.seq_exit = events.seq + np.uint64(1)
    events.kind[:] = np.where(np.arange(count) % 4 == 3, Kind.FREE, Kind.MALLOC)
    events.addr = np.uint64(0x1000) + np.arange(count, dtype=np.uint64) * np.uint64(32)
    events.size[:] = 24
    return events


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "t.heapledger"
    with TraceWriter(path, source="run", command=["sh", "-c", "x\x1b[31m y"], host={"kernel": "6.1"}) as writer:
        shell = writer.add_process(pid=10, exe="/bin/sh", argv=["sh"], end="exit", exit_status=3, end_ns=2_000_000)
        child = writer.add_process(
            pid=11,
            exe="/bin/evil\x1b]0;title\x07",
            parent_id=shell,
            start="fork",
            start_ns=1000,
            lost=5,
            libc_version="2.36",
        )
        writer.append_events(shell, some_events(8))
        writer.append_events(child, some_events(100_000))
        writer.add_note(child, "5 events were lost")
        writer.add_sample(child, time_ns=5, rss=3 << 20)
        writer.add_snapshot(child, [], reason="exit", time_ns=900, rss_bytes=2 << 20, method="pagemap")
        writer.close(3_000_000)
    return path


def test_info_as_json_says_what_is_in_the_file(heapledger: Run, path: Path) -> None:
    info = json.loads(heapledger("info", path, "--format", "json", "--blocks", "--check").stdout)
    assert (info["events"], info["lost"], info["complete"], info["duration_ns"]) == (100_008, 5, True, 3_000_000)
    child, shell = info["processes"]
    assert child["kinds"] == {"malloc": 75_000, "free": 25_000}
    assert (child["peak_rss_bytes"], child["parent_id"], child["notes"]) == (
        3 << 20,
        shell["id"],
        ["5 events were lost"],
    )
    assert [(s["reason"], s["rss_bytes"]) for s in child["snapshots"]] == [("exit", 2 << 20)]
    assert (info["checked"], info["damaged"]) == (True, [])
    with sqlite3.connect(path) as connection:
        stored = dict(connection.execute("SELECT process_id, sum(length(data)) FROM event_block GROUP BY 1"))
    connection.close()
    for process_id, size in stored.items():
        streams = [s for s in info["streams"] if (s["process_id"], s["of"]) == (process_id, "event")]
        taken = sum(stream["bytes"] for stream in streams)
        assert 0 < size - taken <= 4 * 20 * len(streams), "all but the lists of streams of a few blocks"
        assert all(stream["raw_bytes"] >= stream["bytes"] for stream in streams)


def test_info_as_text_is_plain_when_piped_and_fits_in_80_columns(heapledger: Run, path: Path) -> None:
    done = heapledger("info", path, "--blocks")
    assert done.returncode == 0
    assert "\x1b" not in done.stdout, "neither colours nor what a hostile name holds"
    assert max(map(len, done.stdout.splitlines())) <= 80
    words = re.sub(r"\s+", " ", done.stdout)
    for expected in (
        "100,008 events, 5 lost",
        "75,000 malloc, 25,000 free",
        "5 events were lost",
        "3.0 MiB",
        "no damage",
    ):
        assert expected in words


def test_info_shows_damage_and_a_session_that_was_cut_off(heapledger: Run, path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE event_block SET crc = crc + 1")
        connection.execute("UPDATE session SET end_ns = NULL")
    connection.close()
    words = re.sub(r"\s+", " ", heapledger("info", path, "--check").stdout)
    assert "3 damaged blocks, 100,008 events cannot be read" in words
    assert "cut off" in words
    assert "a block of events is damaged" in words


@pytest.mark.parametrize("command", ["info", "sql", "import", "export"])
def test_every_command_has_help_with_an_example(heapledger: Run, command: str) -> None:
    done = heapledger(command, "--help")
    assert done.returncode == 0
    assert f"heapledger {command} " in done.stdout[done.stdout.index("Example") :]


def test_files_that_cannot_be_read_are_told_in_one_line(heapledger: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no trace")
    for arguments in (
        ("info", tmp_path / "missing"),
        ("info", tmp_path / "text"),
        ("info", tmp_path),
        ("import", tmp_path / "missing"),
        ("import", tmp_path / "text"),
        ("export", tmp_path / "text", "--format", "csv"),
    ):
        done = heapledger(*arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert done.stderr.startswith("heapledger: ")
        assert "Traceback" not in done.stderr


def test_an_import_goes_beside_its_log_and_can_be_looked_at(heapledger: Run, tmp_path: Path) -> None:
    log = tmp_path / "app.log"
    log.write_text("= Start\n@ ./app:(main+0x1)[0x10] + 0xa0 0x18\nwhat\n= End\n")
    done = heapledger("import", log)
    assert done.returncode == 0
    assert "1 events from 4 lines" in done.stdout
    assert "line 3" in done.stdout
    info = json.loads(heapledger("info", f"{log}.heapledger", "--format", "json").stdout)
    assert (info["source"], info["events"], info["processes"][0]["kinds"]) == ("mtrace", 1, {"malloc": 1})


def test_folded_stacks_and_csv_have_the_right_sums(heapledger: Run, tmp_path: Path) -> None:
    log, trace = tmp_path / "log", tmp_path / "t"
    log.write_text(
        "= Start\n@ ./a:(f)[0x11] + 0x10 0x8\n@ ./a:(g)[0x12] + 0x20 0x10\n@ ./a:(f)[0x11] - 0x10\n"
        "@ ./a:(f)[0x11] + 0x30 0x5\n@ ./a:(g)[0x12] < 0x20\n@ ./a:(g)[0x12] > 0x40 0x20\n+ 0x50 0x1\n= End\n"
    )
    heapledger("import", log, "-o", trace)
    live = heapledger("export", trace, "--format", "folded").stdout
    assert sorted(live.splitlines()) == ["[no stack] 1", "f 5", "g 32"]
    requested = heapledger("export", trace, "--format", "folded", "--value", "requested").stdout
    assert sorted(requested.splitlines()) == ["[no stack] 1", "f 13", "g 48"]
    rows = heapledger("export", trace, "--format", "csv").stdout.splitlines()
    assert rows[1].startswith("malloc,0,0,1,2,0x10,8,")
    assert len(rows) == 7


def test_an_export_that_cannot_be_written_is_told(heapledger: Run, path: Path) -> None:
    done = heapledger("export", path, "--format", "csv", "-o", path.parent / "no" / "x.csv")
    assert done.returncode == 2
    assert "cannot write" in done.stderr
