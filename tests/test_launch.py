"""Starting a program: the terminal, the environment, the spool folder."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from heapledger.errors import UsageError
from heapledger.store.reader import Trace
from heapledger.tracer import environment, launch


def read_until(fd: int, wanted: str, timeout: float = 30) -> str:
    """Output of a terminal up to `wanted`."""
    text, deadline = "", time.monotonic() + timeout
    while wanted not in text:
        ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"no {wanted!r} in {text!r}"
        try:
            text += os.read(fd, 4096).decode(errors="replace")
        except OSError:
            break
    return text


@pytest.fixture
def on_terminal() -> Callable[..., tuple[int, int]]:
    """`on_terminal(*argv)` starts a command as the session leader of a new terminal: (its pid, our end)."""

    def spawn(*argv: str) -> tuple[int, int]:
        try:
            pid, fd = pty.fork()
        except OSError as error:
            pytest.skip(f"no terminal can be opened here (is /dev/pts mounted?): {error}")
        if pid == 0:
            os.execvp(argv[0], argv)
        return pid, fd

    return spawn


def traced(trace: Path, *argv: str) -> list[str]:
    return [sys.executable, "-m", "heapledger", "run", "--no-symbols", "-o", str(trace), "--", *argv]


def test_ctrl_c_reaches_the_program_and_the_trace_is_written(
    tmp_path: Path, native: Callable[..., Path], on_terminal: Callable[..., tuple[int, int]]
) -> None:
    trace = tmp_path / "trace"
    pid, fd = on_terminal(*traced(trace, str(native("run_known.c", "-pthread")), "handles", "20000"))
    read_until(fd, "ready")
    os.write(fd, b"\x03")
    output = read_until(fd, "events")
    assert output.count("caught") == 1
    _, status = os.waitpid(pid, 0)
    os.close(fd)
    assert os.waitstatus_to_exitcode(status) == 40
    with Trace(trace) as opened:
        assert opened.process().exit_status == 40


def test_ctrl_z_stops_and_fg_goes_on(tmp_path: Path, on_terminal: Callable[..., tuple[int, int]]) -> None:
    trace = tmp_path / "trace"
    pid, fd = on_terminal("bash", "--norc", "-i")
    line = " ".join(traced(trace, "sh", "-c", "'echo be''gun; sleep 1; echo do''ne'"))
    os.write(fd, f"{line}; echo status=$?\n".encode())
    read_until(fd, "begun\r\n")
    time.sleep(0.2)
    os.write(fd, b"\x1a")
    read_until(fd, "Stopped")
    os.write(fd, b"fg\n")
    output = read_until(fd, "processes")
    assert "done" in output
    os.write(fd, b"exit\n")
    os.waitpid(pid, 0)
    os.close(fd)
    with Trace(trace) as opened:
        assert all(p.lost == 0 and not p.notes for p in opened.processes())


def test_the_programs_own_preload_stays_behind_ours() -> None:
    variables = environment.for_target(
        {"LD_PRELOAD": "/a.so:/b.so", "PATH": "/bin"}, library=Path("/x/lib.so"), spool=Path("/s"), options={"a": "1"}
    )
    assert variables["LD_PRELOAD"] == "/x/lib.so:/a.so:/b.so"
    assert (variables["HEAPLEDGER_SPOOL"], variables["HEAPLEDGER_OPTIONS"], variables["PATH"]) == ("/s", "a=1", "/bin")


def test_the_spool_is_private_and_where_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = launch.make_spool(tmp_path / "trace")
    assert spool.stat().st_mode & 0o777 == 0o700
    spool.rmdir()
    monkeypatch.setattr(launch, "SHM_FREE_BYTES", 1 << 60)
    beside = launch.make_spool(tmp_path / "trace")
    assert beside.parent == tmp_path


def test_a_trace_is_made_with_the_spool_on_disk(tmp_path: Path) -> None:
    code = (
        "from heapledger.tracer import launch; from pathlib import Path; launch.SHM_FREE_BYTES = 1 << 60;"
        "launch.run(['sh', '-c', 'echo $HEAPLEDGER_SPOOL'], launch.RunOptions(output=Path('t'), symbols=False))"
    )
    argv = [sys.executable, "-c", code]
    result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()).parent == tmp_path.resolve()
    assert [p.name for p in tmp_path.iterdir()] == ["t"]
    with Trace(tmp_path / "t") as opened:
        assert opened.process().events > 10


def test_a_run_imports_neither_numpy_nor_what_only_other_commands_use(tmp_path: Path) -> None:
    argv = [sys.executable, "-X", "importtime", "-m", "heapledger", "run", "-o", str(tmp_path / "t.heapledger"), "true"]
    told = subprocess.run(argv, capture_output=True, text=True, check=True).stderr
    imported = {line.rpartition("|")[2].strip() for line in told.splitlines() if "|" in line}
    assert {"heapledger", "sqlite3"} <= imported
    assert not imported & {"numpy", "sqlalchemy", "flask", "rich", "apsw", "plotly", "importlib.resources"}


def test_default_names_are_safe() -> None:
    assert launch.default_output("/usr/bin/a b\n", 7) == Path("heapledger.a_b_.7.heapledger")


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "t", tmp_path):
        with pytest.raises(UsageError):
            launch.check_output(path)


def test_the_session_survives_a_round_trip(tmp_path: Path) -> None:
    session = launch.Session(["a", "\udcff"], "/", 1, 2, {"kernel": "6"}, "/o", 3, 4)
    session.save(tmp_path)
    assert launch.Session.load(tmp_path) == session
    (tmp_path / launch.SESSION_FILE).write_text(json.dumps({"command": []}))
    with pytest.raises(KeyError):
        launch.Session.load(tmp_path)


def test_dying_as_the_program_died_makes_no_second_core(tmp_path: Path) -> None:
    code = "from heapledger.tracer.launch import end_as; end_as(11 | 128)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert result.returncode == -signal.SIGSEGV
    assert list(tmp_path.iterdir()) == []
