"""The commands that look at a trace: output, JSON, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from heapledger.cli import main

pytestmark = pytest.mark.slow
Run = Callable[..., "subprocess.CompletedProcess[str]"]
COMMANDS = ("report", "leaks", "holes", "timeline", "verify")


@pytest.fixture(scope="module")
def trace(native: Callable[..., Path], heapledger: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "known.heapledger"
    program = native("known_leak_hole.c", "-O1", "-Wno-unused-result")
    assert heapledger("run", "-q", "-o", path, "--", program).returncode == 0
    return path


@pytest.fixture(scope="module")
def mtrace(heapledger: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trace without snapshots, times, or words: an imported log."""
    folder = tmp_path_factory.mktemp("mtrace")
    log = folder / "log"
    log.write_text(
        "= Start\n@ ./a:(f+0x10)[0x401136] + 0x5000 0x64\n@ ./a:(g+0x10)[0x401236] + 0x6000 0x10\n- 0x6000\n= End\n"
    )
    done = heapledger("import", log, "-o", folder / "m.heapledger")
    assert done.returncode == 0, done.stderr
    return folder / "m.heapledger"


@dataclass
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """The command line within this process: the same, but without the start of an interpreter each time."""
    for name in ("COLUMNS", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*args: str | Path) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(arg) for arg in args])
        found = capsys.readouterr()
        return Done(int(end.value.code or 0), found.out, found.err)

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(here: Callable[..., Done], command: str) -> None:
    done = here(command, "--help")
    assert done.returncode == 0
    assert f"heapledger {command} app.heapledger" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_piped_text_has_no_colour_codes_and_fits_80_columns(heapledger: Run, trace: Path, command: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR")}
    done = heapledger(command, trace, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if str(trace) not in line]
    assert max(map(len, lines)) <= 80
    assert done.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_json_says_what_it_is_and_whose(here: Callable[..., Done], trace: Path, command: str) -> None:
    done = here(command, trace, "--format", "json")
    found = json.loads(done.stdout)
    assert found["format"] == f"heapledger.{command}"
    assert found["version"] == 1
    assert found["process"]["exit_status"] == 0
    assert isinstance(found["notes"], list)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_missing_or_no_trace_is_one_line_and_exit_2(
    here: Callable[..., Done], tmp_path: Path, command: str
) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("no trace at all\n" * 100)
    for path in (tmp_path / "missing", other, tmp_path):
        done = here(command, path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert done.stdout == ""


def test_the_first_lines_of_the_report_answer_the_first_questions(here: Callable[..., Done], trace: Path) -> None:
    text = here("report", trace).stdout
    assert "RSS at exit:" in text
    assert "100 % of 1,008 addresses predicted exactly" in text
    assert "0 lost" in text
    assert "leak_some (known_leak_hole.c:" in text
    assert "unexplained" in text


@pytest.mark.parametrize(("at", "reason"), [("exit", "exit"), ("peak", None)])
def test_a_moment_can_be_chosen(here: Callable[..., Done], trace: Path, at: str, reason: str | None) -> None:
    found = json.loads(here("report", trace, "--at", at, "--format", "json").stdout)
    assert found["at"] == at
    assert reason in (None, found["snapshot"]["reason"])
    by_id = json.loads(here("report", trace, "--at", str(found["snapshot"]["id"]), "--format", "json").stdout)
    assert by_id["rss_bytes"] == found["rss_bytes"]


@pytest.mark.parametrize(("args", "code"), [(("--at", "9999"), 2), (("--at", "noon"), 2), (("--at", "request"), 4),
                                            (("--pid", "99999999"), 2)])  # fmt: skip
def test_what_is_not_there_is_said_in_a_line(
    here: Callable[..., Done], trace: Path, args: tuple[str, str], code: int
) -> None:
    done = here("report", trace, *args)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip()


def test_top_limits_sites_but_the_owners_still_sum(here: Callable[..., Done], trace: Path) -> None:
    found = json.loads(here("report", trace, "--top", "1", "--format", "json").stdout)
    assert len(found["sites"]) == 1
    assert sum(o["rss_bytes"] for o in found["owners"]) == found["rss_bytes"]
    assert any(o["name"] == "(1 other call sites)" for o in found["owners"])


def test_fail_on_leak_exits_3_after_the_report(heapledger: Run, trace: Path) -> None:
    done = heapledger("leaks", trace, "--fail-on-leak")
    assert done.returncode == 3
    assert "leak_some" in done.stdout
    assert "8,686 bytes in 8 blocks" in done.stderr


def test_strict_passes_when_all_is_exact(here: Callable[..., Done], trace: Path) -> None:
    assert here("verify", trace, "--strict").returncode == 0


def test_an_imported_log_has_leaks_but_no_resident_pages(here: Callable[..., Done], mtrace: Path) -> None:
    found = json.loads(here("leaks", mtrace, "--format", "json").stdout)
    assert [(leak["bytes"], leak["blocks"]) for leak in found["leaks"]] == [(100, 1)]
    books = json.loads(here("report", mtrace, "--format", "json").stdout)
    assert books["rss_bytes"] is None
    assert books["owners"] == []
    assert books["sites"][0]["bytes"] == 100
    assert here("report", mtrace).returncode == 0
    assert here("holes", mtrace).returncode == 4
    assert here("report", mtrace, "--at", "exit").returncode == 4


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users may enter (pytest's own are its user's alone)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        yield folder


def test_a_trace_that_cannot_be_written_is_analysed_in_memory(trace: Path, open_folder: Path) -> None:
    copy = open_folder / "read-only.heapledger"
    copy.write_bytes(trace.read_bytes())
    copy.chmod(0o444)
    before = copy.read_bytes()
    # Root may write anything: another user looks at it then.
    become = (
        f"import os, sys; os.getuid() or os.setuid(65534); sys.path[:0] = {sys.path!r}; import heapledger.cli as cli; "
    )
    can = subprocess.run([sys.executable, "-c", become], capture_output=True, check=False, cwd="/")
    if can.returncode:
        pytest.skip("an unprivileged user cannot read this checkout")
    script = become + f"cli.main(['leaks', {str(copy)!r}, '--format', 'json'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd="/")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["total_bytes"] == 8686
    assert copy.read_bytes() == before
