"""Which files the dashboard serves: those it was given, and nothing else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from web_traces import write_trace

from heapledger.errors import InputError, UsageError
from heapledger.web.catalogue import Catalogue, check_paths
from heapledger.web.config import Config


def names(*paths: Path) -> list[str]:
    return [entry.name for entry in Catalogue(Config(paths=paths)).entries()]


def test_a_folder_lists_its_traces_newest_first_and_nothing_else(tmp_path: Path) -> None:
    for age, name in enumerate(("new.heapledger", "old.heapledger")):
        file = write_trace(tmp_path / name)
        os.utime(file, (1_000_000 - age, 1_000_000 - age))
    (tmp_path / "notes.txt").write_text("no trace")
    (tmp_path / "folder.heapledger").mkdir()
    assert names(tmp_path) == ["new.heapledger", "old.heapledger"]


def test_a_link_that_leads_out_of_the_folder_is_not_served(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    write_trace(outside / "secret.heapledger")
    write_trace(inside / "own.heapledger")
    (inside / "link.heapledger").symlink_to(outside / "secret.heapledger")
    (inside / "loop.heapledger").symlink_to(inside / "loop.heapledger")
    assert names(inside) == ["own.heapledger"]


def test_a_folder_of_very_many_files_is_cut_to_the_newest(tmp_path: Path) -> None:
    for number in range(30):
        file = tmp_path / f"{number}.heapledger"
        file.touch()
        os.utime(file, (number, number))
    entries = Catalogue(Config(paths=(tmp_path,), folder_limit=10)).entries()
    assert [entry.name for entry in entries] == [f"{number}.heapledger" for number in range(29, 19, -1)]


def test_a_file_given_twice_is_listed_once(tmp_path: Path) -> None:
    file = write_trace(tmp_path / "a.heapledger")
    assert names(file, tmp_path) == ["a.heapledger"]


def test_a_summary_says_what_the_trace_holds(tmp_path: Path) -> None:
    file = write_trace(tmp_path / "a.heapledger", command="./app 'two words'")
    catalogue = Catalogue(Config(paths=(file,)))
    summary = catalogue.summary(catalogue.entries()[0])
    assert summary.command == ("./app", "two words")
    assert (summary.events, summary.processes, summary.duration_ns) == (2, 1, 1_000_000_000)
    assert summary.peak_rss_bytes == 10 << 20
    assert summary.size_bytes == file.stat().st_size


def test_a_summary_is_made_anew_when_the_file_changes(tmp_path: Path) -> None:
    file = write_trace(tmp_path / "a.heapledger", command="./first")
    catalogue = Catalogue(Config(paths=(tmp_path,)))
    entry = catalogue.entries()[0]
    assert catalogue.summary(entry).command == ("./first",)
    file.unlink()
    write_trace(file, command="./second")
    assert catalogue.summary(entry).command == ("./second",)


def test_a_damaged_file_in_a_folder_is_listed_with_its_problem(tmp_path: Path) -> None:
    (tmp_path / "junk.heapledger").write_bytes(b"not a database" * 100)
    catalogue = Catalogue(Config(paths=(tmp_path,)))
    assert "junk.heapledger" in catalogue.summary(catalogue.entries()[0]).problem


def test_paths_that_cannot_be_served_are_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        check_paths((tmp_path / "missing",))
    (tmp_path / "junk").write_bytes(b"x" * 5000)
    with pytest.raises(InputError, match="junk"):
        check_paths((tmp_path / "junk",))
    check_paths((tmp_path, write_trace(tmp_path / "a.heapledger")))
