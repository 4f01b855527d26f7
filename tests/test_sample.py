"""Counters of /proc against other files of /proc."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from pathlib import Path

from heapledger.tracer.sample import Sampler


def test_a_sample_agrees_with_status_rollup_and_rusage() -> None:
    with subprocess.Popen(["sh", "-c", "echo ready; read x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05)
        sampler = Sampler(process.pid)
        row = sampler.sample(full=True)
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if ":" in line
        )
        rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        sampler.close()
        process.kill()
    assert row is not None
    for column, name in {"rss": "VmRSS", "rss_anon": "RssAnon", "vm_size": "VmSize", "vm_pte": "VmPTE"}.items():
        assert row[column] == int(status[name].split()[0]) * 1024, column
    assert row["threads"] == 1
    assert f"Pss:{(row['pss'] or 0) // 1024:>20} kB" in rollup
    assert row["rss"] == sum(row[name] or 0 for name in ("rss_anon", "rss_file", "rss_shmem"))


def test_faults_are_those_of_getrusage() -> None:
    sampler = Sampler(os.getpid())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    row = sampler.sample()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    sampler.close()
    assert row is not None
    assert before <= (row["minor_faults"] or 0) <= after


def test_a_process_that_has_ended_has_no_sample() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        sampler = Sampler(process.pid)
        assert sampler.rss() > 0
        process.kill()
        process.wait()
        assert sampler.rss() == 0
        assert sampler.sample() is None
        sampler.close()


def test_a_name_with_parentheses_and_spaces_does_not_shift_the_fields(tmp_path: Path) -> None:
    program = tmp_path / "a) S 1 (b"
    program.symlink_to("/usr/bin/sleep")
    with subprocess.Popen([program, "60"]) as process:
        while "a) S" not in Path(f"/proc/{process.pid}/comm").read_text():
            pass
        sampler = Sampler(process.pid)
        row = sampler.sample()
        sampler.close()
        process.kill()
    assert row is not None
    assert 0 < (row["minor_faults"] or 0) < 10_000
