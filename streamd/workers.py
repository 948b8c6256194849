"""The threads that run the lanes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from streamd.lane import Lane
from streamd.lanes import Work
from streamd.threads import guarded, join


class Workers:
    """Run the work of the lanes until they are closed and nothing waits. Used by one thread at a time."""

    def __init__(self, on_crash: Callable[[Exception], None]) -> None:
        self._on_crash = on_crash
        self._threads: dict[Lane, list[threading.Thread]] = {}

    @property
    def lanes(self) -> list[Lane]:
        """The lanes that were started and not forgotten."""
        return [*self._threads]

    def start(self, lane: Lane, work: Work) -> None:
        """Start the threads of a lane."""
        self._threads[lane] = []
        for name, run in work.items():
            worker = guarded(name, run, self._on_crash)
            worker.start()
            self._threads[lane].append(worker)

    def forget_ended(self) -> None:
        """Let go of the lanes whose threads have all ended."""
        alive = {lane: [thread for thread in of if thread.is_alive()] for lane, of in self._threads.items()}
        self._threads = {lane: of for lane, of in alive.items() if of}

    def join(self, lanes: Iterable[Lane], deadline_s: float) -> list[str]:
        """Wait for these lanes; name the threads that did not end in time."""
        return join([thread for lane in lanes for thread in self._threads.get(lane, ())], deadline_s)
