"""Real programs, traced and explained: the same output and status as untraced, no event lost, every address of
single-threaded processes predicted exactly, and a ledger that sums to the kernel's own Rss.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass
class Program:
    """A command, and what it needs in its folder and its environment."""

    argv: list[str]
    environment: dict[str, str]
    processes: int = 1  # at least so many are expected in the trace


def python_json(folder: Path) -> Program:
    script = folder / "workload.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, random
            random.seed(1)
            records = [{"id": i, "tags": ["t%d" % random.randrange(99) for _ in range(6)], "pos": [random.random()] * 3}
                       for i in range(8000)]
            for _ in range(3):
                records = json.loads(json.dumps(records, indent=1))
            print(len(records), records[-1]["id"])
            """
        )
    )
    return Program(["/usr/bin/python3", str(script)], {"PYTHONMALLOC": "malloc", "PYTHONHASHSEED": "0"})


def git_log(folder: Path) -> Program:
    repository = folder / "repository"
    identity = {
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
    }
    environment = {**os.environ, **identity, "GIT_CONFIG_NOSYSTEM": "1"}

    def git(*args: str) -> None:
        subprocess.run(["git", "-C", str(repository), *args], check=True, capture_output=True, env=environment)

    repository.mkdir()
    git("init", "-q")
    for number in range(30):
        (repository / f"file{number % 7}.txt").write_text(
            "".join(f"line {i} of {number}\n" for i in range(number * 20))
        )
        git("add", ".")
        git("commit", "-q", "-m", f"commit {number}")
    return Program(["git", "-C", str(repository), "--no-pager", "log", "--stat"], {"GIT_CONFIG_NOSYSTEM": "1"})


def sqlite_table(folder: Path) -> Program:
    rows = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1000000)"
    script = f"""
        CREATE TABLE t(a INTEGER PRIMARY KEY, b TEXT);
        {rows} INSERT INTO t SELECT i, 'row number ' || i FROM n;
        SELECT count(*), sum(a), max(b) FROM t;
    """
    return Program(["sqlite3", str(folder / "rows.db"), script], {})


def gcc_compile(folder: Path) -> Program:
    source = folder / "program.c"
    functions = "\n".join(f"int f{i}(int x) {{ return x * {i} + (x >> {i % 31}); }}" for i in range(400))
    source.write_text(f'#include <stdio.h>\n{functions}\nint main(void) {{ puts("hello"); return f1(0); }}\n')
    return Program(["gcc", "-O2", "-g", "-o", str(folder / "program"), str(source)], {}, processes=4)


PROGRAMS = {"python-json": python_json, "git-log": git_log, "sqlite-rows": sqlite_table, "gcc-tree": gcc_compile}


def clear(folder: Path, program: Program) -> None:
    """Removes what an earlier run of the program left, so that the next run does the same."""
    (folder / "rows.db").unlink(missing_ok=True)


@pytest.fixture(scope="module", params=PROGRAMS)
def traced(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, heapledger: Run
) -> tuple[Program, Path, tuple[Any, Any]]:
    """A program run untraced and traced: (program, trace file, ((status, stdout, stderr) of both))."""
    folder = tmp_path_factory.mktemp(request.param)
    program = PROGRAMS[request.param](folder)
    if shutil.which(program.argv[0]) is None:
        pytest.skip(f"{program.argv[0]} is not installed")
    environment = {**os.environ, **program.environment}
    plain = subprocess.run(program.argv, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    clear(folder, program)
    trace = folder / "trace.heapledger"
    ours = heapledger("run", "-q", "-o", trace, "--", *program.argv, env=environment, cwd=folder)
    both = ((plain.returncode, plain.stdout, plain.stderr), (ours.returncode, ours.stdout, ours.stderr))
    return program, trace, both


def as_json(heapledger: Run, *args: str | Path) -> dict[str, Any]:
    result = heapledger(*args, "--format", "json")
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def test_output_and_exit_status_are_those_of_the_untraced_program(
    traced: tuple[Program, Path, tuple[Any, Any]],
) -> None:
    plain, ours = traced[2]
    assert ours == plain


def test_no_event_is_lost_and_every_address_is_predicted_exactly(
    traced: tuple[Program, Path, tuple[Any, Any]], heapledger: Run
) -> None:
    program, trace, _ = traced
    found = as_json(heapledger, "verify", trace)
    assert found["lost"] == 0
    assert len(found["processes"]) >= program.processes
    assert found["events"] > 1000
    assert found["addresses"]["predicted"] > 500
    assert found["addresses"]["exact"] == found["addresses"]["predicted"], json.dumps(found, indent=1)[:4000]
    assert found["addresses"]["forced"] == 0
    assert found["maps"]["compared"] > 0
    assert found["maps"]["exact"] == found["maps"]["compared"], json.dumps(found, indent=1)[:4000]


def test_the_ledger_sums_to_the_kernels_rss_in_every_process(
    traced: tuple[Program, Path, tuple[Any, Any]], heapledger: Run
) -> None:
    _, trace, _ = traced
    processes = as_json(heapledger, "report", trace)["processes"]
    seen = 0
    for process in processes:
        if process["exit_rss_bytes"] is None:
            continue
        found = as_json(heapledger, "report", trace, "--pid", str(process["id"]), "--at", "exit")
        assert sum(o["rss_bytes"] for o in found["owners"]) == found["rss_bytes"] == process["exit_rss_bytes"]
        assert found["smaps_difference_bytes"] == 0
        assert found["unexplained_bytes"] < 0.005 * found["rss_bytes"], found["owners"]
        seen += 1
    assert seen > 0


def test_the_peak_is_at_least_what_is_resident_at_exit(
    traced: tuple[Program, Path, tuple[Any, Any]], heapledger: Run
) -> None:
    found = as_json(heapledger, "report", traced[1], "--at", "peak")
    assert found["rss_bytes"] is not None
    assert sum(o["rss_bytes"] for o in found["owners"]) == found["pagemap_bytes"]
    assert found["unexplained_bytes"] < 0.005 * found["rss_bytes"], found["owners"]
