"""Programs that confine themselves with seccomp: a filter must never kill them for a system call of the shim's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from preload_spool import Shim, plain, shim, shim_library  # noqa: F401

from heapledger.store.events import Kind
from heapledger.tracer import spool

Native = Callable[..., Path]
CONFINED = spool.STOP_REASONS.index("the program forbade itself (seccomp) the system calls of recording")


@pytest.fixture
def program(native: Native) -> Path:
    return native("shim_confined.c")


def test_before_all_that_is_needed_would_kill_recording_stops(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "strict", "kill")
    untraced = plain(program, "strict", "kill")
    assert untraced.returncode == 5
    assert (run.code, run.stdout) == (untraced.returncode, untraced.stdout)
    assert run.stderr.startswith(b"heapledger: recording stopped: ")
    assert run.stderr.count(b"\n") == 1
    (image,) = run.images
    assert (image.get("state"), image.get("stop_reason")) == (spool.STOPPED, CONFINED)
    assert 1000 <= len(image.of(Kind.MALLOC)) < 1100
    image.check()


@pytest.mark.parametrize("how", ["prctl", "syscall"])
def test_a_filter_that_kills_who_opens_files_is_lived_with(shim: Shim, program: Path, how: str) -> None:  # noqa: F811
    """This process is recorded on, without a file more; of its children nothing is known, and that is said before."""
    run = shim.run(program, how, "kill")
    untraced = plain(program, how, "kill")
    assert untraced.returncode == 7
    assert (run.code, run.stdout, run.stderr) == (untraced.returncode, untraced.stdout, untraced.stderr)
    (image,) = run.images
    assert (image.get("state"), image.get("stop_reason"), image.held) == (spool.ENDED, 0, 1)
    assert len(image.of(Kind.MALLOC)) >= 2000
    assert any(line[0] == "S" and "forbids itself (seccomp) files" in line[1] for line in image.log)
    image.check()


@pytest.mark.parametrize("how", ["prctl", "syscall"])
def test_a_filter_that_answers_with_errors_does_not_stop_it(shim: Shim, program: Path, how: str) -> None:  # noqa: F811
    run = shim.run(program, how, "refuse", options="quiet=1")
    untraced = plain(program, how, "refuse")
    assert (run.code, run.stdout, run.stderr) == (untraced.returncode, untraced.stdout, untraced.stderr)
    assert (run.first.get("state"), run.first.get("stop_reason")) == (spool.ENDED, 0)
    assert len(run.first.of(Kind.MALLOC)) >= 2000
