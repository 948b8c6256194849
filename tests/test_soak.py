"""The soak's verdict: it sees what grows, and is not misled by what comes and goes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from benchmarks.measure import Machine, Usage
from benchmarks.soak import Fault, Minute, Record, Sample, judge, theil_sen

MINUTES = 60


def record(*, mib_per_hour: float = 0.0, drift: float = 0.0, descriptors: float = 0.0) -> Record:
    """Make an hour of noise around a trend."""
    rng = random.Random(1)
    made = Record(MINUTES, 1, Machine("cpu", 2, "6.1", "3.11", {}, "abc", "today", "soak"))
    for index in range(MINUTES * 12):
        minute = index / 12
        spike_mib = rng.choice((0.0, 3.0, 6.0, 20.0))  # what is free, and not given back yet
        usage = Usage(300 + mib_per_hour * minute / 60 + spike_mib, 24 + int(descriptors * minute / 60), 15)
        made.samples.append(Sample(minute, usage, is_quiet=index % 3 > 0))
    for minute in range(1, MINUTES + 1):
        p99_ms = 20 * (1 + drift * minute / 60) * rng.choice((0.9, 1.0, 1.1, 1.0, 8.0))  # a neighbour's load
        made.witnesses.append(Minute(minute, 10.0, p99_ms, 40.0, 0.2, 3.0, 170.0))
    made.faults.append(Fault(1.0, 2.0, 11, "RTP stops", ""))
    return made


def failures(made: Record) -> list[str]:
    verdict = judge(made)
    assert verdict is not None
    return verdict.failures


def test_an_hour_in_which_nothing_grows_passes() -> None:
    assert failures(record()) == []


@pytest.mark.parametrize(
    ("grown", "complaint"),
    [
        (record(mib_per_hour=3.0), "memory grew by"),
        (record(descriptors=5.0), "descriptors more"),
        (record(drift=1.0), "the p99 drifted by"),
    ],
    ids=["memory", "descriptors", "p99"],
)
def test_what_grows_is_named(grown: Record, complaint: str) -> None:
    (failure,) = failures(grown)
    assert complaint in failure


def test_a_fault_that_did_not_go_as_it_must_fails_the_soak() -> None:
    made = record()
    made.faults.append(replace(made.faults[0], missed="no result"))
    assert failures(made) == ["1 of 2 faults did not go as they must"]


def test_a_slope_is_that_of_most_points_and_not_of_the_outliers() -> None:
    points = [(float(at), 2.0 * at + (50.0 if at % 4 == 0 else 0.0)) for at in range(40)]
    assert theil_sen(points) == pytest.approx(2.0)


def test_what_is_free_and_given_back_again_is_no_growth() -> None:
    made = record(mib_per_hour=0.5)
    for index, sample in enumerate(made.samples):  # the later, the more is free between two give-backs
        free_mib = abs(index % 12 - 1) * sample.minute / 10
        usage = replace(sample.usage, memory_mib=sample.usage.memory_mib + free_mib)
        made.samples[index] = replace(sample, usage=usage)
    assert failures(made) == []


def test_there_is_no_verdict_on_too_little() -> None:
    made = record()
    made.witnesses = made.witnesses[:21]
    assert judge(made) is None
