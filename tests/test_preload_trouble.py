"""When the shim cannot go on it stops recording and says so; the program runs on as if nothing were there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from preload_spool import Collector, Run, Shim, plain, shim, shim_library  # noqa: F401

from heapledger.store.events import Kind
from heapledger.tracer import spool

Native = Callable[..., Path]
NO_SPACE, NO_MEMORY, COLLECTOR_GONE, TOLD = 1, 2, 3, 4
SAYS_STOP = b"heapledger: recording stopped"


@pytest.fixture
def program(native: Native) -> Path:
    return native("shim_process.c", "-O1", "-lpthread", "-ldl")


def _limited(shim: Shim, limit: str, folder: Path, *argv: str | Path) -> Run:  # noqa: F811
    script = f'ulimit {limit}; unset LD_PRELOAD; LD_PRELOAD="$SHIM" exec "$0" "$@"'
    env = {"LD_PRELOAD": "", "SHIM": str(shim.library)}
    return shim.run("/bin/sh", "-c", script, *argv, env=env, spool_folder=folder)


# ---- no collector, a slow one, a dead one


def test_without_a_spool_the_shim_only_passes_through(shim: Shim, program: Path, tmp_path: Path) -> None:  # noqa: F811
    run = shim.run(program, "threads", env={"HEAPLEDGER_SPOOL": ""}, collect=False)
    assert (run.code, run.stdout, run.stderr) == (0, b"10\n", b"")
    assert run.images == []
    assert list(run.spool.iterdir()) == []


def test_a_spool_that_cannot_be_used_is_said_once(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "many", env={"HEAPLEDGER_SPOOL": "/nowhere/at/all"}, collect=False)
    assert (run.code, run.stdout) == (0, b"done\n")
    assert run.stderr.count(b"\n") == 1
    assert run.stderr.startswith(b"heapledger: ")


def test_without_a_collector_a_program_runs_to_its_end_in_bounded_time(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "return", collect=False)
    assert (run.code, run.stdout, run.stderr) == (11, b"late\n", b"")
    assert run.seconds < 3
    assert run.first.get("state") == spool.ENDED


@pytest.mark.slow
def test_without_a_collector_a_full_ring_stops_recording(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "many", collect=False)
    assert (run.code, run.stdout) == (0, b"done\n")
    assert run.seconds < 15
    assert run.stderr.count(b"\n") == 1
    assert run.stderr.startswith(SAYS_STOP)
    image = run.first
    assert (image.get("state"), image.get("stop_reason")) == (spool.STOPPED, COLLECTOR_GONE)
    assert any(line[0] == "S" for line in image.log)
    assert len(image.events) > 32000


def test_quiet_means_quiet(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "return", env={"HEAPLEDGER_SPOOL": "/nowhere"}, options="quiet=1", collect=False)
    assert run.stderr == b""


def test_a_full_ring_waits_for_a_collector_that_is_slow_to_come(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "many", delay_s=0.5, options="ring_slots=1024")
    assert run.stdout == b"done\n"
    assert len(run.first.of(Kind.MALLOC)) >= 400000
    run.first.check()


def test_a_collector_that_dies_does_not_take_the_program_along(shim: Shim, program: Path) -> None:  # noqa: F811
    folder = shim.new_spool()
    env = shim.environment(folder, "ring_slots=1024")
    collector = Collector(folder)
    process = subprocess.Popen([program, "many"], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not collector.images or len(next(iter(collector.images.values())).events) < 2000:
        collector.round()
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (0, b"done\n")
    assert err.startswith(SAYS_STOP)
    assert next(iter(collector.images.values())).get("stop_reason") == COLLECTOR_GONE


def test_a_collector_can_tell_the_shim_to_stop(shim: Shim, program: Path) -> None:  # noqa: F811
    folder = shim.new_spool()
    env = shim.environment(folder, "ring_slots=1024,quiet=1")
    collector = Collector(folder)
    process = subprocess.Popen([program, "many"], env=env, stdout=subprocess.PIPE)
    while not collector.images:
        collector.round()
    (image,) = collector.images.values()
    image.control.set("told", 1)
    out, _ = process.communicate(timeout=20)
    assert out == b"done\n"
    assert (image.get("state"), image.get("stop_reason")) == (spool.STOPPED, TOLD)


# ---- no room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.5 MB: one ring and a little more fit."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1536k", "none", folder], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_no_signal(shim: Shim, program: Path, small_disk: Path) -> None:  # noqa: F811
    run = shim.run(program, "threads", spool_folder=small_disk)
    assert (run.code, run.stdout) == (0, b"10\n")
    assert run.stderr.startswith(SAYS_STOP)
    assert run.first.get("stop_reason") == NO_SPACE
    assert run.first.get("stop_errno") == 28


def test_a_limit_on_file_size_is_no_signal(shim: Shim, program: Path) -> None:  # noqa: F811
    run = _limited(shim, "-f 100", shim.new_spool(), program, "return")
    assert (run.code, run.stdout) == (11, b"late\n")
    assert run.stderr.startswith(SAYS_STOP)


def test_a_limit_on_address_space_leaves_the_program_alone(shim: Shim, program: Path) -> None:  # noqa: F811
    run = _limited(shim, "-v 60000", shim.new_spool(), program, "many")
    assert (run.code, run.stdout, run.stderr) == (0, b"done\n", b"")
    run.first.check()


def test_no_memory_for_a_threads_ring_stops_the_recording_only(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "limit", options="ring_slots=1048576")
    assert (run.code, run.stdout) == (0, b"1\n")
    assert run.stderr.startswith(SAYS_STOP)
    assert run.first.get("stop_reason") == NO_MEMORY


def test_no_file_descriptors_left_is_no_trouble(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "nofile")
    assert (run.code, run.stdout) == (0, b"joined\n")
    assert run.first.get("stop_errno") == 24
    assert run.stderr.startswith(SAYS_STOP)


# ---- real programs

PROGRAMS = {
    "bash": (["bash", "-c", "for i in 1 2 3; do (echo $i | tr 1-3 a-c); done; exit 3"], b""),
    "git": (["git", "--no-pager", "-c", "color.ui=never", "help", "-g"], b""),
    "sqlite3": (
        ["sqlite3", ":memory:", "create table t(a, b); with recursive n(i) as (select 1 union all select i + 1 from n "
         "where i < 20000) insert into t select i, hex(i) from n; select count(*), sum(a), max(b) from t;"],
        b"",
    ),
    "perl": (["perl", "-e", "$h{$_ % 977} .= $_ for 1..30000; print length(join q(), map {$h{$_}} sort keys %h)"], b""),
    "gcc": (["gcc", "-x", "c", "-S", "-o", "-", "-"], b"int f(int a) { return a * 3; }\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_real_program_says_the_same_under_the_shim(shim: Shim, name: str) -> None:  # noqa: F811
    argv, stdin = PROGRAMS[name]
    run = shim.run(*argv, stdin=stdin)
    untraced = plain(*argv, stdin=stdin)
    assert (run.code, run.stdout, run.stderr) == (untraced.returncode, untraced.stdout, untraced.stderr)
    for image in run.images:
        image.check()
    assert sum(len(image.events) for image in run.images) > 100


def test_python_with_threads_and_children_says_the_same(shim: Shim) -> None:  # noqa: F811
    code = (
        "import json, subprocess, threading\n"
        "work = lambda: [json.loads(json.dumps({str(i): [i] * 9 for i in range(500)})) for _ in range(3)]\n"
        "threads = [threading.Thread(target=work) for _ in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print(subprocess.check_output(['echo', 'child']))\n"
    )
    argv = ["/usr/bin/env", "PYTHONMALLOC=malloc", os.path.realpath("/proc/self/exe"), "-S", "-c", code]
    run = shim.run(*argv)
    untraced = plain(*argv)
    assert (run.code, run.stdout, run.stderr) == (untraced.returncode, untraced.stdout, untraced.stderr)
    for image in run.images:
        image.check()
    assert sum(len(image.events) for image in run.images) > 30000


# ---- beside other things in the process


def test_another_malloc_behind_the_shim_is_recorded_without_header_words(
    shim: Shim,  # noqa: F811
    program: Path,
    native: Native,
) -> None:
    other = native("shim_other_malloc.c", "-shared", "-fPIC", "-fno-builtin")
    run = shim.run(program, "return", env={"LD_PRELOAD": f"{shim.library} {other}"})
    assert (run.code, run.stdout, run.stderr) == (11, b"late\n", b"")
    image = run.first
    image.check()
    blocks = image.of(Kind.MALLOC)
    assert 0x7777 in blocks.size
    assert (blocks.addr >= 0x200000000000).all()
    assert not blocks.word.any()


def test_the_shims_own_mappings_lie_far_from_the_programs(shim: Shim, program: Path) -> None:  # noqa: F811
    image = shim.run(program, "exit_thread").first
    low, high = image.get("self_low"), image.get("self_high")
    inside: list[str] = []
    outside: list[str] = []
    for line in image.maps.splitlines():
        start, end = (int(number, 16) for number in line.split()[0].split("-"))
        (inside if low <= start and end <= high else outside).append(line)
    assert {line.rsplit("/", 1)[1] for line in inside if "/" in line} >= {"control", "ring.0", "ring.1", "stacks.0"}
    assert not [line for line in outside if str(image.folder) in line]


def test_recording_makes_no_system_calls(shim: Shim, program: Path, tmp_path: Path) -> None:  # noqa: F811
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    log = tmp_path / "strace"
    shim.run("strace", "-f", "-o", log, program, "many", options="ring_slots=1048576")
    calls = log.read_text().splitlines()
    start = max(i for i, line in enumerate(calls) if "/proc/self/smaps" in line)
    assert any("execve" in line and "shim_process" in line for line in calls)
    assert len(calls) - start < 200, "400,000 blocks were allocated and freed here"


@pytest.mark.slow
def test_threads_forks_loads_and_signals_at_once_lose_nothing(shim: Shim, native: Native) -> None:  # noqa: F811
    library = native("shim_loaded.c", "-shared", "-fPIC")
    run = shim.run(native("shim_torture.c", "-O1", "-lpthread", "-ldl"), library, "1.5")
    assert (run.code, run.stdout, run.stderr) == (0, b"1 1 0\n", b"")
    assert len(run.images) > 1
    for image in run.images:
        image.check()
