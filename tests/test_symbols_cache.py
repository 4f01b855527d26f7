"""The disk cache: same answers, void when the files change, harmless when it is damaged or cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from symbols_programs import build, function_addresses, tool

from heapledger.tracer.symbols import Frame, Symbolizer, build_id, cache


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("symbols"), "cpp", "program")


def resolve(path: Path, addresses: list[int], folder: Path | None, *debug_dirs: Path) -> list[list[Frame]]:
    with Symbolizer(debug_dirs=debug_dirs, cache_dir=folder) as symbols:
        return symbols.resolve(path, addresses)


def entry(folder: Path, path: Path) -> Path:
    return cache.cache_path(folder, build_id(path) or "")


def test_frames_come_back_from_disk_as_they_were(program: Path, tmp_path: Path) -> None:
    addresses = [*function_addresses(program, 200), 0]
    first = resolve(program, addresses, tmp_path)
    assert entry(tmp_path, program).exists()
    assert resolve(program, addresses, tmp_path) == first == resolve(program, addresses, None)


def test_what_is_on_disk_is_what_is_answered(program: Path, tmp_path: Path) -> None:
    """A marked entry shows that the file is read, not the program again."""
    addresses = function_addresses(program, 20)
    resolve(program, addresses, tmp_path)
    path = entry(tmp_path, program)
    held = json.loads(path.read_text())
    held["strings"] = [text and f"cached {text}" for text in held["strings"]]
    path.write_text(json.dumps(held))
    again = resolve(program, addresses, tmp_path)
    assert all(frame.function.startswith("cached ") for frames in again for frame in frames if frame.function)


def test_new_addresses_are_added_to_an_entry(program: Path, tmp_path: Path) -> None:
    addresses = function_addresses(program, 60)
    resolve(program, addresses[:30], tmp_path)
    resolve(program, addresses[30:], tmp_path)
    assert len(json.loads(entry(tmp_path, program).read_text())["frames"]) == len(set(addresses))


def test_an_installed_debug_file_voids_the_entry(program: Path, tmp_path: Path) -> None:
    stripped = tmp_path / "stripped"
    subprocess.run([tool("objcopy"), "--strip-all", str(program), str(stripped)], check=True)
    addresses = function_addresses(program, 50)
    debug, folder = tmp_path / "debug", tmp_path / "cache"
    before = resolve(stripped, addresses, folder, debug)
    known = build_id(program) or ""
    place = debug / ".build-id" / known[:2] / f"{known[2:]}.debug"
    place.parent.mkdir(parents=True)
    shutil.copy(program, place)
    after = resolve(stripped, addresses, folder, debug)
    assert not any(frame.line for frames in before for frame in frames)
    assert after == resolve(program, addresses, None)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b'{"version": 1}', b"\xff\xfe", b"[" * 100_000,
        b'{"version": VERSION, "sources": SOURCES, "strings": [""], "frames": {"1": [0]}}',
        b'{"version": VERSION, "sources": SOURCES, "strings": [""], "frames": {"zz": []}}',
        b'{"version": VERSION, "sources": SOURCES, "strings": [""], "frames": {"1": [7, 7, 7, 7]}}',
        b'{"version": VERSION, "sources": SOURCES, "strings": [5], "frames": {"1": [0, 0, 1, 0]}}',
        b'{"version": VERSION, "sources": SOURCES, "strings": {}, "frames": []}',
        b'{"version": VERSION, "sources": SOURCES, "strings": ["a"], "frames": {"1": [0, 0, "x", 0]}}',
        b'{"version": VERSION, "sources": SOURCES, "strings": ["a"], "frames": {"1": [[], 0, 1, 0]}}',
    ],
)  # fmt: skip
def test_a_damaged_entry_is_as_good_as_none(program: Path, tmp_path: Path, content: bytes) -> None:
    addresses = function_addresses(program, 20)
    expected = resolve(program, addresses, tmp_path)
    path = entry(tmp_path, program)
    sources = json.dumps(json.loads(path.read_text())["sources"]).encode()
    path.write_bytes(content.replace(b"SOURCES", sources).replace(b"VERSION", str(cache.VERSION).encode()))
    assert resolve(program, addresses, tmp_path) == expected


def test_a_folder_that_cannot_be_written_does_no_harm(program: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    addresses = function_addresses(program, 20)
    assert resolve(program, addresses, tmp_path / "file" / "below") == resolve(program, addresses, None)


def test_nothing_is_left_beside_the_entry(program: Path, tmp_path: Path) -> None:
    resolve(program, function_addresses(program, 20), tmp_path)
    assert [path.name for path in entry(tmp_path, program).parent.iterdir()] == [entry(tmp_path, program).name]


def test_the_default_folder_is_under_xdg_cache_home(program: Path, tmp_path: Path) -> None:
    code = "import sys\nfrom heapledger.tracer.symbols import Symbolizer\n" \
           "with Symbolizer() as s: s.resolve(sys.argv[1], [int(sys.argv[2])])"  # fmt: skip
    command = [sys.executable, "-c", code, str(program), str(function_addresses(program, 1)[0])]
    subprocess.run(command, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, check=True)
    assert entry(tmp_path / "heapledger" / "symbols", program).exists()


def test_a_second_question_is_answered_without_the_file(tmp_path: Path, program: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copy(program, copy)
    addresses = function_addresses(program, 20)
    with Symbolizer(debug_dirs=(), cache_dir=None) as symbols:
        first = symbols.resolve(copy, addresses)
        copy.unlink()
        assert symbols.resolve(copy, addresses) == first
