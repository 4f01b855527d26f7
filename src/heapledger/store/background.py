"""A thread that does tasks in the order they were handed over, with a bound on what may wait.

zstd, SQLite and numpy's loops let go of Python's interpreter lock, so what is done here happens beside the caller. A
task that fails ends the work: its exception is told once, and no later task runs, so that nothing can be missing in the
middle of what was written.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

Task = Callable[[], object]


class Background:
    """`put` waits while tasks of more than `limit` weight (of any unit) are waiting or being done."""

    def __init__(self, name: str, limit: int, on_error: Callable[[Exception], None]) -> None:
        self.limit = limit
        self._on_error = on_error
        self._tasks: deque[tuple[Task, int]] = deque()
        self._weight = 0
        self._busy = False
        self._failed = False
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, task: Task, weight: int = 0) -> None:
        """Hands over a task. After a failure it is dropped."""
        with self._changed:
            self._changed.wait_for(lambda: self._weight == 0 or self._weight + weight <= self.limit or self._failed)
            if self._failed:
                return
            self._weight += weight
            self._tasks.append((task, weight))
            self._changed.notify_all()

    def is_here(self) -> bool:
        """Whether the caller is one of the tasks."""
        return threading.current_thread() is self._thread

    def drain(self) -> None:
        """Returns when all that was handed over is done, or one of it failed."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or not (self._tasks or self._busy))

    def close(self) -> None:
        """`drain`, and the end of the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._closing)
                if not self._tasks:
                    return
                task, weight = self._tasks.popleft()
                self._busy = True
            try:
                task()
            except Exception as error:  # noqa: BLE001  whatever it is, the caller's thread has to hear of it
                self._on_error(error)
                self._end_by_failure()
                return
            del task  # it holds what it worked on
            with self._changed:
                self._busy = False
                self._weight -= weight
                self._changed.notify_all()

    def _end_by_failure(self) -> None:
        with self._changed:
            self._failed = True
            self._tasks.clear()
            self._busy = False
            self._weight = 0
            self._changed.notify_all()
