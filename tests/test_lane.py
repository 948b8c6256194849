"""What a lane does when a batch fails: it tries again in parts, gives the frames to another, or lets the error out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from streamd import batch_limit
from streamd.batch_limit import RECOVERS_AFTER_S, BatchLimit
from streamd.lane import Lane
from streamd.messages import RawOutput
from tests.clips import write_clip
from tests.two_films import NUM_FRAMES, STREAMS, TwoFilms
from tests.versions import Squares, write_version

SHORT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", NUM_FRAMES)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_version(tmp_path_factory.mktemp("models") / "old.pt", "a" * 64)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Give the clock by which the lanes of a site made after it let their batches grow."""
    clock = Clock()
    monkeypatch.setattr("streamd.lane.BatchLimit", partial(BatchLimit, clock=clock))
    return clock


@pytest.fixture
def site(file: Path, clip: Path) -> Iterator[TwoFilms]:
    made = TwoFilms(file, clip, max_batch=4)
    yield made
    made.stop()


class Clock:
    """A clock that goes on by so much whenever it is looked at."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self.pace_s = 0.0

    def __call__(self) -> float:
        self._now_s += self.pace_s
        return self._now_s


class Spoiled:
    """A lane's model that fails at batches of more than `fits` images, and notes how large its batches are."""

    def __init__(self, lane: Lane, err: Exception, fits: int) -> None:
        self.fits = fits
        self.sizes: list[int] = []
        self._run, self._err = lane.model.run, err
        lane.model.run = self.run  # type: ignore[method-assign]

    def run(self, images: torch.Tensor, sizes: torch.Tensor) -> RawOutput:
        self.sizes.append(len(images))
        if len(images) > self.fits:
            raise self._err
        return self._run(images, sizes)


@pytest.mark.parametrize("fits", [1, 2])
def test_batches_halve_where_memory_is_short_and_no_frame_is_lost(site: TwoFilms, fits: int) -> None:
    [lane] = site.pipeline.lanes
    model = Spoiled(lane, SHORT, fits)
    site.pipeline.start()
    site.finish()
    site.assert_nothing_lost()
    assert lane.meter.num_out_of_memory == sum(size > fits for size in model.sizes) > 0
    assert lane.meter.batch_limit == fits == max(model.sizes[-10:])


def test_batches_grow_again_when_there_is_memory(clock: Clock, site: TwoFilms) -> None:
    [lane] = site.pipeline.lanes
    model = Spoiled(lane, SHORT, fits=1)
    site.hold_at(40)
    site.pipeline.start()
    site.wait_for(40)
    model.fits, clock.pace_s = 4, RECOVERS_AFTER_S
    num_shortages = lane.meter.num_out_of_memory
    site.let_on(40)
    site.finish()
    site.assert_nothing_lost()
    assert lane.meter.batch_limit == 4 and lane.meter.num_out_of_memory == num_shortages > 0
    assert max(model.sizes[-30:]) > 2


def test_one_frame_that_finds_no_memory_for_long_ends_the_daemon(
    site: TwoFilms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_limit, "_PAUSES_S", (0.01, 0.01))
    model = Spoiled(site.pipeline.lanes[0], SHORT, fits=0)
    site.pipeline.start()
    assert site.is_over.wait(30)
    assert site.crashes == [SHORT]
    assert model.sizes[-3:] == [1, 1, 1]


def test_a_gpu_that_is_lost_ends_the_daemon_though_another_version_stands_by(site: TwoFilms, tmp_path: Path) -> None:
    site.hold_at(20)
    site.pipeline.start()
    site.wait_for(20)
    new = write_version(tmp_path / "new.pt", "b" * 64)
    models: list[Spoiled] = []
    site.swap(new, lambda lane: models.append(Spoiled(lane, LOST, fits=0)))
    site.let_on(20)
    assert site.is_over.wait(30)
    assert site.crashes == [LOST] and site.failures == []


def test_another_error_without_a_version_that_stands_by_ends_the_daemon(site: TwoFilms) -> None:
    failure = RuntimeError("index 9 is out of bounds")
    Spoiled(site.pipeline.lanes[0], failure, fits=0)
    site.pipeline.start()
    assert site.is_over.wait(30)
    assert site.crashes == [failure]


def test_frames_of_which_a_model_says_nothing_but_nan_are_counted_and_published_empty(
    site: TwoFilms, caplog: pytest.LogCaptureFixture
) -> None:
    [lane] = site.pipeline.lanes
    run = lane.model.run

    def first_is_nan(images: torch.Tensor, sizes: torch.Tensor) -> RawOutput:
        raw = run(images, sizes)
        boxes = raw.boxes.clone()
        boxes[0] = torch.nan
        return replace(raw, boxes=boxes)

    lane.model.run = first_is_nan  # type: ignore[method-assign]
    site.pipeline.start()
    site.finish()
    empty = [result for name in STREAMS for result in site.results[name] if not len(result.detections)]
    assert lane.meter.num_senseless == len(empty) > 0
    assert sum("nothing but NaN" in record.message for record in caplog.records) == 1
    assert site.crashes == []


def test_a_version_that_fails_at_once_never_reaches_the_wire(site: TwoFilms, tmp_path: Path) -> None:
    site.hold_at(20)
    site.pipeline.start()
    site.wait_for(20)
    new = write_version(tmp_path / "new.pt", "b" * 64, Squares(shift=2))
    models: list[Spoiled] = []
    site.swap(new, lambda lane: models.append(Spoiled(lane, RuntimeError("no"), fits=0)))
    site.let_on(20)
    site.finish()
    site.assert_nothing_lost()
    assert models[0].sizes and site.versions("one") == site.versions("two") == ["old"]
