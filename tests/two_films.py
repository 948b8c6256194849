"""Two films through a pipeline whose model is swapped while they run."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from streamd.changes import difference
from streamd.config import Config
from streamd.lane import Lane
from streamd.lanes import Prepared
from streamd.messages import Result, Status, StreamState
from streamd.metrics.readings import ModelReading
from streamd.pipeline import Pipeline

WITHIN_S = 60.0
NUM_FRAMES = 240
STREAMS = ("one", "two")


class TwoFilms:
    """Two films through one pipeline, at the model's pace; results are noted, and some frames wait to be let on.

    They wait in the worker, where no lock is held.
    """

    def __init__(self, model: Path, clip: Path, *, for_ever: bool = False, **settings: Any) -> None:
        """`settings` are keys of the model. With `for_ever` the films begin again, at the pace of cameras."""
        pace = {"loop": True} if for_ever else {"pace": "fast"}
        self.streams = {name: {"url": str(clip), **pace} for name in STREAMS}
        self.settings = {"workers": 1, "threads": 1, "max_batch": 2, **settings}
        self.config = self.configured(model)
        self.results: dict[str, list[Result]] = defaultdict(list)
        self.statuses: list[Status] = []
        self.crashes: list[Exception] = []
        self.failures: list[tuple[Lane, Exception]] = []
        self.has_failed = threading.Event()
        self.is_over = threading.Event()
        self._is_second_there = threading.Event()
        self._reached: dict[int, threading.Event] = defaultdict(threading.Event)
        self._may_pass: dict[int, threading.Event] = {}
        self.pipeline = Pipeline(
            self.config,
            self._deliver,
            self._on_status,
            on_crash=self._on_crash,
            on_end=self.is_over.set,
            on_failure=self._on_failure,
        )
        self.pipeline.warm_up()
        self._watch(self.pipeline.lanes)

    def configured(self, model: Path, **settings: Any) -> Config:
        model_tree = {"path": str(model), "gate": None, **self.settings, **settings}
        return Config.model_validate({"models": {"m": model_tree}, "streams": self.streams})

    def hold_at(self, *seqs: int) -> None:
        """Let each worker that comes to these frames of the first stream, or behind them, wait for `let_on`."""
        self._may_pass = {seq: threading.Event() for seq in seqs}

    def wait_for(self, seq: int) -> None:
        assert self._reached[seq].wait(WITHIN_S)

    def wait_for_result_of(self, stream: str) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not self.results[stream]:
            assert time.monotonic() < deadline, f"no result of {stream}"
            time.sleep(0.01)

    def let_on(self, seq: int) -> None:
        self._may_pass[seq].set()

    def swap(self, model: Path, spoil: Callable[[Lane], None] = lambda lane: None, **settings: Any) -> Prepared:
        return self.follow(self.configured(model, **settings), spoil)

    def follow(self, config: Config, spoil: Callable[[Lane], None] = lambda lane: None) -> Prepared:
        changes = difference(self.config, config, self.pipeline.replaced(config))
        prepared = self.pipeline.prepare(config, changes)
        for lane in prepared.lanes["m"]:
            spoil(lane)
        self._watch(prepared.lanes["m"])
        self.pipeline.apply(prepared, changes)
        self.config = config
        return prepared

    def roll_back(self, why: str = "asked for") -> None:
        prepared = self.pipeline.prepare_rollback("m")
        self._watch(prepared.lanes["m"])
        self.pipeline.roll_back("m", prepared, why)

    def finish(self) -> None:
        """Wait for the films' end, then for the threads'."""
        assert self.is_over.wait(WITHIN_S)
        self.stop()

    def stop(self) -> None:
        self.pipeline.close_intake()
        assert self.pipeline.drain(WITHIN_S) == []
        assert self.pipeline.join_sources(WITHIN_S) == []

    def assert_nothing_lost(self) -> None:
        assert self.crashes == []
        for name in STREAMS:
            assert [result.frame.seq for result in self.results[name]] == list(range(NUM_FRAMES))
            assert {result.dropped for result in self.results[name]} == {0}
            assert all(len(result.detections) == 2 for result in self.results[name])

    def versions(self, stream: str) -> list[str]:
        """Name the versions that saw the stream, one after the other."""
        specs = [result.spec for result in self.results[stream]]
        return [name for name, _ in groupby(spec.name for spec in specs if spec is not None)]

    def reading(self) -> ModelReading:
        return self.pipeline.model("m")

    def _watch(self, lanes: Sequence[Lane]) -> None:
        for lane in lanes:
            lane.tap = self._see

    def _see(self, result: Result) -> None:
        if result.frame.stream == STREAMS[0]:
            assert self._is_second_there.wait(WITHIN_S), "else the first version might see only one of the films"
            self._reached[result.frame.seq].set()
            for seq, gate in self._may_pass.items():
                assert result.frame.seq < seq or gate.wait(WITHIN_S)

    def _deliver(self, result: Result) -> None:
        self.results[result.frame.stream].append(result)

    def _on_status(self, status: Status) -> None:
        self.statuses.append(status)
        if status.stream == STREAMS[1] and status.state == StreamState.RUNNING:
            self._is_second_there.set()

    def _on_crash(self, err: Exception) -> None:
        self.crashes.append(err)
        self.is_over.set()

    def _on_failure(self, lane: Lane, err: Exception) -> None:
        self.failures.append((lane, err))
        self.has_failed.set()
