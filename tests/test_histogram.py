"""Counting by size, against a count by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.metrics.histogram import BATCH_SIZES, SECONDS, Histogram
from tests.fakes import in_threads


@given(st.lists(st.one_of(st.floats(0, 100), st.sampled_from(SECONDS))))
def test_each_bucket_counts_what_is_at_most_its_bound(values: list[float]) -> None:
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.observe(value)
    buckets, total = histogram.read()
    assert buckets[-1][0] == "+Inf" and buckets[-1][1] == len(values)
    assert [count for _, count in buckets[:-1]] == [sum(value <= bound for value in values) for bound in SECONDS]
    assert total == pytest.approx(sum(values))


def test_bounds_are_written_so_that_they_read_back_as_themselves() -> None:
    for bounds in (SECONDS, BATCH_SIZES):
        assert tuple(float(text) for text, _ in Histogram(bounds).read()[0][:-1]) == bounds
        assert tuple(sorted(set(bounds))) == bounds


def test_no_value_is_lost_between_threads() -> None:
    histogram = Histogram((1.0,))

    def count() -> None:
        for _ in range(2000):
            histogram.observe(0.5)

    in_threads([count] * 4)
    assert histogram.read() == ([("1", 8000), ("+Inf", 8000)], 4000.0)
