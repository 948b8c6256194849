"""Run a daemon for long under random faults, and see whether anything grows.

    python -m benchmarks.soak --minutes 60 --seed 1 --out benchmarks/results/soak

The faults are those rows of benchmarks.faults that are short and leave all as it was, in an order that the seed gives.
OUT.json is written anew each minute, so that an interruption loses nothing, and OUT.png at the end.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from benchmarks import soak_plot
from benchmarks.faults.bench import Bench, running_bench
from benchmarks.faults.catalogue import ROWS
from benchmarks.faults.observe import attempt, watch
from benchmarks.faults.row import Outcome, Row
from benchmarks.faults.victim import Victim
from benchmarks.measure import ROOT, Machine, Usage, describe_machine
from streamd.client import subscribe
from tests.rtsp_faults import End

REGULARS = ("regular0", "regular1")  # streams that stay, on a server that hangs up
SAMPLE_S = 5.0
PAUSE_S = (4.0, 12.0)  # between two faults
QUIET_AFTER_S = 3.0  # after a fault what it used has been given back
WARM_UP = 1 / 3  # of the time: allocators and caches fill
MIN_DRIFT_MINUTES = 3
FLOOR_MINUTES = 3.0  # the daemon gives back what is free once a minute; until then it may hold 20 MiB of it
PACKAGES = ("torch", "av", "pyzmq", "redis", "msgspec")
MAX_MIB_PER_HOUR = 1.0
MAX_P99_DRIFT = 0.10


@dataclass(frozen=True, slots=True)
class Sample:
    """What the daemon held at one moment."""

    minute: float
    usage: Usage
    is_quiet: bool  # no fault was under way


@dataclass(frozen=True, slots=True)
class Minute:
    """What the witnesses did in one minute."""

    minute: float  # its end
    p50_ms: float
    p99_ms: float
    frames_per_s: float
    longest_silence_s: float
    idle_p99_ms: float  # how late a process that does nothing was woken: what everybody else's load does to it
    heap_mib: float  # what the daemon has allocated and not freed


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that was run."""

    began: float  # minutes
    ended: float
    row: int
    fault: str
    missed: str  # what should have happened and did not


@dataclass(slots=True)
class Record:
    """Everything that is seen, in minutes from the start; it only grows."""

    minutes: float
    seed: int
    machine: Machine
    samples: list[Sample] = field(default_factory=list)
    witnesses: list[Minute] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    num_from_redis: int = 0
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What grew, of the time after the warm-up; descriptors and threads by the medians of the first and last third."""

    heap_mib_per_hour: float  # Theil-Sen, of what is in use: a leak
    memory_mib_per_hour: float  # Theil-Sen, of what stays: the least of the quiet samples of each FLOOR_MINUTES
    descriptors_grown: float
    threads_grown: float
    p99_drift: float  # of the minutes' p99, medians of the first and the last third
    num_faults: int
    num_missed: int

    @property
    def failures(self) -> list[str]:
        checks = (
            (self.heap_mib_per_hour <= MAX_MIB_PER_HOUR, f"the heap in use grew by {self.heap_mib_per_hour:.2f} MiB/h"),
            (self.memory_mib_per_hour <= MAX_MIB_PER_HOUR, f"memory grew by {self.memory_mib_per_hour:.2f} MiB/h"),
            (self.descriptors_grown <= 0, f"{self.descriptors_grown:g} descriptors more"),
            (self.threads_grown <= 0, f"{self.threads_grown:g} threads more"),
            (self.p99_drift <= MAX_P99_DRIFT, f"the p99 drifted by {self.p99_drift:+.0%}"),
            (self.num_missed == 0, f"{self.num_missed} of {self.num_faults} faults did not go as they must"),
        )
        return [text for holds, text in checks if not holds]


def judge(record: Record) -> Verdict | None:
    """Hold what was seen against the limits; None while there is too little of it."""
    warm_at = record.minutes * WARM_UP
    quiet = [sample for sample in record.samples if sample.is_quiet and sample.minute >= warm_at]
    minutes = [minute for minute in record.witnesses if minute.minute >= warm_at]
    if len(quiet) < 9 or len(minutes) < MIN_DRIFT_MINUTES:
        return None
    memory = theil_sen(floors([(sample.minute / 60, sample.usage.memory_mib) for sample in quiet]))
    return Verdict(
        heap_mib_per_hour=theil_sen([(minute.minute / 60, minute.heap_mib) for minute in minutes]),
        memory_mib_per_hour=memory,
        descriptors_grown=_growth([sample.usage.descriptors for sample in quiet]),
        threads_grown=_growth([sample.usage.threads for sample in quiet]),
        p99_drift=_growth([minute.p99_ms for minute in minutes]) / _first_third([one.p99_ms for one in minutes]),
        num_faults=len(record.faults),
        num_missed=sum(bool(fault.missed) for fault in record.faults),
    )


def floors(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the lowest point of each FLOOR_MINUTES, of points over hours: a leak raises it, free memory does not."""
    lowest: dict[int, tuple[float, float]] = {}
    for hour, value in points:
        index = int(hour * 60 // FLOOR_MINUTES)
        lowest[index] = min(lowest.get(index, (hour, value)), (hour, value), key=lambda point: point[1])
    return list(lowest.values())


def theil_sen(points: Sequence[tuple[float, float]]) -> float:
    """Return the median of the slopes of all pairs of points: what comes and goes does not tilt it."""
    at, value = np.array(points).T
    first, second = np.triu_indices(len(at), k=1)
    apart = at[second] - at[first]
    return float(np.median((value[second] - value[first])[apart > 0] / apart[apart > 0]))


def _first_third(values: Sequence[float]) -> float:
    return statistics.median(values[: max(1, len(values) // 3)])


def _growth(values: Sequence[float]) -> float:
    return statistics.median(values[-max(1, len(values) // 3) :]) - _first_third(values)


def hang_up(bench: Bench) -> Outcome:
    """The connections of the streams that stay end, in each way that there is."""
    ends: tuple[End, ...] = ("fin", "rst", "bye", "half_open")
    for name, end in product(REGULARS, ends):
        stream, ended_at = Victim(bench, name), time.time()
        bench.cameras.hang_up(name, end)
        stream.fails()
        stream.recovers(ended_at + 0.2, 35.0)
    return Outcome()


HANG_UP = Row(0, "streams that stay lose their connections", hang_up)


class Metronome:
    """Run benchmarks.metronome and keep what it said last."""

    def __init__(self) -> None:
        self.p99_ms = float("nan")
        command = [sys.executable, "-m", "benchmarks.metronome"]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        self._thread = threading.Thread(target=self._read, name="metronome")

    def __enter__(self) -> Metronome:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._thread.join()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.p99_ms = float(line)


class Soak:
    """The record, and the threads that fill it."""

    def __init__(self, bench: Bench, record: Record, out: Path, metronome: Metronome) -> None:
        self.record = record
        self._metronome = metronome
        self._bench = bench
        self._out = out
        self._began_at = time.time()
        self._busy_until = 0.0  # Unix s; infinity while a fault is under way
        self._stop = threading.Event()

    @property
    def minute(self) -> float:
        return (time.time() - self._began_at) / 60

    def run(self, rows: Sequence[Row]) -> None:
        """Make one fault after the other until the time is over, in rounds of all of them in a random order."""
        rng = random.Random(self.record.seed)
        round_: list[Row] = []
        with self._thread(self._sample), self._thread(self._read_redis):
            while self.minute < self.record.minutes:
                round_ = round_ or rng.sample(rows, len(rows))
                self._stop.wait(rng.uniform(*PAUSE_S))
                self._make(round_.pop())

    def save(self) -> None:
        """Write what was seen so far, in one step."""
        self.record.verdict = judge(self.record)
        partial = self._out.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self.record)) + "\n")
        partial.rename(self._out.with_suffix(".json"))

    def _make(self, row: Row) -> None:
        began = self.minute
        self._busy_until = float("inf")
        _, absent, missed = attempt(self._bench, row)
        self._busy_until = time.time() + QUIET_AFTER_S
        if not absent:
            self.record.faults.append(Fault(began, self.minute, row.number, row.fault, missed))
            print(f"{began:6.1f} min  row {row.number:2} {row.fault}: {missed or 'as it must'}", flush=True)

    def _sample(self) -> None:
        next_minute_at = self._began_at + 60
        while not self._stop.wait(SAMPLE_S):
            now = time.time()
            self.record.samples.append(Sample(self.minute, self._bench.usage(), now > self._busy_until))
            if now >= next_minute_at:
                seen = watch(self._bench, next_minute_at - 60, next_minute_at)
                minute = (next_minute_at - self._began_at) / 60
                self.record.witnesses.append(
                    Minute(
                        minute,
                        seen.p50_ms,
                        seen.p99_ms,
                        seen.frames_per_s,
                        seen.longest_silence_s,
                        self._metronome.p99_ms,
                        self._bench.metric("streamd_heap_in_use_bytes") / 2**20,
                    )
                )
                next_minute_at += 60
                self.save()

    def _read_redis(self) -> None:
        """Be a subscriber of Redis' pub/sub, which goes away now and then."""
        with subscribe(self._bench.redis.url, timeout_s=None) as messages:
            for _ in messages:
                self.record.num_from_redis += 1
                if self._stop.is_set():
                    return

    @contextmanager
    def _thread(self, target: object) -> Iterator[None]:
        assert callable(target)
        thread = threading.Thread(target=target, name="soak", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(SAMPLE_S * 2)


def main(
    minutes: Annotated[float, typer.Option(min=1, help="How long.")] = 60,
    seed: Annotated[int, typer.Option(help="Of the order of the faults.")] = 1,
    out: Annotated[Path, typer.Option(help="Write OUT.json and OUT.png.")] = Path("soak"),
) -> None:
    """Run a daemon under random faults, and see whether anything grows."""
    record = Record(minutes, seed, describe_machine(sys.argv[1:], "benchmarks.soak", PACKAGES))
    with Metronome() as metronome, running_bench(REGULARS) as bench:
        soak = Soak(bench, record, out, metronome)
        try:
            soak.run([HANG_UP, *(row.shortened() for row in ROWS if row.in_soak)])
        finally:
            soak.save()
    soak_plot.draw(out.with_suffix(".json"), out.with_suffix(".png"))
    if record.verdict is None:
        print("too short for a verdict")
        raise typer.Exit(1)
    print(record.verdict)
    for failure in record.verdict.failures:
        print(f"failed: {failure}")
    raise typer.Exit(1 if record.verdict.failures else 0)


if __name__ == "__main__":
    typer.run(main)
