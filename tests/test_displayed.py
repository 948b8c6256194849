"""Boxes are where the object is in the picture as displayed, whatever the size, turn and format of the video."""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from streamd.announce import detections_message
from streamd.config import Config
from streamd.messages import Result
from streamd.models import artifact
from streamd.models.spec import ModelSpec
from streamd.pipeline import Pipeline
from tests.clips import turn, write_clip

WITHIN_S = 60
INPUT = (256, 512)  # height and width; the letterbox blurs the edge of an object by about one of these pixels
LABELS = ("bright",)

Video = tuple[Path, tuple[int, int], tuple[int, int]]  # file, size as displayed, which corner is bright
Seen = tuple[dict[str, Video], dict[str, list[Result]]]


class BrightPart(nn.Module):
    """See one object: the box of all that is bright, which in the clips' pictures is one quarter."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        bright = (images.mean(1) > 170).long()
        rows, columns = bright.amax(2), bright.amax(1)
        top, left = rows.argmax(1), columns.argmax(1)
        bottom, right = rows.shape[1] - rows.flip(1).argmax(1), columns.shape[1] - columns.flip(1).argmax(1)
        boxes = torch.stack((left, top, right, bottom), 1).to(images.dtype)
        return {"boxes": boxes[:, None], "scores": bright.amax((1, 2)).to(images.dtype)[:, None, None]}


def write_mjpeg(path: Path, size: tuple[int, int]) -> Path:
    return write_clip(path, 2, codec="mjpeg", pixel_format="yuvj420p", size=size, options={"q:v": "2"})


def write_videos(folder: Path) -> dict[str, Video]:
    """Make videos; give each one's file, size as displayed, and which corner is bright (0 left or top, 1 the other)."""
    stored = write_clip(folder / "stored.mp4", 4, size=(320, 240))
    deep = write_clip(folder / "deep.mp4", 4, size=(320, 240), pixel_format="yuv420p10le")
    interlaced = {"x264-params": "interlaced=1"}
    return {
        "plain": (stored, (320, 240), (0, 0)),
        "quarter": (turn(stored, folder / "90.mp4", 90), (240, 320), (1, 0)),
        "half": (turn(stored, folder / "180.mp4", 180), (320, 240), (1, 1)),
        "back": (turn(stored, folder / "270.mp4", 270), (240, 320), (0, 1)),
        "deep": (deep, (320, 240), (0, 0)),
        "deep-turned": (turn(deep, folder / "deep-90.mp4", 90), (240, 320), (1, 0)),
        "odd": (write_mjpeg(folder / "odd.avi", (321, 243)), (321, 243), (0, 0)),
        "odd-444": (write_clip(folder / "444.mp4", 4, size=(321, 243), pixel_format="yuv444p"), (321, 243), (0, 0)),
        "wide": (write_mjpeg(folder / "wide.avi", (4095, 2047)), (4095, 2047), (0, 0)),
        "tall": (write_clip(folder / "tall.mp4", 4, size=(90, 700)), (90, 700), (0, 0)),
        "interlaced": (write_clip(folder / "i.mp4", 4, size=(320, 240), options=interlaced), (320, 240), (0, 0)),
        "b-frames": (write_clip(folder / "b.mp4", 9, size=(320, 240), gop=9, b_frames=3), (320, 240), (0, 0)),
        "hevc": (write_clip(folder / "hevc.mp4", 4, size=(320, 240), codec="libx265"), (320, 240), (0, 0)),
    }


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """Run all videos through one model at once, so that a batch holds many sizes."""
    folder = tmp_path_factory.mktemp("videos")
    model = folder / "bright.pt"
    spec = ModelSpec(name="bright", task="detect", labels=LABELS, input_size=INPUT, colour="rgb")
    artifact.export(BrightPart(), spec, model)
    videos = write_videos(folder)
    small = write_clip(folder / "small.h264", 5, size=(64, 48)).read_bytes()
    large = write_clip(folder / "large.h264", 5, size=(320, 240)).read_bytes()
    (folder / "both.h264").write_bytes(small + large + small)
    files = {name: path for name, (path, _, _) in videos.items()} | {"changes": folder / "both.h264"}
    config = Config.model_validate(
        {
            "models": {"m": {"path": str(model), "max_batch": 8, "workers": 1, "threads": 1}},
            "streams": {name: {"url": str(path), "pace": "fast"} for name, path in files.items()},
        }
    )
    results: dict[str, list[Result]] = defaultdict(list)
    ended, crashes = threading.Event(), list[Exception]()

    def on_crash(err: Exception) -> None:
        crashes.append(err)
        ended.set()

    pipeline = Pipeline(
        config, lambda result: results[result.frame.stream].append(result), on_crash=on_crash, on_end=ended.set
    )
    pipeline.warm_up()
    pipeline.start()
    assert ended.wait(WITHIN_S)
    pipeline.close_intake()
    assert pipeline.drain(WITHIN_S) == [] and pipeline.join_sources(WITHIN_S) == [] and crashes == []
    return videos, results


def assert_quarter(result: Result, size: tuple[int, int], corner: tuple[int, int]) -> None:
    """Check the size and the box of a result as they go on the wire."""
    message = detections_message(result, 0, LABELS, "")
    assert (message.width, message.height) == size
    (found,) = message.objects
    blur = 1.5 * max(size[0] / INPUT[1], size[1] / INPUT[0])
    for side in (0, 1):
        begin, end = ((size[side] / 2) * (corner[side] + step) for step in (0, 1))
        assert found.box[side] == pytest.approx(begin, abs=blur + 0.5)
        assert found.box[side + 2] == pytest.approx(end, abs=blur + 0.5)
        assert 0 <= found.box[side] < found.box[side + 2] <= size[side]


def test_the_box_is_the_bright_quarter_of_the_picture_as_displayed(seen: Seen) -> None:
    videos, results = seen
    for name, (_, size, corner) in videos.items():
        assert results[name], f"{name} gave nothing"
        for result in results[name]:
            assert_quarter(result, size, corner)


def test_messages_carry_the_new_size_when_it_changes_in_mid_stream(seen: Seen) -> None:
    sizes = [(64, 48)] * 5 + [(320, 240)] * 5 + [(64, 48)] * 5
    for result, size in zip(seen[1]["changes"], sizes, strict=True):
        assert_quarter(result, size, (0, 0))
