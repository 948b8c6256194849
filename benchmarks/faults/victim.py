"""A stream at fault, as it is seen from outside: its messages, its metrics and its lines in the log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.faults.listener import Heard
from benchmarks.faults.row import Missed
from streamd.wire import DetectionsMessage, Message, StatusMessage

if TYPE_CHECKING:
    from benchmarks.faults.bench import Bench


class Victim:
    """A stream at fault, as it is seen from outside."""

    def __init__(self, bench: Bench, name: str) -> None:
        self._bench = bench
        self.name = name
        self.added_at = time.time()
        self._log_offset = bench.log_size()

    def enters(
        self,
        state: str,
        *,
        saying: str = "",
        since: float | None = None,
        within_s: float = 20.0,
    ) -> StatusMessage:
        """Wait for a state, of the time since it was added; a failure must be in the metrics and the log as well.

        `saying` is a word of the reason. Raises Missed.
        """
        since = self.added_at if since is None else since

        def is_it(message: Message) -> bool:
            return (
                isinstance(message, StatusMessage)
                and message.stream == self.name
                and message.state == state
                and saying in message.reason
            )

        heard = self._bench.listener.wait_for(is_it, since, within_s)
        if heard is None:
            raise Missed(f"{self.name} did not enter {state} within {within_s:g} s; it was {self.history(since)}")
        assert isinstance(heard.message, StatusMessage)
        if heard.message.retry_in_s is not None:
            self._is_on_record(heard.message)
        return heard.message

    def delivers(
        self, num: int = 3, *, since: float | None = None, within_s: float = 20.0
    ) -> list[Heard[DetectionsMessage]]:
        """Wait for so many results since a Unix time, by default now. Raises Missed."""
        since = time.time() if since is None else since
        left = [num]

        def is_enough(message: Message) -> bool:
            left[0] -= isinstance(message, DetectionsMessage) and message.stream == self.name
            return left[0] <= 0

        if self._bench.listener.wait_for(is_enough, since, within_s) is None:
            came = len(self.results(since))
            raise Missed(
                f"{self.name} published {came} of {num} results within {within_s:g} s; it was {self.history(since)}"
            )
        return self.results(since)

    def fails(self, within_s: float = 20.0) -> float:
        """Wait for a failure, of whatever state, since it was added; return when it was. Raises Missed."""

        def has_failed(message: Message) -> bool:
            return isinstance(message, StatusMessage) and message.stream == self.name and message.retry_in_s is not None

        heard = self._bench.listener.wait_for(has_failed, self.added_at, within_s)
        if heard is None:
            raise Missed(f"{self.name} did not fail within {within_s:g} s; it was {self.history(self.added_at)}")
        return heard.at

    def recovers(self, lifted_at: float, within_s: float) -> float:
        """Wait for the first result that was captured after the fault was lifted; return how long it took."""
        return self.delivers(1, since=lifted_at, within_s=within_s)[0].at - lifted_at

    def results(self, since: float | None = None, until: float = float("inf")) -> list[Heard[DetectionsMessage]]:
        return self._bench.listener.results(self.name, self.added_at if since is None else since, until)

    def statuses(self, since: float | None = None) -> list[StatusMessage]:
        return [
            heard.message
            for heard in self._bench.listener.since(self.added_at if since is None else since)
            if isinstance(heard.message, StatusMessage) and heard.message.stream == self.name
        ]

    def failures(self) -> str:
        """Say the states that were failures, with their reasons; empty where there were none."""
        return ", ".join(f"{one.state} ({one.reason})" for one in self.statuses() if one.retry_in_s is not None)

    def log(self) -> str:
        """Return what the daemon's log says since the stream was added."""
        return self._bench.log_since(self._log_offset)

    def history(self, since: float | None = None) -> str:
        """Say its states in their order, for a message."""
        said: list[str] = []
        for status in self.statuses(since):
            word = f"{status.state} ({status.reason})" if status.reason else str(status.state)
            if not said or said[-1] != word:
                said.append(word)
        return ", ".join(said[-6:]) or "silent"

    def _is_on_record(self, status: StatusMessage) -> None:
        """Hold that a failure has its code, was counted and was logged. Raises Missed."""
        state = status.state
        if status.error != state:
            raise Missed(f"{self.name} is {state} with the code {status.error!r}")
        if not self._bench.metric("streamd_stream_failures_total", stream=self.name, state=state):
            raise Missed(f"no metric counts that {self.name} was {state}")
        if f"{self.name}: {state}" not in self.log():
            raise Missed(f"no line of the log says that {self.name} was {state}")
