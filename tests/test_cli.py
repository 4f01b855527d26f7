"""The command line as a whole: help, wrong input, exit codes. What each command prints is tested beside its part."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from heapledger.cli import COMMANDS

Run = Callable[..., "subprocess.CompletedProcess[str]"]
FILE_COMMANDS = [name for name in COMMANDS if name not in ("run", "import", "recover", "serve", "sql", "export")]


def one_clear_line(result: subprocess.CompletedProcess[str]) -> str:
    """The error's first line; there is no traceback, and a hint at most stands below."""
    assert "Traceback" not in result.stderr, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert lines, "nothing was said"
    assert len(lines) <= 4, result.stderr
    return result.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(heapledger: Run, name: str) -> None:
    result = heapledger(name, "--help")
    assert result.returncode == 0, result.stderr
    assert re.search(rf"[Ee]xamples?:?\s+(.*\n)*\s+heapledger {name}", result.stdout), result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_the_group_lists_each_command_and_an_example(heapledger: Run) -> None:
    result = heapledger("--help")
    assert all(re.search(rf"^  {name} ", result.stdout, re.M) for name in COMMANDS)
    assert "heapledger run -o" in result.stdout


def test_an_unknown_command_is_a_usage_error(heapledger: Run) -> None:
    result = heapledger("frobnicate")
    assert result.returncode == 2
    assert "frobnicate" in result.stderr


@pytest.mark.parametrize("name", FILE_COMMANDS)
def test_a_missing_trace_file_is_one_line_and_status_2(heapledger: Run, name: str, tmp_path: Path) -> None:
    result = heapledger(name, tmp_path / "nowhere.heapledger")
    assert result.returncode == 2
    assert "nowhere.heapledger" in one_clear_line(result)


@pytest.mark.parametrize("name", FILE_COMMANDS)
@pytest.mark.parametrize("content", [b"", b"not a trace at all\n" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_file_that_is_no_trace_is_one_line_and_status_2(
    heapledger: Run, name: str, content: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "bad.heapledger"
    path.write_bytes(content)
    result = heapledger(name, path)
    assert result.returncode == 2
    assert "bad.heapledger" in one_clear_line(result)


def test_sql_export_and_serve_refuse_a_file_that_is_no_trace(heapledger: Run, tmp_path: Path) -> None:
    path = tmp_path / "bad.heapledger"
    path.write_bytes(b"nothing of ours")
    for args in (["sql", path, "SELECT 1"], ["export", path, "--format", "mtrace"], ["serve", path]):
        result = heapledger(*args)
        assert result.returncode == 2, args
        one_clear_line(result)


def static_program(folder: Path) -> Path:
    source = folder / "static.c"
    source.write_text("int main(void) { return 0; }\n")
    subprocess.run(["gcc", "-static", str(source), "-o", str(folder / "static")], check=True)
    return folder / "static"


def setuid_program(folder: Path) -> Path:
    """A program that changes its user when *we* start it: then ld.so ignores LD_PRELOAD."""
    if os.geteuid() != 0:
        return Path("/usr/bin/su")
    shutil.copy("/bin/true", folder / "setuid")
    os.chown(folder / "setuid", 65534, 65534)
    (folder / "setuid").chmod(0o4755)
    return folder / "setuid"


def patched_elf(name: str, offset: int, value: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        data = bytearray(Path("/bin/true").read_bytes())
        data[offset : offset + len(value)] = value
        (folder / name).write_bytes(data)
        (folder / name).chmod(0o755)
        return folder / name

    return make


def musl_program(folder: Path) -> Path:
    source = folder / "musl.c"
    source.write_text("int main(void) { return 0; }\n")
    loader = "-Wl,--dynamic-linker=/lib/ld-musl-x86_64.so.1"
    subprocess.run(["gcc", str(source), loader, "-o", str(folder / "musl")], check=True)
    return folder / "musl"


def text_file(folder: Path) -> Path:
    (folder / "text").write_text("this is no program\n")
    (folder / "text").chmod(0o644)
    return folder / "text"


def missing(folder: Path) -> Path:
    return folder / "missing"


@pytest.mark.parametrize(
    ("make", "word"),
    [
        pytest.param(static_program, "static", id="static"),
        pytest.param(setuid_program, "setuid", id="setuid"),
        pytest.param(patched_elf("aarch64", 18, b"\xb7\x00"), "aarch64|architecture", id="wrong-architecture"),
        pytest.param(patched_elf("elf32", 4, b"\x01"), "32", id="32-bit"),
        pytest.param(musl_program, "musl", id="musl"),
        pytest.param(text_file, "execut", id="not-executable"),
        pytest.param(missing, "not found|no such|does not exist", id="missing"),
    ],
)
def test_run_says_why_a_program_cannot_be_traced(
    heapledger: Run, make: Callable[[Path], Path], word: str, tmp_path: Path
) -> None:
    target = make(tmp_path)
    result = heapledger("run", "-o", tmp_path / "t.heapledger", "--", target)
    assert result.returncode == 2
    assert re.search(word, one_clear_line(result), re.I), result.stderr
    assert not (tmp_path / "t.heapledger").exists()


def test_no_colour_code_is_printed_into_a_pipe(heapledger: Run, tmp_path: Path) -> None:
    trace = tmp_path / "t.heapledger"
    assert heapledger("run", "-q", "-o", trace, "--", "/bin/ls", "/").returncode == 0
    for name in FILE_COMMANDS:
        result = heapledger(name, trace, env={**os.environ, "COLUMNS": "80", "CI": "true"})
        assert result.returncode == 0, result.stderr
        assert "\x1b" not in result.stdout
        assert max(map(len, result.stdout.splitlines())) <= 80, name


def test_output_cut_off_by_head_is_no_error(heapledger: Run, tmp_path: Path) -> None:
    trace = tmp_path / "t.heapledger"
    assert heapledger("run", "-q", "-o", trace, "--", "/bin/ls", "-l", "/usr/lib").returncode == 0
    query = "SELECT a.* FROM events a, events b"
    command = (
        f"'{sys.executable}' -m heapledger sql '{trace}' '{query}' --format csv | head -1; echo ${{PIPESTATUS[0]}}"
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.splitlines()[-1] == "0"
    assert result.stderr == ""
