"""The data path from a file to results: order, masks, labels, and what a crash does."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from streamd.announce import Announcer
from streamd.changes import difference
from streamd.config import Config
from streamd.errors import ConfigError
from streamd.messages import Frame, Result
from streamd.models import artifact
from streamd.models.spec import MaskRule, ModelSpec
from streamd.pipeline import Pipeline
from tests.clips import write_clip

WITHIN_S = 60
SCALE = 416 / 768  # of the demo's clip


class TwoSquares(nn.Module):
    """See a person and a dog at fixed places of the input; the mask of each is its part left of x = 148."""

    boxes: Tensor
    scores: Tensor
    prototypes: Tensor
    coefficients: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("boxes", torch.tensor([[[100.0, 100, 200, 200], [120.0, 220, 180, 280]]]))
        self.register_buffer("scores", torch.tensor([[[0.9, 0.1], [0.2, 0.8]]]))
        self.register_buffer("prototypes", torch.where(torch.arange(104) < 37, 4.0, -4.0).expand(1, 1, 104, 104))
        self.register_buffer("coefficients", torch.ones(1, 2, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        num_images = images.shape[0]
        nothing = images[:, :1, 0, 0] * 0  # so that the output depends on the input, as a network's does
        return {
            "boxes": self.boxes.expand(num_images, -1, -1) + nothing[..., None],
            "scores": self.scores.expand(num_images, -1, -1) + nothing[..., None],
            "prototypes": self.prototypes.expand(num_images, -1, -1, -1) + nothing[..., None, None],
            "coefficients": self.coefficients.expand(num_images, -1, -1) + nothing[..., None],
        }


@pytest.fixture(scope="module")
def two_squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = ModelSpec(
        name="two_squares",
        task="segment",
        labels=("person", "dog"),
        input_size=(416, 416),
        colour="bgr",
        masks=MaskRule(),
    )
    path = tmp_path_factory.mktemp("models") / "two_squares.pt"
    artifact.export(TwoSquares(), spec, path)
    return path


def run_to_the_end(config: Config, deliver: Callable[[Result], None]) -> list[Exception]:
    """Run files through a pipeline and return what crashed."""
    ended, crashes = threading.Event(), list[Exception]()

    def on_crash(err: Exception) -> None:
        crashes.append(err)
        ended.set()

    pipeline = Pipeline(config, deliver, on_crash=on_crash, on_end=ended.set)
    pipeline.warm_up()
    pipeline.start()
    assert ended.wait(WITHIN_S)
    pipeline.close_intake()
    assert pipeline.drain(WITHIN_S) == []
    assert pipeline.join_sources(WITHIN_S) == []
    return crashes


def make_config(model: Path, streams: dict[str, Path], **options: object) -> Config:
    return Config.model_validate(
        {
            "models": {"m": {"path": str(model), **options}},
            "streams": {name: {"url": str(clip), "pace": "fast"} for name, clip in streams.items()},
        }
    )


def test_masks_reach_the_wire_at_the_pictures_size(two_squares: Path, demo_clip: Path) -> None:
    results: list[Result] = []
    assert run_to_the_end(make_config(two_squares, {"clip": demo_clip}), results.append) == []
    announcer = Announcer("json", [])
    announcer.know({"m": artifact.read_spec(two_squares)})
    message = announcer.message(results[0])

    assert [found.label for found in message.objects] == ["person", "dog"]
    for found, (x1, y1, x2, y2) in zip(message.objects, [(100, 100, 200, 200), (120, 220, 180, 280)], strict=True):
        assert found.box == pytest.approx([side / SCALE for side in (x1, y1, x2, y2)], abs=0.01)
        assert found.mask is not None
        rows, columns = np.mgrid[0:576, 0:768] + 0.5
        inside = (columns >= x1 / SCALE) & (columns < min(148, x2) / SCALE) & (rows >= y1 / SCALE) & (rows < y2 / SCALE)
        assert np.array_equal(found.mask.decode(), inside)


def test_each_streams_results_come_in_order_from_several_workers(two_squares: Path, demo_clip: Path) -> None:
    seqs = defaultdict(list)
    config = make_config(two_squares, {"one": demo_clip, "two": demo_clip}, workers=3, max_batch=2)
    assert run_to_the_end(config, lambda result: seqs[result.frame.stream].append(result.frame.seq)) == []
    assert seqs == {"one": list(range(250)), "two": list(range(250))}


def test_only_the_wanted_labels_are_delivered(two_squares: Path, demo_clip: Path) -> None:
    labels = set()

    def deliver(result: Result) -> None:
        labels.update(result.detections.labels.tolist())
        assert result.detections.masks is not None
        assert len(result.detections.masks) == len(result.detections)

    assert run_to_the_end(make_config(two_squares, {"clip": demo_clip}, labels=["dog"]), deliver) == []
    assert labels == {1}


def test_a_label_that_the_model_does_not_know_is_an_error_that_names_those_it_knows(
    two_squares: Path, demo_clip: Path
) -> None:
    with pytest.raises(ConfigError, match=r"knows no 'cat'; its labels are person, dog"):
        Pipeline(make_config(two_squares, {"clip": demo_clip}, labels=["cat"]), lambda result: None)


def test_a_bug_in_a_worker_is_reported_instead_of_a_silent_thread(two_squares: Path, demo_clip: Path) -> None:
    def deliver(result: Result) -> None:
        raise ZeroDivisionError("a bug")

    crashes = run_to_the_end(make_config(two_squares, {"clip": demo_clip}), deliver)
    assert crashes and all(isinstance(err, ZeroDivisionError) for err in crashes)


def test_of_a_stream_that_is_to_give_key_frames_only_nothing_else_is_decoded(two_squares: Path, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 20, gop=5)
    config = make_config(two_squares, {"clip": clip})
    config = config.model_copy(
        update={"streams": {"clip": config.streams["clip"].model_copy(update={"frames": "key"})}}
    )
    found: list[Frame] = []
    assert run_to_the_end(config, lambda result: found.append(result.frame)) == []
    assert [(frame.seq, round(frame.pts_s * 25), frame.keyframe) for frame in found] == [
        (index, index * 5, True) for index in range(4)
    ]


def test_streams_move_to_another_version_of_their_model_without_losing_or_reordering_a_frame(
    two_squares: Path, demo_clip: Path, tmp_path: Path
) -> None:
    results: dict[str, list[Result]] = defaultdict(list)
    halfway, ended = threading.Event(), threading.Event()

    def deliver(result: Result) -> None:
        results[result.frame.stream].append(result)
        if result.frame.seq == 100:
            halfway.set()

    newer = tmp_path / "newer.pt"
    artifact.export(TwoSquares(), msgspec.structs.replace(artifact.read_spec(two_squares), name="newer"), newer)
    old, new = (make_config(path, {"one": demo_clip, "two": demo_clip}, workers=2) for path in (two_squares, newer))
    crashes: list[Exception] = []
    pipeline = Pipeline(old, deliver, on_crash=crashes.append, on_end=ended.set)
    pipeline.warm_up()
    [before] = pipeline.lanes
    changes = difference(old, new)
    prepared = pipeline.prepare(new, changes)
    assert pipeline.lanes == [before], "nothing has changed yet"
    pipeline.start()
    assert halfway.wait(WITHIN_S)
    pipeline.apply(prepared, changes)
    [after] = pipeline.lanes
    assert after is not before
    assert ended.wait(WITHIN_S)
    pipeline.close_intake()
    assert pipeline.drain(WITHIN_S) == []
    assert pipeline.join_sources(WITHIN_S) == []
    assert crashes == []
    for delivered in results.values():
        assert [result.frame.seq for result in delivered] == list(range(250))
        assert all(result.dropped == 0 for result in delivered)
        versions = [result.spec.name for result in delivered if result.spec is not None]
        assert versions == sorted(versions, reverse=True), "the old version does not come back"
        assert set(versions) == {"two_squares", "newer"}
