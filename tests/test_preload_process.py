"""Processes that fork, exec, end in every way, take signals: what is recorded, and that they behave as untraced."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from preload_spool import NO_FREE_RING, Recorded, Shim, plain, shim, shim_library  # noqa: F401

from heapledger.store.events import Events, Kind
from heapledger.tracer import spool

Native = Callable[..., Path]
NOBODY = 0xFFFFFFFF


@pytest.fixture
def program(native: Native) -> Path:
    return native("shim_process.c", "-O1", "-lpthread", "-ldl")


def _sizes(image: Recorded) -> list[int]:
    return [int(size) for size in image.of(Kind.MALLOC).size]


# ---- children


def test_a_fork_child_gets_an_image_of_its_own_that_names_its_parent(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "fork")
    parent, (child,) = run.first, run.children
    assert run.stdout.split() == [str(child.get("pid")).encode(), b"7"]
    assert 0x5555 in _sizes(child)
    assert 0x5555 not in _sizes(parent)
    assert 0x6666 in _sizes(parent)
    assert 0x6666 not in _sizes(child)
    assert child.get("parent_image") == 0
    assert child.get("ppid") == parent.get("pid")
    forked = parent.of(Kind.FORK)
    assert forked.arg.tolist() == [child.get("pid")]
    inherited = parent.of(Kind.MALLOC)
    assert int(inherited.seq_exit[inherited.size == 0x4444][0]) < child.get("fork_seq") <= int(forked.seq[0])
    freed = inherited.addr[inherited.size == 0x4444]
    assert child.of(Kind.FREE).addr[0] == freed[0]
    for image in (parent, child):
        image.check()


def test_a_child_names_its_parent_also_when_that_is_dead(shim: Shim, native: Native) -> None:  # noqa: F811
    run = shim.run(native("shim_orphan.c"))
    assert (run.code, run.stdout) == (4, b"orphan\n")
    (child,) = run.children
    assert f"{child.get('ppid')}.{child.get('parent_image')}" == run.first.name


def test_a_child_of_a_raw_clone_never_writes_into_its_parents_rings(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "rawfork")
    parent, (child,) = run.first, run.children
    assert 0x5555 in _sizes(child)
    assert 0x5555 not in _sizes(parent)
    assert child.get("parent_image") == 0
    assert child.get("exit_status") == 8
    parent.check()
    child.check()


def test_a_vfork_child_neither_holds_nor_ends_its_parents_image(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "vfork")
    assert run.stdout == b"from vfork\n9 0\n"
    parent, (echo,) = run.first, run.children
    assert parent.held == 1
    assert parent.get("exit_how") == 0
    assert 0x6666 in _sizes(parent)
    assert echo.get("parent_image") == NOBODY
    parent.check()


def test_spawned_children_are_images_of_their_own(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "spawn")
    assert run.stdout == b"0 5 6\n"
    assert [child.get("exit_status") for child in run.children] == [5, 6]


def test_an_exec_holds_the_old_image_and_starts_a_new_one(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "exec")
    assert run.stdout == b"after exec\n"
    before, (after,) = run.first, run.children
    assert (before.name, after.name) == (f"{before.get('pid')}.0", f"{before.get('pid')}.1")
    assert before.held == 1
    assert before.get("exit_how") == 3
    assert before.rows()[-1][0] == Kind.EXEC
    before.check()
    after.check()


def test_an_exec_without_the_preload_is_said_in_the_log(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "exec_bare")
    assert run.stdout == b"bare\n"
    assert not run.children
    assert ["S", "child was started without the shim: /bin/echo"] in run.first.log


def test_a_failed_exec_goes_on_recording_with_errno_as_untraced(
    shim: Shim,  # noqa: F811
    program: Path,
    tmp_path: Path,
) -> None:
    junk = tmp_path / "junk"
    junk.write_text("no program")
    junk.chmod(0o755)
    run = shim.run(program, "exec_fail", junk)
    assert (run.code, run.stdout) == (3, plain(program, "exec_fail", junk).stdout)
    assert _sizes(run.first)[-2] == 0x6666
    assert run.first.get("state") == spool.ENDED
    assert run.first.get("exit_how") == 0
    run.first.check()


# ---- the end


@pytest.mark.parametrize(
    ("way", "how", "status"),
    [
        ("return", 0, 11),
        ("exit", 0, 12),
        ("_exit", 1, 13),
        ("_Exit", 1, 14),
        ("quick_exit", 2, 15),
        ("exit_thread", 0, 4),
    ],
)
def test_each_way_to_exit_is_held_once_with_its_status(
    shim: Shim,  # noqa: F811
    program: Path,
    way: str,
    how: int,
    status: int,
) -> None:
    run = shim.run(program, way)
    untraced = plain(program, way)
    assert (run.code, run.stdout) == (status, untraced.stdout)
    image = run.first
    assert (image.held, image.get("state"), image.get("exit_how")) == (1, spool.ENDED, how)
    assert image.get("exit_status") == status
    end = image.of(Kind.EXIT)
    assert (end.arg.tolist(), end.arg2.tolist()) == ([status], [how])
    assert 0 < image.get("start_ns") < image.get("end_ns")
    assert image.get("start_tsc") < image.get("end_tsc")
    if b"late" in run.stdout:
        late = image.of(Kind.MALLOC)
        assert int(late.seq[late.size == 0x7777][0]) < int(end.seq[0]), "the hold comes after the program's handlers"
    image.check()


def test_a_killed_program_leaves_a_spool_that_can_be_read(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "kill", collect=False)
    assert run.code == -9
    assert _sizes(run.first) == [0x100 + i for i in range(1000)]
    assert run.first.get("state") == spool.RUNNING


def test_an_abort_is_not_held(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "abort")
    assert run.code == -6
    assert run.first.held == 0
    assert 0x7777 in _sizes(run.first)


# ---- signals


def test_events_of_a_signal_handler_lie_inside_the_call_it_interrupted(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "signal")
    assert run.code == 0
    image = run.first
    image.check()
    handled = image.of(Kind.MMAP)
    assert len(handled) >= 400
    calls = image.of(Kind.MALLOC, Kind.FREE)
    inside = np.searchsorted(calls.seq, handled.seq) - 1
    nested = (handled.seq < calls.seq_exit[inside]) & (handled.seq_exit < calls.seq_exit[inside])
    assert nested.any(), "no signal hit a call; the test shows nothing"


def test_a_handler_that_allocates_is_recorded(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "handler_allocates")
    assert run.stdout == b"1\n"
    assert 0x9999 in _sizes(run.first)


def test_a_child_forked_by_a_handler_in_the_middle_of_a_call_finishes_the_call(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "fork_in_handler")
    assert (run.code, run.stdout) == (0, b"0\n")
    assert len(run.images) == 61
    run.first.check()
    calls, forks = run.first.of(Kind.MALLOC, Kind.FREE), run.first.of(Kind.FORK)
    inside = np.searchsorted(calls.seq, forks.seq) - 1
    assert (forks.seq < calls.seq_exit[inside]).any(), "no fork hit a call; the test shows nothing"


def test_a_call_left_by_longjmp_is_closed_as_never_returned(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "longjmp")
    assert run.stdout == b"300\n"
    image = run.first
    image.check()
    abandoned = image.events.take(image.events.seq_exit == 0)
    assert abandoned.kind.tolist() == [Kind.FREE] * 300
    assert set(abandoned.addr.tolist()) == {0x300000001010}
    assert _sizes(image).count(0x3333) == 300


def test_errno_is_what_it_is_untraced(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "errno")
    assert run.stdout == plain(program, "errno").stdout == b"77 1 1 1 55\n"


# ---- threads


def _check_reuse(events: Events) -> None:
    """Replays by number: an address is given out only after its release, and released only while given out."""
    at = np.concatenate((events.seq, events.seq_exit))
    order = np.argsort(at, kind="stable")
    kinds, addr, old = events.kind.tolist(), events.addr.tolist(), events.arg.tolist()
    live: set[int] = set()
    for i in order.tolist():
        entry, e = i < len(events), i % len(events)
        if entry:
            gone = addr[e] if kinds[e] == Kind.FREE else old[e] if kinds[e] == Kind.REALLOC else 0
            if gone:
                live.remove(gone)
        elif kinds[e] in (Kind.MALLOC, Kind.CALLOC, Kind.REALLOC) and addr[e]:
            assert addr[e] not in live, f"{addr[e]:#x} is given out twice"
            live.add(addr[e])


def test_threads_that_free_each_others_blocks_never_seem_to_reuse_before_the_free(
    shim: Shim,  # noqa: F811
    program: Path,
) -> None:
    run = shim.run(program, "threads", options="ring_slots=1024")  # many laps
    assert run.stdout == b"10\n"
    image = run.first
    image.check()
    events = image.of(Kind.MALLOC, Kind.CALLOC, Kind.REALLOC, Kind.FREE)
    assert len(events) > 160000
    _check_reuse(events)
    starts, ends = image.of(Kind.THREAD_START), image.of(Kind.THREAD_END)
    assert starts.thread.tolist() == [0, 1, 2, 3, 4]
    assert sorted(ends.thread.tolist()) == [1, 2, 3, 4]
    assert set(ends.arg2.tolist()) < set(starts.arg2.tolist())


def test_a_thread_end_is_recorded_however_the_thread_ends(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "thread_ends")
    assert run.stdout == plain(program, "thread_ends").stdout
    image = run.first
    image.check()
    assert image.of(Kind.THREAD_END).thread.tolist() == [1, 2, 3, 4]
    late = image.of(Kind.FREE)
    block = image.of(Kind.MALLOC)
    freed = late.take(late.addr == block.addr[block.size == 0x2222][0])
    assert int(freed.seq[0]) > int(image.of(Kind.THREAD_END).seq[0]), "a key's destructor frees after the routine"
    assert int(freed.thread[0]) == 1


def test_a_threads_stack_is_where_the_kernel_maps_it(shim: Shim, program: Path) -> None:  # noqa: F811
    image = shim.run(program, "exit_thread").first
    ring = image.rings[1]
    low, high, pointer = (ring.get(name) for name in ("stack_low", "stack_high", "thread_pointer"))
    start = image.of(Kind.THREAD_START)
    assert low < pointer < high
    assert high - low == int(start.size[1])
    assert int(start.arg[1]) == low
    assert int(start.addr[1]) == pointer
    lines = [line.split() for line in image.maps.splitlines()]
    ends = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    ranges = [(start, end, line[1]) for (start, end), line in zip(ends, lines, strict=True)]
    assert any(end == low and mode == "---p" for _, end, mode in ranges), "the guard ends where the stack begins"
    assert any(start <= low and high <= end and mode == "rw-p" for start, end, mode in ranges)


def test_the_first_threads_stack_ends_where_the_kernels_does(shim: Shim, program: Path) -> None:  # noqa: F811
    image = shim.run(program, "exit_thread").first
    low, high = (image.rings[0].get(name) for name in ("stack_low", "stack_high"))
    (stack,) = (line.split()[0] for line in image.maps.splitlines() if line.endswith("[stack]"))
    start, end = (int(address, 16) for address in stack.split("-"))
    limit, _ = resource.getrlimit(resource.RLIMIT_STACK)
    if limit == resource.RLIM_INFINITY:
        assert (low, high) == (0, 0)
    else:
        assert (high, high - low) == (end, limit)
        assert low <= start


def test_the_smallest_stacks_are_large_enough_for_the_hooks(shim: Shim, program: Path) -> None:  # noqa: F811
    run = shim.run(program, "small_stacks")
    assert (run.code, run.stdout) == (0, b"2\n")
    assert _sizes(run.first).count(0x9999) == 2
    run.first.check()


def test_rings_of_dead_threads_are_used_again(shim: Shim, program: Path) -> None:  # noqa: F811
    image = shim.run(program, "many_threads").first
    image.check()
    assert len(image.of(Kind.THREAD_START)) == 61
    assert len(image.rings) <= NO_FREE_RING


# ---- the clock


def test_a_long_sleep_is_as_long_in_the_events(shim: Shim, program: Path) -> None:  # noqa: F811
    image = shim.run(program, "sleep").first
    block = image.of(Kind.MALLOC)
    first, second = (int(block.time[block.size == size][0]) for size in (0x4444, 0x5555))
    ticks = (image.get("end_tsc") - image.get("start_tsc")) >> image.get("tick_shift")
    ns_a_tick = (image.get("end_ns") - image.get("start_ns")) / ticks
    assert 60 < ns_a_tick < 260
    assert 1.7e9 < (second - first) * ns_a_tick < 2.2e9


# ---- modules


def test_a_loaded_object_has_a_line_from_load_to_unload(shim: Shim, program: Path, native: Native) -> None:  # noqa: F811
    library = native("shim_loaded.c", "-shared", "-fPIC")
    image = shim.run(program, "dlopen", library).first
    lines = image.log
    loads = [line for line in lines if line[0] == "M" and line[7] == str(library)]
    unloads = {line[1]: int(line[2]) for line in lines if line[0] == "U"}
    assert len(loads) == 2
    assert [line[1] in unloads for line in loads] == [True, True]
    block = image.of(Kind.MALLOC)
    inside = block.seq[block.size == 0xABC].tolist()
    for line, seq in zip(loads, inside, strict=True):
        assert int(line[2]) <= seq + 1
        assert seq < unloads[line[1]]
    assert image.of(Kind.DLCLOSE).arg.tolist() == [0, 0]


def test_dlopen_still_searches_the_callers_own_runpath(
    shim: Shim,  # noqa: F811
    native: Native,
    tmp_path: Path,
) -> None:
    program = native("shim_process.c", "-lpthread", "-ldl", f"-Wl,-rpath,{tmp_path}")
    native("shim_loaded.c", "-shared", "-fPIC", "-O1").rename(tmp_path / "libshim_loaded.so")
    assert plain(program, "dlopen_runpath").stdout == b"found\n"
    assert shim.run(program, "dlopen_runpath").stdout == b"found\n"


def test_the_log_names_the_program_and_what_matters_of_its_environment(shim: Shim, program: Path) -> None:  # noqa: F811
    image = shim.run(program, "return", "a\tb\\c\nd", env={"MALLOC_ARENA_MAX": "2"}).first
    log = image.log
    assert log[0][0] == "P"
    assert log[0][1] == str(program)
    assert log[0][2] == "3"
    assert [line[1] for line in log if line[0] == "A"] == [str(program), "return", "a\tb\\c\nd"]
    assert ["E", "MALLOC_ARENA_MAX=2"] in log
    paths = [line[7] for line in log if line[0] == "M"]
    assert str(program) in paths
    assert any(path.endswith("/libc.so.6") for path in paths)
    assert (image.folder / "maps.start").read_text().count("VmFlags:") > 10
