"""Suites of real programs come out under heapledger as they do without it, and their traces are whole.

What is compared is in real_suites.py. Each suite runs alone and traced at the same time: most of CPython's tests sleep.
With HEAPLEDGER_FULL_SUITES=1 all of them run in full, which takes minutes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import real_suites
from real_suites import Suite

Heapledger = Callable[..., "CompletedProcess[str]"]
FULL = bool(os.environ.get("HEAPLEDGER_FULL_SUITES"))
SUITES = {suite.name: suite for suite in (real_suites.full() if FULL else real_suites.quick())}


def traced(trace: Path) -> list[str]:
    return [sys.executable, "-m", "heapledger", "run", "--no-symbols", "-o", str(trace), "--"]


def as_json(heapledger: Heapledger, *args: str | Path) -> dict[str, Any]:
    found = heapledger(*args, "--format", "json")
    assert found.returncode == 0, found.stderr
    return dict(json.loads(found.stdout))


def check_whole(heapledger: Heapledger, trace: Path) -> None:
    """Every event is there and every block can be read."""
    info = as_json(heapledger, "info", "--check", trace)
    assert info["complete"]
    assert info["lost"] == 0, [process["notes"] for process in info["processes"]]
    assert info["damaged"] == []
    assert info["events"] > 0


def check_verified(heapledger: Heapledger, trace: Path, suite: Suite) -> None:
    """As much of the trace as the model knows about is right."""
    found = as_json(heapledger, "verify", trace)
    assert found["lost"] == 0
    if suite.own_malloc:
        assert found["rss"]["ledger_bytes"] == found["rss"]["kernel_bytes"]
        assert found["maps"]["exact"] == found["maps"]["compared"]
    if suite.exact:
        assert found["addresses"]["predicted"] > 1000
        assert found["addresses"]["exact"] == found["addresses"]["predicted"], found["notes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_a_real_suite_passes_as_it_does_alone(name: str, tmp_path: Path, heapledger: Heapledger) -> None:
    suite = SUITES[name]
    if reason := suite.missing():
        pytest.skip(reason)
    trace = tmp_path / "suite.heapledger"
    timeout = 900.0 if FULL else 120.0
    with ThreadPoolExecutor(2) as both:
        plain = both.submit(real_suites.run, suite, [], timeout=timeout)
        ours = both.submit(real_suites.run, suite, traced(trace), timeout=timeout)
    (expected, _), (outcome, ended) = plain.result(), ours.result()
    assert outcome == expected, ended.stderr[-2000:]
    check_whole(heapledger, trace)
    if not name.startswith("CPython"):  # hundreds of processes, a tenth of a second each
        check_verified(heapledger, trace, suite)


def test_a_suite_that_does_not_end_is_killed_and_told(tmp_path: Path) -> None:
    sleeper = Suite("sleeper", lambda _: ["sleep", "100"], lambda ended, folder: {})
    with pytest.raises(real_suites.HungError, match="still running"):
        real_suites.run(sleeper, traced(tmp_path / "hung.heapledger"), timeout=1)
