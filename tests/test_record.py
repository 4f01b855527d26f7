"""What a record of the shim says about who called and when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from preload_spool import Recorded, Run, Shim, build_shim, shim, shim_library  # noqa: F401

from heapledger.store.events import Kind

NODE = np.dtype([("ip", "<u8"), ("parent", "<u4"), ("module", "<u4")])
#: The longest a function of record_ways.c is, generously.
NEAR = 200


@pytest.fixture
def program(native: Callable[..., Path]) -> Path:
    return native("record_ways.c", "-O1", "-fno-optimize-sibling-calls")


def callers(image: Recorded, stack: int) -> list[int]:
    """Return addresses, innermost first."""
    nodes = np.fromfile(image.folder / "stacks.0", NODE)
    found = []
    while stack:
        found.append(int(nodes[stack]["ip"]))
        stack = int(nodes[stack]["parent"])
    return found


# ---- who frees


def freeing(shim: Shim, program: Path, options: str) -> tuple[Recorded, int, int]:  # noqa: F811
    """The image, and the stacks of the free of 0x4444 bytes and of the realloc of 0x5555."""
    run = shim.run(program, "freeing", options=options)
    image = run.first
    blocks = image.of(Kind.MALLOC)
    first, second = (int(blocks.addr[blocks.size == size][0]) for size in (0x4444, 0x5555))
    events = image.events
    freed = events.stack[(events.kind == Kind.FREE) & (events.addr == first)]
    moved = events.stack[(events.kind == Kind.REALLOC) & (events.arg == second)]
    by_free, by_realloc = (int(word, 16) for word in run.stdout.split())
    for stack, function in ((int(freed[0]), by_free), (int(moved[0]), by_realloc)):
        if stack:
            inner, outer = callers(image, stack)[:2]
            assert function < inner < function + NEAR
            assert not function < outer < function + NEAR
    return image, int(freed[0]), int(moved[0])


def test_a_free_and_a_realloc_have_the_stack_of_who_called_them(shim: Shim, program: Path) -> None:  # noqa: F811
    image, freed, moved = freeing(shim, program, "")
    assert 0 not in (freed, moved)
    assert image.of(Kind.FREE).stack.all()


def test_without_stacks_of_frees_all_others_keep_theirs(shim: Shim, program: Path) -> None:  # noqa: F811
    image, freed, moved = freeing(shim, program, "free_stacks=0")
    assert freed == 0
    assert moved != 0
    assert not image.of(Kind.FREE).stack.any()
    assert image.of(Kind.MALLOC).stack.all()


# ---- exits


def test_an_exit_far_behind_its_entry_has_a_slot_of_its_own(
    shim: Shim,  # noqa: F811
    native: Callable[..., Path],
    tmp_path: Path,
) -> None:
    # Really far is 2**23 numbers; in this build each exit is.
    far_folder = tmp_path / "far"
    far_folder.mkdir()
    far = Shim(build_shim(far_folder, "-DHL_SPAN_FITS=1"), far_folder)
    argv = (native("sampled.c", "-O1", "-lpthread"), "many", "10000")
    near, image = shim.run(*argv).first, far.run(*argv).first
    near.check()
    image.check()
    events = image.events
    assert (events.seq_exit[:-1] - events.seq[:-1] == near.events.seq_exit[:-1] - near.events.seq[:-1]).all()
    for name in ("kind", "size", "word"):
        assert np.array_equal(getattr(events, name)[1:], getattr(near.events, name)[1:]), name
    assert image.rings[0].get("head") >= 2 * len(events)
    far.run(argv[0], "threads").first.check()


# ---- the clock


def clocked(run: Run) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Of the calls that the program timed: the tick before, the event's, the tick after."""
    said = np.array([line.split() for line in run.stdout.splitlines()], np.uint64) >> np.uint64(
        run.first.get("tick_shift")
    )
    blocks = run.first.of(Kind.MALLOC)
    ours = (blocks.size >= 0x10000) & (blocks.size < 0x10000 + len(said))
    assert blocks.size[ours].tolist() == [0x10000 + i for i in range(len(said))]
    before, after = said.astype(np.int64).T
    return before, blocks.time[ours].astype(np.int64), after


def test_where_nobody_keeps_time_each_event_has_its_own(shim: Shim, program: Path) -> None:  # noqa: F811
    before, tick, after = clocked(shim.run(program, "no-clock"))
    assert (before <= tick).all()
    assert (tick <= after).all()


def test_an_events_time_is_at_most_seven_events_old(shim: Shim, program: Path) -> None:  # noqa: F811
    before, tick, after = clocked(shim.run(program, "still-clock"))
    assert (tick <= after).all()
    assert (before[:-7] <= tick[7:]).all()
    assert (np.diff(tick) >= 0).all()
    assert len(np.unique(tick)) <= len(tick) // 8 + 2  # read seldom


def test_the_clock_is_read_again_when_the_collectors_has_gone_on(shim: Shim, program: Path) -> None:  # noqa: F811
    before, tick, after = clocked(shim.run(program, "clock"))
    assert (tick <= after).all()
    assert (before[::3] <= tick[::3]).all()
