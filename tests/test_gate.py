"""What lets a new version of a model pass, and what refuses it, with which words."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from streamd.errors import ModelError
from streamd.gate import Sampler, check_fits
from streamd.messages import StreamState
from streamd.models.spec import DensePoseRule, KeypointRule, MaskRule, ModelSpec
from tests.clips import write_clip
from tests.coco_folder import LABELS as COCO_LABELS
from tests.coco_folder import write_coco
from tests.fakes import make_frame, make_result
from tests.two_films import STREAMS, WITHIN_S, TwoFilms
from tests.versions import Squares, write_version

SPEC = ModelSpec(name="old", task="detect", labels=("person", "dog", "cat"), input_size=(64, 96), colour="bgr")
POINTS = KeypointRule(names=("nose", "tail"))


def changed(**changes: Any) -> ModelSpec:
    return msgspec.structs.replace(SPEC, **changes)


@pytest.mark.parametrize(
    ("new", "wanted"),
    [
        (changed(name="new", input_size=(640, 640), colour="rgb", weights_sha256="b" * 64), None),
        (changed(labels=("person", "dog", "cat", "bird")), None),
        (changed(task="segment", masks=MaskRule()), None),
        (changed(labels=("person", "horse")), ["person"]),
    ],
)
def test_what_readers_of_the_messages_do_not_notice_passes(new: ModelSpec, wanted: list[str] | None) -> None:
    check_fits(SPEC, new, wanted)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (SPEC, changed(labels=("person", "dog")), "'cat' had the number 2 .* and is not there"),
        (SPEC, changed(labels=("dog", "person", "cat")), "'person' had the number 0 .* has the number 1"),
        (changed(task="segment", masks=MaskRule()), SPEC, "gives no masks"),
        (SPEC, changed(task="semantic"), "gives no objects"),
        (changed(task="semantic"), SPEC, "labels of segments differ: 'person' .* is not there"),
        (
            changed(task="keypoints", keypoints=POINTS),
            changed(task="keypoints", keypoints=KeypointRule(names=("tail", "nose"))),
            "its keypoints are tail, nose, those at work nose, tail",
        ),
        (
            changed(task="densepose", densepose=DensePoseRule()),
            changed(task="densepose", densepose=DensePoseRule(num_parts=12)),
            "has 12 parts, that at work 24",
        ),
    ],
)
def test_what_readers_of_the_messages_would_misread_is_refused(old: ModelSpec, new: ModelSpec, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        check_fits(old, new, None)


def test_a_sampler_passes_on_what_was_wanted_and_neither_waits_nor_hoards() -> None:
    sampler = Sampler(["gate", "yard"], 3)
    for seq in range(100):  # nobody takes any
        sampler(make_result(make_frame("gate", seq)))
        sampler(make_result(make_frame("other", seq)))
    seen = []
    for result in sampler.results(0.2):
        seen.append((result.frame.stream, result.frame.seq))
        sampler(make_result(make_frame("yard", len(seen))))
    assert seen[:3] == [("gate", 0), ("gate", 1), ("gate", 2)]
    assert [stream for stream, _ in seen[3:]] == ["yard"] * 3
    assert sampler._results.maxsize < 10 and isinstance(sampler._results, queue.Queue)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", 60)


@pytest.fixture(scope="module")
def make_version(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("models")
    return lambda name, *args, **changes: write_version(folder / f"{name}.pt", name[0] * 64, *args, **changes)


@pytest.fixture
def site(clip: Path, make_version: Callable[..., Path]) -> Iterator[TwoFilms]:
    made = TwoFilms(make_version("old"), clip, for_ever=True)
    made.pipeline.start()
    deadline = time.monotonic() + WITHIN_S
    while {status.state for status in made.pipeline.statuses()} != {StreamState.RUNNING}:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    yield made
    made.stop()
    assert made.crashes == []


GATE: dict[str, Any] = {"frames": 3, "within_s": 30.0}


def assert_refused(site: TwoFilms, complaint: str, file: Path, **gate: Any) -> None:
    """The old version stays, and the refusal is told to who asked, to subscribers, and in the counts."""
    before, num_refused = site.pipeline.lanes, site.reading().num_outcomes["refused"]
    with pytest.raises(ModelError, match=complaint) as refused:
        site.swap(file, gate={**GATE, **gate})
    assert site.pipeline.lanes == before and before[0].tap is None
    reading = site.reading()
    assert reading.sha256 == "o" * 64 and reading.num_outcomes["refused"] == num_refused + 1
    assert str(refused.value) in reading.last_event
    told = [status for status in site.statuses if "is refused" in status.reason]
    assert {status.stream for status in told} == {*STREAMS}
    assert {status.state for status in told} == {StreamState.RUNNING}
    assert str(refused.value) in told[-1].reason


def test_live_frames_are_seen_by_both_versions_and_the_agreement_is_told_or_judged(
    site: TwoFilms, make_version: Callable[..., Path]
) -> None:
    near, far = make_version("near", Squares(shift=1)), make_version("far", Squares(shift=9))
    assert_refused(
        site,
        r"refused by its gate: agreement 0\.000 with the version at work on 6 frames of 2 streams \(12 objects, 12 by "
        r"the version at work, 0 of them the same\): less than the 0\.8 wanted",
        far,
        agreement=0.8,
    )
    assert_refused(site, "'person' had the number 0", make_version("turned", labels=("dog", "person")))
    prepared = site.swap(near, gate={**GATE, "agreement": 0.8})
    assert prepared.notes[0].startswith("model m: agreement 1.000 with the version at work on 6 frames of 2 streams")
    prepared = site.swap(far, gate=GATE)
    assert prepared.notes[0].startswith("model m: agreement 0.000 "), "nobody wanted more"
    prepared = site.swap(far, gate=GATE, score_threshold=0.85)
    assert prepared.notes == (), "the same file has passed"


@pytest.mark.parametrize(
    ("trouble", "complaint"),
    [
        (
            "raises",
            r"fails on frame \d+ of the stream (one|two): .*: index 9 is out of bounds for dimension 0 with size 1$",
        ),
        ("nan", r"nothing but NaN and infinity on frame \d+ of the stream (one|two)"),
    ],
)
def test_a_version_that_gets_into_trouble_with_the_streams_own_frames_is_refused(
    site: TwoFilms, make_version: Callable[..., Path], trouble: Any, complaint: str
) -> None:
    assert_refused(site, complaint, make_version(trouble, Squares(trouble)), frames=40)


def test_without_frames_nothing_is_tried_and_a_wanted_agreement_is_not_reached(
    clip: Path, make_version: Callable[..., Path]
) -> None:
    site = TwoFilms(make_version("old"), clip, for_ever=True)
    try:
        with pytest.raises(ModelError, match="none of its streams gives frames now, so that its agreement cannot"):
            site.swap(make_version("near", Squares(shift=1)), gate={**GATE, "agreement": 0.5})
        prepared = site.swap(make_version("near", Squares(shift=1)), gate=GATE)
        assert prepared.notes == ("model m: not tried on frames: none of its streams gives frames now",)
        assert site.swap(make_version("far"), gate={"frames": 0}).notes == ()
    finally:
        site.stop()


def test_a_labelled_set_judges_by_its_ap(clip: Path, make_version: Callable[..., Path], tmp_path: Path) -> None:
    data = write_coco(tmp_path / "data", 4)
    site = TwoFilms(make_version("old", labels=COCO_LABELS), clip, for_ever=True)
    new = make_version("near", Squares(shift=1), labels=COCO_LABELS)
    judged = {"frames": 0, "data": str(data)}
    try:
        with pytest.raises(ModelError, match=r"AP of boxes 0\.0\d\d on 4 pictures of .*: less than the 0\.5 wanted"):
            site.swap(new, gate={**judged, "min_ap": 0.5})
        with pytest.raises(ModelError, match=r"refused by its gate: .*gone\.json"):
            site.swap(new, gate={**judged, "data": str(tmp_path / "gone.json"), "min_ap": 0.0})
        prepared = site.swap(new, gate={**judged, "min_ap": 0.0, "pictures": 2})
        assert prepared.notes[0].startswith("model m: AP of boxes 0.0") and " on 2 pictures of " in prepared.notes[0]
    finally:
        site.stop()
