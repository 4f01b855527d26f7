"""The first look at a large trace takes seconds: it is done here, in the background, one at a time.

A request asks the desk for the books of a process. They are there, or they are being made (the page shows how far, and
asks again), or making them failed (the page says why; later it is tried again). Results are kept for the files'
present content, the least recently used are dropped. A file that is being recorded changes all the time: its results
are good for `rest_s` after they were made, or else a page would never see them.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from heapledger.errors import HeapledgerError, InputError
from heapledger.web.catalogue import Stamp, stamp_of

if TYPE_CHECKING:
    from heapledger.web.books import Books

log = logging.getLogger("heapledger.web")

#: Called with the share of the work that is done, 0 to 1.
Progress = Callable[[float], None]
#: Makes the books of one process of a file (None: of the main one).
Maker = Callable[[Path, int | None, Progress], "Books"]
Key = tuple[Path, int | None]

#: Stands for a process id where all processes are wanted.
EVERY_PROCESS = -1


class State(Enum):
    WAITING = "waiting"
    WORKING = "working"
    DONE = "done"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Job:
    key: Key
    stamp: Stamp
    state: State = State.WAITING
    progress: float = 0.0
    books: Books | None = None
    error: HeapledgerError | None = None
    finished: threading.Event = field(default_factory=threading.Event)
    started_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.started_s

    def is_good_for(self, stamp: Stamp) -> bool:
        """A finished job's books are of this content; what failed may be tried again."""
        return self.stamp == stamp and self.state is State.DONE

    @property
    def age_s(self) -> float:
        """Since the end of a finished job."""
        return time.monotonic() - self.ended_s


class TooBusyError(HeapledgerError):
    """More analyses are waiting than the desk takes on."""


class Desk:
    """Makes books with one daemon thread: a replay fills a core, and two at a time only double the memory."""

    def __init__(self, make: Maker, *, kept: int, queue_limit: int, rest_s: float = 0.0) -> None:
        self._make = make
        self._rest_s = rest_s
        self._kept = kept
        self._jobs: OrderedDict[Key, Job] = OrderedDict()
        self._queue: queue.Queue[Job] = queue.Queue(maxsize=queue_limit)
        self._lock = threading.Lock()
        self._worker: threading.Thread | None = None

    def ask(self, path: Path, process_id: int | None, *, patience_s: float) -> Job:
        """The job for these books, begun if there is none; waits at most `patience_s` for its end."""
        job = self._find_or_begin((path, process_id))
        job.finished.wait(patience_s)
        return job

    def _find_or_begin(self, key: Key) -> Job:
        try:
            stamp = stamp_of(key[0])
        except OSError as error:
            raise InputError(f"{key[0].name} cannot be read: {error.strerror}") from error
        with self._lock:
            job = self._jobs.get(key)
            if job and (not job.finished.is_set() or job.is_good_for(stamp) or job.age_s < self._rest_s):
                self._jobs.move_to_end(key)
                return job
            job = Job(key, stamp)
            try:
                self._queue.put_nowait(job)
            except queue.Full:
                raise TooBusyError("Too many traces are being analysed; try again in a moment.") from None
            self._jobs[key] = job
            self._forget_oldest()
            self._ensure_worker()
        return job

    def _forget_oldest(self) -> None:
        """Called with the lock held. Unfinished jobs are not dropped: somebody waits for them."""
        for key in [key for key, job in self._jobs.items() if job.finished.is_set()]:
            if len(self._jobs) <= self._kept:
                return
            del self._jobs[key]

    def _ensure_worker(self) -> None:
        """Called with the lock held. Started late: a server that forks (gunicorn) has its threads after the fork."""
        if self._worker is None or not self._worker.is_alive():
            self._worker = threading.Thread(target=self._work, name="heapledger-analysis", daemon=True)
            self._worker.start()

    def _work(self) -> None:
        while True:
            self._carry_out(self._queue.get())

    def _carry_out(self, job: Job) -> None:
        job.state = State.WORKING

        def note(share: float) -> None:
            job.progress = min(max(share, 0.0), 1.0)

        try:
            job.books = self._make(*job.key, note)
            # The analyzer writes its facts into the file: what is kept belongs to the content after that.
            job.stamp = stamp_of(job.key[0])
            job.state = State.DONE
        except HeapledgerError as error:
            job.error, job.state = error, State.FAILED
        except Exception:  # a bug must not kill the one worker: the page says so, the log has the traceback
            log.exception("analysis of %s failed", job.key[0])
            job.error = HeapledgerError(f"heapledger failed to analyse {job.key[0].name}; its log says why.")
            job.state = State.FAILED
        finally:
            job.ended_s = time.monotonic()
            job.finished.set()
