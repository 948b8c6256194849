"""Watch one camera as the daemon does: supervisor, source and decoder are the real ones, only the model is missing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from pydantic import SecretStr

from streamd.backoff import Backoff
from streamd.config import StreamConfig
from streamd.connection import connector
from streamd.decode import Decoders
from streamd.messages import Frame, Status, StreamState
from streamd.supervisor import Policy, Supervisor

DEADLINE_S = 30.0  # for what a test waits for; only a test that fails waits so long


class Watcher:
    """Run a stream in a thread, and keep the states it says and the frames it hands over."""

    def __init__(self, url: str, *, backoff: Backoff | None = None, keep: int = 1000, **settings: Any) -> None:
        """`settings` are keys of a stream's configuration; the time-outs are short unless they say otherwise."""
        timeouts = {"open_timeout_s": 1.0, "read_timeout_s": 1.0, "stall_timeout_s": 1.0}
        config = StreamConfig(url=SecretStr(url), decoder="software", **{**timeouts, **settings})
        self.statuses: list[Status] = []
        self.frames: list[Frame] = []
        self._keep = keep
        self._news = threading.Condition()
        self.supervisor = Supervisor(
            "gate",
            Policy(drop_corrupt=config.corrupt_frames == "drop", stall_timeout_s=config.stall_timeout_s),
            connector("gate", config, Decoders(torch.device("cpu"))),
            self._take,
            self._note,
            backoff or Backoff(base_s=0.05, ceiling_s=0.2),
        )
        self._thread = threading.Thread(target=self.supervisor.run, name="gate")

    def __enter__(self) -> Watcher:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.supervisor.stop()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()

    @property
    def states(self) -> list[StreamState]:
        return [status.state for status in self.statuses]

    def wait_for(self, state: str, times: int = 1) -> Status:
        """Return the status with which the stream entered a state for the n-th time."""

        def entered() -> list[Status]:
            return [status for status in self.statuses.copy() if status.state == state]

        self._wait(lambda: len(entered()) >= times, f"'{state}' {times} times")
        return entered()[times - 1]

    def wait_for_frames(self, count: int) -> list[Frame]:
        """Wait until so many frames more than now are there, and return them."""
        before = len(self.frames)
        self._wait(lambda: len(self.frames) >= before + count, f"{count} frames")
        return self.frames[before : before + count]

    def _wait(self, come: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        with self._news:
            while not come():
                left_s = deadline_s - time.monotonic()
                said = [(status.state, status.reason) for status in self.statuses]
                assert left_s > 0, f"waited for {what}; {len(self.frames)} frames came, and the states were {said}"
                self._news.wait(left_s)

    def _take(self, frame: Frame) -> bool:
        with self._news:
            if len(self.frames) < self._keep:
                self.frames.append(frame)
            self._news.notify_all()
        return True

    def _note(self, status: Status) -> None:
        with self._news:
            self.statuses.append(status)
            self._news.notify_all()
