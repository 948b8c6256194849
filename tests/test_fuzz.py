"""What comes from outside, damaged at random and on purpose, ends in the errors that streamd documents."""

from __future__ import annotations

import faulthandler
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.found import FOUND
from tests.fuzz.targets import TARGETS

# The same examples in each run, so that a test that passed here passes there; atheris looks for new ones.
FIXED = settings(
    max_examples=100, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
NUM_WITH_SOCKETS = 25
SLOW = frozenset(("artifact", "artifact_entry", "model_spec", "rtsp_sdp", "rtsp_answer", "rtsp_media", "redis"))


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes], words: Sequence[bytes]) -> bytes:
    """Cut, repeat and replace parts of a sound input."""
    content = draw(st.sampled_from(seeds))
    inserted = st.one_of(st.sampled_from(words), st.binary(max_size=8)) if words else st.binary(max_size=8)
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 16)))
        middle = draw(st.one_of(inserted, st.just(content[start:end] * 2)))
        content = content[:start] + middle + content[end:]
    return content


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_ends_in_a_documented_error(name: str) -> None:
    target = TARGETS[name]
    seeds = list(target.seeds())
    inputs = st.one_of(damaged(seeds, target.words), st.binary(max_size=256))

    @settings(FIXED, max_examples=NUM_WITH_SOCKETS if name in SLOW else FIXED.max_examples)
    @given(inputs)
    def run(content: bytes) -> None:
        target.run(content)

    for seed in seeds:
        target.run(seed)
    run()


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for name, contents in FOUND.items() for content in contents]
)
def test_what_once_broke_something_does_so_no_more(name: str, content: bytes) -> None:
    faulthandler.dump_traceback_later(60, exit=True)  # what hung would hang again
    try:
        TARGETS[name].run(content)
    finally:
        faulthandler.cancel_dump_traceback_later()
