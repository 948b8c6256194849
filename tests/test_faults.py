"""A third of the catalogue of faults, as benchmarks.faults runs it, held to all but its timing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.faults.bench import Bench, running_bench
from benchmarks.faults.catalogue import ROWS
from benchmarks.faults.observe import observe
from benchmarks.faults.row import Row
from tests.redis_server import missing_for_redis
from tests.rtsp import missing_for_rtsp

pytestmark = pytest.mark.slow

MEMORY_SLACK_MIB = 64.0  # the allocator keeps what was freed, and many streams at once fill many arenas
SILENT_S = 10.0  # of another stream: far above what a loaded machine does
BRIEF = [row.shortened() for row in ROWS if row.in_ci]


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    if missing := missing_for_rtsp() or missing_for_redis():
        pytest.skip(missing)
    with running_bench() as made:
        yield made


@pytest.mark.parametrize("row", BRIEF, ids=[f"{row.number}-{row.fault.replace(' ', '-')}" for row in BRIEF])
def test_a_fault_is_named_and_survived_and_reaches_no_other_stream(bench: Bench, row: Row) -> None:
    found = observe(bench, row, quiet_s=2.0, shortest_s=2.0, memory_slack_mib=MEMORY_SLACK_MIB)
    if found.absent:
        pytest.skip(found.absent)
    print(f"p99 {found.before.p99_ms:.0f} -> {found.during.p99_ms:.0f} ms, back after {found.outcome.recovered_s} s")
    assert not found.missed
    assert not found.leaks(MEMORY_SLACK_MIB), f"{found.usage_before} became {found.usage_after}"
    assert found.during.is_unbroken, "another stream lost a message or its connection"
    assert found.during.longest_silence_s < SILENT_S


def test_each_number_of_the_catalogue_has_one_row() -> None:
    assert [row.number for row in ROWS] == list(range(1, 55))
    assert all(row.done for row in ROWS)
    assert 18 <= len(BRIEF) <= 22, "CI runs about a third"
