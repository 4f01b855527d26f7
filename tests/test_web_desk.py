"""The desk: one analysis at a time, kept while the file stays as it is."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import cast

import pytest

from heapledger.errors import TraceError
from heapledger.web.books import Books
from heapledger.web.desk import Desk, Job, Maker, Progress, State, TooBusyError

WAIT_S = 10.0


class Workshop:
    """Makes (empty) books when it is let, and counts them."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.open = threading.Event()
        self.begun = threading.Event()

    def make(self, path: Path, process_id: int | None, progress: Progress) -> Books:
        progress(0.25)
        self.begun.set()
        assert self.open.wait(WAIT_S)
        self.made.append(path.name)
        if path.name == "bad":
            raise TraceError("this is no trace")
        if path.name == "bug":
            raise ZeroDivisionError
        return cast(Books, object())


@pytest.fixture
def workshop() -> Workshop:
    return Workshop()


def desk_of(workshop: Workshop, kept: int = 4, queue_limit: int = 4) -> Desk:
    return Desk(cast(Maker, workshop.make), kept=kept, queue_limit=queue_limit)


def file_at(folder: Path, name: str) -> Path:
    path = folder / name
    path.write_text(name)
    return path


def test_a_long_analysis_shows_its_progress_and_then_its_books(tmp_path: Path, workshop: Workshop) -> None:
    desk, path = desk_of(workshop), file_at(tmp_path, "a")
    job = desk.ask(path, None, patience_s=0)
    assert workshop.begun.wait(WAIT_S)
    assert (job.state, job.progress, job.books) == (State.WORKING, 0.25, None)
    workshop.open.set()
    again = desk.ask(path, None, patience_s=WAIT_S)
    assert again is job
    assert job.state is State.DONE
    assert job.books is not None


def test_the_same_file_is_analysed_once_and_a_changed_one_again(tmp_path: Path, workshop: Workshop) -> None:
    workshop.open.set()
    desk, path = desk_of(workshop), file_at(tmp_path, "a")
    for _ in range(3):
        desk.ask(path, None, patience_s=WAIT_S)
    assert workshop.made == ["a"]
    path.write_text("longer than before")
    desk.ask(path, None, patience_s=WAIT_S)
    assert workshop.made == ["a", "a"]


def test_results_of_a_file_that_the_analysis_itself_wrote_to_are_kept(tmp_path: Path, workshop: Workshop) -> None:
    path = file_at(tmp_path, "a")

    def make(path: Path, process_id: int | None, progress: Progress) -> Books:
        path.write_text(path.read_text() + " and facts")
        return workshop.make(path, process_id, progress)

    workshop.open.set()
    desk = Desk(cast(Maker, make), kept=4, queue_limit=4)
    for _ in range(2):
        desk.ask(path, None, patience_s=WAIT_S)
    assert workshop.made == ["a"]


@pytest.mark.parametrize(("name", "message"), [("bad", "this is no trace"), ("bug", "its log says why")])
def test_a_failed_analysis_says_so_and_the_next_one_works(
    tmp_path: Path, workshop: Workshop, name: str, message: str
) -> None:
    workshop.open.set()
    desk = desk_of(workshop)
    job = desk.ask(file_at(tmp_path, name), None, patience_s=WAIT_S)
    assert job.state is State.FAILED
    assert job.error is not None
    assert message in job.error.message
    assert desk.ask(file_at(tmp_path, "good"), None, patience_s=WAIT_S).state is State.DONE


def test_a_file_that_keeps_changing_is_shown_for_a_while_nevertheless(tmp_path: Path, workshop: Workshop) -> None:
    workshop.open.set()
    desk, path = Desk(cast(Maker, workshop.make), kept=4, queue_limit=4, rest_s=60), file_at(tmp_path, "a")
    for length in range(3):
        path.write_text("x" * length)
        assert desk.ask(path, None, patience_s=WAIT_S).state is State.DONE
    assert workshop.made == ["a"]


def test_what_failed_is_tried_again_later(tmp_path: Path, workshop: Workshop) -> None:
    workshop.open.set()
    desk, path = desk_of(workshop), file_at(tmp_path, "bad")
    for _ in range(2):
        assert desk.ask(path, None, patience_s=WAIT_S).state is State.FAILED
    assert workshop.made == ["bad", "bad"]


def test_the_least_recently_used_results_are_dropped(tmp_path: Path, workshop: Workshop) -> None:
    workshop.open.set()
    desk = desk_of(workshop, kept=2)
    for name in ("a", "b", "a", "c", "a", "b"):
        desk.ask(
            file_at(tmp_path, name) if not (tmp_path / name).exists() else tmp_path / name, None, patience_s=WAIT_S
        )
    assert workshop.made == ["a", "b", "c", "b"]


def test_more_waiting_analyses_than_allowed_are_refused(tmp_path: Path, workshop: Workshop) -> None:
    desk = desk_of(workshop, queue_limit=2)
    jobs: list[Job] = [desk.ask(file_at(tmp_path, "0"), None, patience_s=0)]
    assert workshop.begun.wait(WAIT_S)
    jobs += [desk.ask(file_at(tmp_path, name), None, patience_s=0) for name in ("1", "2")]
    with pytest.raises(TooBusyError):
        desk.ask(file_at(tmp_path, "3"), None, patience_s=0)
    workshop.open.set()
    assert all(job.finished.wait(WAIT_S) for job in jobs)
