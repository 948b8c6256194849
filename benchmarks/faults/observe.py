"""Run rows, and see what each does to the witnesses and to the process."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.faults.bench import CLIP, WITNESSES, Bench
from benchmarks.faults.row import Absent, Missed, Outcome, Row
from benchmarks.measure import Usage, percentile
from tests.rtsp_faults import Camera

QUIET_S = 10.0  # before each row
SHORTEST_S = 10.0  # of a row: a shorter one is watched for so long, or its p99 would be one frame's
SETTLE_S = 10.0  # for the descriptors and threads that a row used to be given back,
SETTLE_MEMORY_S = 70.0  # and for the memory: the daemon does it once a minute
NUM_AROUND = 2  # runs before and after one, whose quiet times it is held against
MIN_RATE, MAX_P99 = 0.95, 1.05
MEMORY_SLACK_MIB = 12.0  # of one row: the allocator keeps what was freed, and its arenas fill at their own pace


@dataclass(frozen=True, slots=True)
class Window:
    """What the witnesses did in an interval."""

    seconds: float
    num_results: int
    p99_ms: float  # capture to arrival in the subscriber, of all witnesses together
    p50_ms: float
    longest_silence_s: float  # of any witness
    is_unbroken: bool  # no number was left out, and none of them connected anew

    @property
    def frames_per_s(self) -> float:
        return self.num_results / self.seconds


@dataclass(frozen=True, slots=True)
class Observation:
    """One row: what it found by itself, and what it did to everything else."""

    number: int
    fault: str
    done: str
    seconds: float
    absent: str  # what the machine lacks; empty where the row was run
    missed: str  # what should have happened and did not; empty where all did
    outcome: Outcome
    load: str  # what ran beside the witnesses in the time before; what has the same can be compared
    before: Window
    during: Window
    usage_before: Usage
    usage_after: Usage

    @property
    def rate_ratio(self) -> float:
        return self.during.frames_per_s / self.before.frames_per_s if self.before.num_results else 0.0

    def leaks(self, memory_slack_mib: float = MEMORY_SLACK_MIB) -> str:
        """Say what was not given back."""
        before, after = self.usage_before, self.usage_after
        grown = [
            f"{after.descriptors - before.descriptors} descriptors" if after.descriptors > before.descriptors else "",
            f"{after.threads - before.threads} threads" if after.threads > before.threads else "",
            f"{after.memory_mib - before.memory_mib:.1f} MiB"
            if after.memory_mib > before.memory_mib + memory_slack_mib
            else "",
        ]
        return ", ".join(filter(None, grown))


def watch(bench: Bench, since: float, until: float) -> Window:
    """Sum up what the witnesses published in the interval of Unix times."""
    latencies: list[float] = []
    silence_s = 0.0
    unbroken = True
    for witness in WITNESSES:
        heard = bench.listener.results(witness, since, until)
        messages = [one.message for one in heard]
        latencies += [one.latency_ms for one in heard]
        marks = [since, *(one.at for one in heard), until]
        silence_s = max(silence_s, *(later - earlier for earlier, later in pairwise(marks)))
        unbroken &= all(after.seq == before.seq + 1 for before, after in pairwise(messages))
        unbroken &= len({message.epoch for message in messages}) <= 1
    return Window(
        seconds=until - since,
        num_results=len(latencies),
        p99_ms=percentile(latencies, 0.99),
        p50_ms=statistics.median(latencies) if latencies else float("nan"),
        longest_silence_s=silence_s,
        is_unbroken=unbroken,
    )


def observe(
    bench: Bench,
    row: Row,
    quiet_s: float = QUIET_S,
    shortest_s: float = SHORTEST_S,
    memory_slack_mib: float = MEMORY_SLACK_MIB,
) -> Observation:
    """Run one row between a quiet time and the time that it takes to give everything back."""
    usage_before = at_least(bench.usage(), bench.resting)
    with stand_in(bench, row):
        time.sleep(quiet_s)
        before = watch(bench, time.time() - quiet_s, time.time())
    bench.quiet_s, began = quiet_s, time.time()
    bench.rests.clear()
    outcome, absent, missed = attempt(bench, row)
    load: str = row.stand_in or "nobody"
    if bench.rests:
        load, before, began = f"row {row.number}", watch(bench, *bench.rests[-1]), bench.rests[-1][1]
    seconds = time.time() - began
    if not absent:
        time.sleep(max(0.0, shortest_s - seconds))
    during = watch(bench, began, max(time.time(), began + 1e-3))
    usage_after = settle(bench, usage_before, memory_slack_mib)
    return Observation(
        row.number,
        row.fault,
        row.done,
        seconds,
        absent,
        missed,
        outcome,
        load,
        before,
        during,
        usage_before,
        usage_after,
    )


@contextmanager
def stand_in(bench: Bench, row: Row) -> Iterator[None]:
    """Have a healthy camera where the row has its stream later: what one camera more costs is not the fault's doing."""
    if row.stand_in is None:
        yield
        return
    clip = {"small": bench.clip, "large": CLIP}[row.stand_in]
    with bench.stream(bench.camera(Camera(clip), name="healthy"), "healthy") as healthy:
        healthy.delivers(1)
        yield


def at_least(usage: Usage, resting: Usage) -> Usage:
    """Count what a row before has taken away for a moment, such as the connections to Redis, as if it were there."""
    return Usage(usage.memory_mib, max(usage.descriptors, resting.descriptors), max(usage.threads, resting.threads))


def settle(bench: Bench, wanted: Usage, memory_slack_mib: float) -> Usage:
    """Wait until the process holds no more than wanted, or has had the time for it; return what it holds then."""
    began = time.monotonic()
    while True:
        usage, waited_s = bench.usage(), time.monotonic() - began
        is_more = usage.descriptors > wanted.descriptors or usage.threads > wanted.threads
        is_larger = usage.memory_mib > wanted.memory_mib + memory_slack_mib
        if not ((is_more and waited_s < SETTLE_S) or (is_larger and waited_s < SETTLE_MEMORY_S)):
            return usage
        time.sleep(0.2)


def control(bench: Bench) -> Outcome:
    """A healthy stream is added."""
    with bench.stream(bench.camera(Camera(bench.clip))) as stream:
        stream.delivers(1)
        time.sleep(SHORTEST_S)
    return Outcome()


CONTROL = Row(0, "none: a control", control)


def attempt(bench: Bench, row: Row) -> tuple[Outcome, str, str]:
    """Return what the row found, what the machine lacks for it, and what was missed."""
    try:
        return row.run(bench), "", ""
    except Absent as err:
        return Outcome(), str(err), ""
    except Missed as err:
        return Outcome(), "", str(err)
    except Exception as err:  # a bug of the row, or a daemon that is gone: the other rows are still wanted
        said = f"{type(err).__name__}: {err}".replace(sys.executable, "python")  # the record names no folder
        return Outcome(), "", said


class Rule:
    """When a row passes. The p99 is held against the quiet times around it, and against what the controls show."""

    def __init__(self, found: Sequence[Observation]) -> None:
        """`found` is in the order of the runs."""
        self._found = list(found)
        # Where the machine stood still, nothing was measured.
        self.controls = [one for one in found if one.number == CONTROL.number and one.before.num_results]

    def reference_ms(self, row: Observation) -> float:
        """Return the median p99 of the like quiet times around a run: of one alone, the noise would count twice."""
        like = [one for one in self._found if one.load == row.load]
        at = like.index(row)
        around = like[max(0, at - NUM_AROUND) : at + NUM_AROUND + 1]
        return statistics.median([one.before.p99_ms for one in around if one.before.num_results] or [float("nan")])

    def ratio(self, row: Observation) -> float:
        return row.during.p99_ms / self.reference_ms(row)

    @property
    def p99(self) -> float:
        """The largest ratio that passes: 1.05, or that of a control, in which there was no fault."""
        return max([MAX_P99, *(self.ratio(one) for one in self.controls)])

    def failure(self, row: Observation) -> str:
        """Say why a row fails; empty where it passes."""
        checks = (
            (not row.missed, row.missed),
            (row.during.is_unbroken, "another stream lost a message or its connection"),
            (not row.leaks(), f"kept {row.leaks()}"),
            (row.rate_ratio >= MIN_RATE, f"the others' frame rate fell to {row.rate_ratio:.0%}"),
            (self.ratio(row) <= self.p99, f"the others' p99 rose by {self.ratio(row) - 1:.0%}"),
        )
        return "; ".join(text for holds, text in checks if not holds)


def windows_of_rows(found: Sequence[Observation]) -> tuple[list[Window], list[Window]]:
    """Return the quiet times before all runs of rows, and the runs themselves; without those that saw nothing."""
    rows = [one for one in found if one.number != CONTROL.number and not one.absent]
    return [one.before for one in rows if one.before.num_results], [
        one.during for one in rows if one.during.num_results
    ]


@dataclass(frozen=True, slots=True)
class Plan:
    """How rows are run."""

    control_every: int = 6  # rows
    quiet_s: float = QUIET_S  # before each
    num_tries: int = 3  # of a row that fails by a measure alone


def observe_all(
    bench: Bench, rows: Sequence[Row], plan: Plan, say: Callable[[Observation], None]
) -> Iterator[list[Observation]]:
    """Run all rows, with a control first, last and after every few of them; yield all that was found after each pass.

    What fails by a measure alone, and did what it must, is run again in another pass, since a neighbour's load need not
    come twice, and a fault's effect does.
    """
    found: list[Observation] = []

    def run(row: Row) -> None:
        found.append(observe(bench, row, plan.quiet_s))
        say(found[-1])

    for index, row in enumerate(rows):
        if index % plan.control_every == 0:
            run(CONTROL)
        run(row)
    run(CONTROL)
    yield found
    for _ in range(plan.num_tries - 1):
        rule = Rule(found)
        last = {one.number: one for one in found}
        for row in rows:
            if not last[row.number].missed and not last[row.number].absent and rule.failure(last[row.number]):
                run(row)
        yield found
