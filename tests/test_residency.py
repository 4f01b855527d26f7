"""Every resident page, against what the kernel's own smaps adds up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from heapledger.errors import ProcessGoneError
from heapledger.store.residency import HUGE, Category, decode_runs
from heapledger.tracer import residency
from heapledger.tracer.stopped import stopped

METHODS = ["pagemap_scan", "pagemap"]
PYTHON = "import json, sys, threading; x = [str(i) for i in range(10**5)]; print('ready', flush=True); sys.stdin.read()"


def has_scan() -> bool:
    return residency.read(os.getpid()).method == "pagemap_scan"


def supported(method: str) -> None:
    if residency.read(os.getpid()).method != "pagemap_scan" and method == "pagemap_scan":
        pytest.skip("this kernel has no PAGEMAP_SCAN (Linux 6.7)")


def wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


@pytest.fixture
def pages(native: Callable[..., Path]) -> Iterator[subprocess.Popen[str]]:
    """A sleeping program with pages of every kind."""
    argv = [str(native("run_known.c", "-pthread")), "pages", "60000"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        wait_ready(process)
        yield process
        process.kill()


@pytest.fixture
def python() -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-c", PYTHON]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        wait_ready(process)
        yield process
        process.kill()


def kernel_rss(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


def flat(vma: residency.Vma) -> npt.NDArray[np.uint8]:
    """The category of each page."""
    return np.repeat(np.frombuffer(vma.category, np.uint8), vma.pages)


def check_balanced(reading: residency.Reading, pid: int) -> None:
    for vma in reading.vmas:
        assert vma.resident_bytes == vma.rss, vma
        assert sum(vma.pages) * residency.PAGE == vma.end - vma.start, vma
    assert reading.agrees()
    assert reading.rss == reading.pagemap_bytes == kernel_rss(pid)


@pytest.mark.parametrize("method", METHODS)
def test_pages_sum_to_rss_in_every_vma_of_a_program_with_all_kinds(pages: subprocess.Popen[str], method: str) -> None:
    supported(method)
    reading = residency.read(pages.pid, method=method)
    assert reading.method == method
    check_balanced(reading, pages.pid)
    kinds = {int(kind) & 0xF for vma in reading.vmas for kind in vma.category}
    assert {Category.ABSENT, Category.ANON, Category.FILE, Category.ZERO} <= kinds


@pytest.mark.parametrize("method", METHODS)
def test_pages_sum_to_rss_in_python(python: subprocess.Popen[str], method: str) -> None:
    supported(method)
    check_balanced(residency.read(python.pid, method=method), python.pid)


def test_both_methods_see_the_same_pages(pages: subprocess.Popen[str]) -> None:
    supported("pagemap_scan")
    scanned = residency.read(pages.pid, method="pagemap_scan")
    listed = residency.read(pages.pid, method="pagemap")
    for one, other in zip(scanned.vmas, listed.vmas, strict=True):
        if one.rss == 0:
            continue  # the list leaves those out
        assert np.array_equal(flat(one) & 0xF, flat(other) & 0xF), one


def test_zero_pages_and_written_ones_are_where_they_were_made(pages: subprocess.Popen[str]) -> None:
    """1 MiB of which every second page was read (the zero page) and the second page was written."""
    wanted = [Category.ZERO if i % 2 == 0 else Category.ABSENT for i in range(256)]
    wanted[1] = Category.ANON
    parts = [
        flat(vma) for vma in residency.read(pages.pid).vmas if vma.perms == "rw-p" and vma.end - vma.start < 4 << 30
    ]
    everything = np.concatenate(parts)
    windows = np.lib.stride_tricks.sliding_window_view(everything, 256)
    assert (windows == np.array(wanted, np.uint8)).all(axis=1).any()


def test_huge_pages_are_told_and_a_hole_in_one_is_seen(pages: subprocess.Popen[str]) -> None:
    supported("pagemap_scan")
    thp = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not thp.exists() or "[never]" in thp.read_text():
        pytest.skip("transparent huge pages are off")
    vmas = residency.read(pages.pid).vmas
    assert any(int(kind) == Category.ANON | HUGE for vma in vmas for kind in vma.category)


def test_rows_for_the_file_hold_the_runs(pages: subprocess.Popen[str]) -> None:
    for vma in residency.read(pages.pid).vmas:
        row = vma.row()
        lengths, category = decode_runs(row["runs"])
        assert (lengths.tolist(), category.tobytes()) == (vma.pages.tolist(), vma.category)
        assert row["vm_flags"] or row["path"] == "[vsyscall]"


def test_a_terabyte_that_is_not_there_costs_nothing(pages: subprocess.Popen[str]) -> None:
    begun = time.monotonic()
    reading = residency.read(pages.pid)
    assert max(vma.end - vma.start for vma in reading.vmas) >= 1 << 40
    assert time.monotonic() - begun < 1


def test_a_process_that_has_ended_is_reported_as_gone() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
        with pytest.raises(ProcessGoneError):
            residency.read(process.pid)
        with pytest.raises(ProcessGoneError), stopped(process.pid, on_status=lambda _pid, _status: None):
            pass


def states(pid: int) -> set[str]:
    """The scheduler's state letter of every thread."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks}


def test_all_threads_stand_still_while_stopped_and_run_on_afterwards() -> None:
    code = (
        "import threading, itertools\n"
        "def spin():\n  for i in itertools.count(): pass\n"
        "for i in range(4): threading.Thread(target=spin, daemon=True).start()\n"
        "print('ready', flush=True); spin()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        wait_ready(process)
        for _ in range(20):
            with stopped(process.pid, on_status=lambda _pid, _status: None):
                assert states(process.pid) == {"t"}
        assert "t" not in states(process.pid)
        assert "TracerPid:\t0\n" in Path(f"/proc/{process.pid}/status").read_text()
        process.kill()


def test_a_thread_is_let_go_when_the_look_fails() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        with pytest.raises(ZeroDivisionError), stopped(process.pid, on_status=lambda _pid, _status: None):
            _ = 1 // 0
        assert "t" not in states(process.pid)
        process.kill()


def test_stops_never_interrupt_a_system_call(native: Callable[..., Path]) -> None:
    """epoll_wait gives EINTR after a stop: so it is left alone, and what slips through is put back."""
    argv = [str(native("run_known.c", "-pthread")), "waits", "600"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        stops = 0
        while process.poll() is None:
            try:
                with stopped(process.pid, on_status=lambda _pid, _status: None):
                    stops += 1
            except (ProcessGoneError, PermissionError):
                break
            time.sleep(0.002)
        output, _ = process.communicate()
    assert output == "interrupted 0\n"
    assert stops > 20


def test_a_sleep_that_must_not_be_disturbed_is_slept_through(native: Callable[..., Path]) -> None:
    argv = [str(native("run_known.c", "-pthread")), "waits", "200"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        time.sleep(0.05)
        with stopped(process.pid, on_status=lambda _pid, _status: None) as stop:
            assert "t" not in states(process.pid)
            assert stop.kept_still()
            time.sleep(0.06)
            assert not stop.kept_still(), "its 20 ms are over"
        assert process.wait() == 0


def test_a_kernel_without_the_scan_has_numpy_imported_before_a_process_is_stopped() -> None:
    told = """
import sys
from heapledger.tracer import residency
residency._PAGEMAP_SCAN = int(sys.argv[1])
residency.prepare()
print("numpy" in sys.modules)
"""
    for request, imported in ((residency._PAGEMAP_SCAN, "False"), (0xC0606611, "True")):
        if request == residency._PAGEMAP_SCAN and not has_scan():
            continue
        argv = [sys.executable, "-c", told, str(request)]
        assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout.strip() == imported


COMB = """
import mmap, sys
pages = int(sys.argv[1])
comb = mmap.mmap(-1, pages * 4096)
for page in range(0, pages, 2):
    comb[page * 4096] = 1
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("holes", [100, 3_000, 9_000])
def test_a_comb_of_pages_is_scanned_once_in_order_and_whole(holes: int) -> None:
    # 512 regions fill the kernel's own buffer, 8,192 ours. In another process: reading takes memory.
    supported("pagemap_scan")
    argv = [sys.executable, "-c", COMB, str(2 * holes)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        fd = os.open(f"/proc/{child.pid}/pagemap", os.O_RDONLY)
        regions = residency.scan(fd, 0, (1 << 47) - 4096)
        os.close(fd)
        starts, ends = np.array(regions[::3]), np.array(regions[1::3])
        assert (starts[1:] >= ends[:-1]).all()
        assert len(starts) >= holes
        time.sleep(0.05)  # until it sleeps in read
        check_balanced(residency.read(child.pid, method="pagemap_scan"), child.pid)
        child.communicate()


def test_a_text_of_smaps_that_was_cut_off_is_read_as_far_as_it_goes() -> None:
    text = Path("/proc/self/smaps").read_bytes()
    whole = residency.parse_smaps(text)
    assert whole == residency._parse_any_smaps(text)
    assert sum(vma.rss for vma in whole) > 1 << 20
    for cut in range(0, len(text), 997):
        part = residency.parse_smaps(text[:cut])
        assert part == residency._parse_any_smaps(text[:cut])
        assert part[:-1] == whole[: max(0, len(part) - 1)]


def test_smaps_of_a_kernel_without_some_fields_is_read_line_by_line() -> None:
    text = Path("/proc/self/smaps").read_bytes()
    older = b"".join(line for line in text.splitlines(keepends=True) if not line.startswith((b"Swap:", b"Anonymous:")))
    whole, vmas = residency.parse_smaps(text), residency.parse_smaps(older)
    assert [(v.start, v.rss, v.pss, v.private, v.flags) for v in vmas] == [
        (v.start, v.rss, v.pss, v.private, v.flags) for v in whole
    ]
    assert not any(v.anonymous or v.swap for v in vmas)
