"""From one version of a model to the next and back: every frame is seen, once and in order, by a version that works."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from streamd.config import Config, ModelConfig
from streamd.errors import ConfigError, ModelError
from streamd.in_order import InOrder
from streamd.lane import Lane
from streamd.messages import RawOutput
from streamd.model_file import ModelFile
from streamd.swap import Swaps
from tests.clips import write_clip
from tests.two_films import NUM_FRAMES, STREAMS, WITHIN_S, TwoFilms
from tests.versions import Squares, write_version


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", NUM_FRAMES)


@pytest.fixture(scope="module")
def old_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_version(tmp_path_factory.mktemp("models") / "old.pt", "a" * 64)


@pytest.fixture(scope="module")
def new_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_version(tmp_path_factory.mktemp("models") / "new.pt", "b" * 64, Squares(shift=1))


@pytest.fixture
def make_site(old_file: Path, clip: Path) -> Iterator[Callable[..., TwoFilms]]:
    made: list[TwoFilms] = []

    def make(**settings: Any) -> TwoFilms:
        made.append(TwoFilms(old_file, clip, **settings))
        return made[-1]

    yield make
    for site in made:
        site.stop()


@contextmanager
def nothing_collected() -> Iterator[None]:
    """Leave what only Python's collector would find, for the length of the block."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def look_after_the_end_of(threads: Sequence[threading.Thread], site: TwoFilms) -> None:
    """Wait for a lane's workers, then let the pipeline notice."""
    for thread in threads:
        thread.join(WITHIN_S)
    site.pipeline.look_after()


def test_a_model_that_is_replaced_goes_with_its_file_though_no_garbage_is_collected(
    make_site: Callable[..., TwoFilms], new_file: Path
) -> None:
    site = make_site(for_ever=True, probation_s=0)
    site.hold_at(20)
    site.pipeline.start()
    site.wait_for(20)
    [lane] = site.pipeline.lanes
    model, threads = weakref.ref(lane.model), [*site.pipeline._workers._threads[lane]]
    del lane
    site.let_on(20)
    with nothing_collected():
        site.swap(new_file)
        look_after_the_end_of(threads, site)
        assert model() is None


def test_a_model_that_is_removed_with_its_stream_goes_though_no_garbage_is_collected(
    make_site: Callable[..., TwoFilms], new_file: Path
) -> None:
    site = make_site(for_ever=True)
    site.pipeline.start()
    without = site.config
    tree = without.model_dump(mode="json", exclude_unset=True)
    tree["models"]["other"] = {**tree["models"]["m"], "path": str(new_file)}
    tree["streams"] = {name: {**stream, "model": "m"} for name, stream in site.streams.items()}
    tree["streams"]["third"] = {**site.streams["one"], "model": "other"}
    site.follow(Config.model_validate(tree))
    site.wait_for_result_of("third")
    [lane] = (lane for lane in site.pipeline.lanes if lane.name == "other")
    model, threads = weakref.ref(lane.model), [*site.pipeline._workers._threads[lane]]
    del lane
    with nothing_collected():
        site.follow(without)
        look_after_the_end_of(threads, site)
        assert model() is None


def test_a_model_that_is_taken_away_on_probation_goes_though_no_garbage_is_collected(
    old_file: Path, new_file: Path
) -> None:
    swaps = Swaps(lambda lane, err: None)

    def load(path: Path) -> Lane:
        config = ModelConfig.model_validate({"path": str(path)})
        return Lane("m", config, "cpu", InOrder(lambda result: None), ModelFile(config))

    old, new = load(old_file), load(new_file)
    swaps.went_live([old], [new], probation_s=60.0)
    models = [weakref.ref(lane.model) for lane in (old, new)]
    with nothing_collected():
        swaps.forget_all_but([])
        del old, new
        assert [model() for model in models] == [None, None]


def fails(lane: Lane, after: int, kind: str) -> None:
    """Let a lane's model do so many batches and then, for ever, what `kind` says."""
    run, count = lane.model.run, iter(range(10_000))

    def failing(images: torch.Tensor, sizes: torch.Tensor) -> RawOutput:
        if next(count) < after:
            return run(images, sizes)
        if kind == "out of memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if kind == "raises":
            raise ModelError("forward failed")
        raw = run(images, sizes)
        return replace(raw, boxes=raw.boxes * torch.nan, scores=raw.scores * torch.nan)

    lane.model.run = failing  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["raises", "nan", "out of memory"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_version_that_fails_on_probation_loses_no_frame_and_is_rolled_back(
    make_site: Callable[..., TwoFilms], new_file: Path, kind: str, workers: int
) -> None:
    site = make_site(workers=workers)
    site.hold_at(20)
    site.pipeline.start()
    site.wait_for(20)
    site.swap(new_file, lambda lane: fails(lane, after=10, kind=kind))
    assert site.reading().on_probation and site.reading().previous == "a" * 64
    site.let_on(20)
    assert site.has_failed.wait(WITHIN_S)
    [lane] = site.pipeline.lanes
    assert [failing for failing, _ in site.failures] == [lane], "it is told once, by the lane at work"
    site.roll_back("it failed")
    site.finish()

    site.assert_nothing_lost()
    for stream in STREAMS:
        if workers == 1:  # of two, one may have been done with a later frame when the other failed
            assert site.versions(stream) == ["old", "new", "old"]
        assert site.versions(stream)[-1] == "old"
    reading = site.reading()
    assert reading.sha256 == "a" * 64 and reading.previous is None and not reading.on_probation
    assert reading.num_outcomes == {"live": 1, "refused": 0, "rolled_back": 1}
    assert reading.last_event == f"rolled back to {'a' * 12}: it failed"


def test_a_version_that_fails_while_nobody_can_roll_it_back_loses_no_frame(
    make_site: Callable[..., TwoFilms], new_file: Path
) -> None:
    site = make_site()
    site.hold_at(20)
    site.pipeline.start()
    site.wait_for(20)
    site.swap(new_file, lambda lane: fails(lane, after=3, kind="raises"))
    site.let_on(20)
    site.finish()
    site.assert_nothing_lost()
    assert site.versions("one") == ["old", "new", "old"]


def test_a_version_is_rolled_back_on_demand_at_once_or_from_its_file_after_the_probation(
    make_site: Callable[..., TwoFilms], new_file: Path
) -> None:
    site = make_site()
    site.hold_at(20, 60, 100, 140)
    site.pipeline.start()
    site.wait_for(20)
    with pytest.raises(ConfigError, match="no version to go back to"):
        site.roll_back()
    site.swap(new_file)
    site.let_on(20)
    site.wait_for(60)
    [standing_by] = site.pipeline.prepare_rollback("m").lanes["m"]
    assert standing_by.name == "m" and standing_by.spec.name == "old", "the one in memory"
    site.roll_back()
    assert site.pipeline.lanes == [standing_by]
    with pytest.raises(ConfigError, match="no version to go back to"):
        site.roll_back()
    site.let_on(60)
    site.wait_for(100)
    # What was rolled back is not tried again until the file or a key changes.
    assert site.pipeline.replaced(site.config) == []
    site.swap(new_file, probation_s=0, score_threshold=0.3)
    assert not site.reading().on_probation
    site.let_on(100)
    site.wait_for(140)
    site.roll_back()
    [loaded] = site.pipeline.lanes
    assert loaded is not standing_by and loaded.spec.name == "old"
    site.let_on(140)
    site.finish()
    site.assert_nothing_lost()
    for stream in STREAMS:
        assert site.versions(stream) == ["old", "new", "old", "new", "old"]


def test_the_probation_ends_with_its_time_and_after_a_batch_that_went_well(
    make_site: Callable[..., TwoFilms], new_file: Path
) -> None:
    site = make_site(probation_s=0.001)
    site.hold_at(20, 60)
    site.pipeline.start()
    site.wait_for(20)
    [old] = site.pipeline.lanes
    site.swap(new_file)
    site.pipeline.look_after()
    assert site.reading().on_probation, "it has not seen a frame yet"
    site.let_on(20)
    site.wait_for(60)
    site.pipeline.look_after()
    assert not site.reading().on_probation and site.reading().previous == "a" * 64
    assert old.batcher.take(1) == [], "it is closed"
    site.let_on(60)
    site.finish()
    site.assert_nothing_lost()


def test_a_file_that_is_replaced_under_its_name_is_a_new_version_and_the_one_before_can_still_be_loaded(
    clip: Path, tmp_path: Path
) -> None:
    path = write_version(tmp_path / "m.pt", "a" * 64, name="first")
    site = TwoFilms(path, clip, probation_s=0)
    site.hold_at(20, 60)
    site.pipeline.start()
    site.wait_for(20)
    assert site.pipeline.replaced(site.config) == []
    write_version(path, "b" * 64, name="second")
    assert site.pipeline.replaced(site.config) == ["m"]
    site.swap(path)
    assert site.pipeline.replaced(site.config) == []
    site.let_on(20)
    site.wait_for(60)
    site.roll_back()
    assert site.pipeline.replaced(site.config) == [], "what was rolled back is not tried again"
    site.let_on(60)
    site.finish()
    site.assert_nothing_lost()
    assert site.versions("one") == ["first", "second", "first"]
