"""Programs of every kind behave under heapledger as they do alone: the same output, errors and exit status.

What is compared is what a user would see: bytes and status. Where a program is single-threaded its trace has to be
exact as well.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from compared import HEAPLEDGER, Both

Native = Callable[..., Path]


# ---- the environment


def of_ours(variables: bytes) -> bytes:
    """`env`'s output without the three variables that the shim needs."""
    names = (b"LD_PRELOAD=", b"HEAPLEDGER_SPOOL=", b"HEAPLEDGER_OPTIONS=")
    return b"".join(line for line in variables.splitlines(keepends=True) if not line.startswith(names))


@pytest.mark.parametrize(
    "env", [{}, {"PATH": "/usr/bin:/bin"}, {"LC_CTYPE": "C.UTF-8", "A": "b=c"}, {"LANG": "C", "X": "\udcff"}]
)
def test_the_environment_gains_our_three_variables_and_nothing_else(
    both: Callable[..., Both], env: dict[str, str]
) -> None:
    """Python in the C locale adds an LC_CTYPE of its own: sort, ls and gcc would write other bytes."""
    ran = both(["/usr/bin/env"], env=env)
    assert (ran.traced.returncode, ran.traced.stderr) == (0, b"")
    assert of_ours(ran.traced.stdout) == ran.plain.stdout
    assert ran.traced.stdout.count(b"\n") == len(env) + 3


# ---- programs that do what few do

#: What tests/native/odd_program.c can do → (its exit status, processes in the trace; 0: it has threads, so not all is
#: exact yet, or an event is left without an end).
ODD = {
    "by_abort": (-6, 1),
    "by_segv": (-11, 1),
    "by_exit_now": (17, 1),
    "by_system_call": (18, 1),
    "by_quick_exit": (19, 1),
    "by_double_free": (-6, 1),
    "by_thread": (9, 1),
    "first_thread_ends": (0, 0),
    "execs_itself": (0, 7),
    "forks_deeply": (6, 9),
    "forks_below_threads": (0, 0),
    "vforks": (4, 2),
    "daemonises": (0, 2),
    "stops_and_goes_on": (0, 2),
    "in_a_pid_namespace": (0, 3),
    "in_a_chroot": (4, 1),
    "gives_up_root": (0, 1),
    "closes_all": (0, 1),
    "first_free_file": (0, 1),
    "runs_out_of_memory": (0, 1),
    "locks_its_memory": (0, 1),
    "moves_the_break": (0, 1),
    "recurses_deeply": (0, 1),
    "survives_faults": (0, 1),
    "handles_signals_on_its_own_stack": (0, 1),
}


@pytest.mark.parametrize("what", ODD)
def test_an_odd_program_runs_as_if_alone(both: Callable[..., Both], native: Native, what: str) -> None:
    status, processes = ODD[what]
    ran = both([str(native("odd_program.c", "-pthread")), what])
    if ran.plain.returncode == 77:
        pytest.skip(f"this user may not: {what}")
    ran.check_same()
    assert ran.plain.returncode == status
    if processes:
        ran.check_exact(processes=processes)


def test_a_process_whose_first_thread_ended_has_its_pages_looked_at(both: Callable[..., Both], native: Native) -> None:
    found = both([str(native("odd_program.c", "-pthread")), "first_thread_ends"]).verify()
    assert found["rss"]["kernel_bytes"] > 1 << 20
    assert found["rss"]["ledger_bytes"] == found["rss"]["kernel_bytes"]


# ---- limits and streams

LIMITS = ["-n 16", "-v 2000000", "-s unlimited"]
TREE = "seq 3000 | tail -1; ls / >/dev/null; echo $?"


@pytest.mark.parametrize("limit", LIMITS)
def test_limits_of_the_program_are_no_trouble(both: Callable[..., Both], limit: str) -> None:
    ran = both(["sh", "-c", f"ulimit {limit}; {TREE}"])
    ran.check_same()
    assert ran.plain.stdout == b"3000\n0\n"
    ran.check_exact(processes=6)


def test_no_room_for_the_spool_is_no_trouble_for_the_program(both: Callable[..., Both]) -> None:
    """A limit on the size of files also stands for those of the shim."""
    ran = both(["sh", "-c", f"ulimit -f 4; {TREE}"])
    ran.check_same()
    assert ran.verify()["lost"] == 0


def test_a_low_limit_on_open_files_does_not_end_the_trace(tmp_path: Path) -> None:
    """The soft limit is the program's; the collector follows many processes at once all the same."""
    trace = tmp_path / "many.heapledger"
    inner = "for i in $(seq 24); do sleep 0.3 & done; wait; ulimit -n"
    command = [*HEAPLEDGER, "run", "-q", "--no-symbols", "-o", str(trace), "--", "sh", "-c", inner]
    ran = subprocess.run(
        ["sh", "-c", 'ulimit -Sn 32; exec "$@"', "sh", *command], capture_output=True, timeout=60, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"32\n", b"")
    Both(ran, ran, trace).check_exact(processes=50)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_stay_closed(tmp_path: Path, closed: str) -> None:
    trace = tmp_path / "closed.heapledger"
    ours = [*HEAPLEDGER, "run", "--no-symbols", "-o", str(trace), "--"]
    results = []
    for command in ([], ours):
        script = f'"$@" {closed}'
        argv = ["sh", "-c", script, "sh", *command, "ls", "/", "/nowhere"]
        results.append(subprocess.run(argv, capture_output=True, timeout=60, check=False))
    plain, traced = results
    assert (traced.returncode, traced.stdout) == (plain.returncode, plain.stdout)
    own = [line for line in traced.stderr.splitlines(keepends=True) if not line.startswith(b"heapledger: ")]
    assert b"".join(own) == plain.stderr
    Both(plain, traced, trace).check_exact()


def test_a_program_in_the_middle_of_a_pipeline(tmp_path: Path) -> None:
    trace = tmp_path / "yes.heapledger"
    ours = " ".join([*HEAPLEDGER, "run", "-q", "--no-symbols", "-o", str(trace), "--"])
    script = f"seq 100000 | {ours} cat | tail -1; {ours} yes | head -2; echo ${{PIPESTATUS[0]}}"
    ran = subprocess.run(["bash", "-c", script], capture_output=True, timeout=60, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"100000\ny\ny\n141\n", b"")


# ---- what every Debian has

PROGRAMS: dict[str, tuple[list[str], int]] = {
    "bash": (
        ["bash", "-c", "echo 1 | tr 12 ab; (exit 3); trap 'echo bye' EXIT; exit 7"],
        4,
    ),
    "find": (["find", "/usr/share/perl5", "-name", "*.pm", "-newer", "/etc/passwd"], 1),
    "perl": (["perl", "-e", "$h{$_ % 977} .= $_ for 1..20000; print scalar keys %h; system 'echo sub'; exit 5"], 2),
    "python": (["/usr/bin/python3", "-c", "import json; print(len(json.dumps([{'a': i} for i in range(9999)])))"], 1),
    "spawn": (
        ["/usr/bin/python3", "-c", "import subprocess as s; print(s.run(['ls', '/'], capture_output=True).stdout)"],
        2,
    ),
    "gcc-error": (["gcc", "-c", "/nowhere/at/all.c"], 2),
    "sort": (["bash", "-c", "seq 60000 | sort --parallel=1 | tail -1"], 6),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_the_base_system_is_exact(both: Callable[..., Both], name: str) -> None:
    argv, processes = PROGRAMS[name]
    ran = both(argv, env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONMALLOC": "malloc"})
    ran.check_same()
    ran.check_exact(processes=processes)
