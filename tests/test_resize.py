"""What the daemon makes of a frame beside what PIL makes of it, on photographs, by the twin and by the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from streamd.decode.software import picture_of
from streamd.draw import to_rgb
from streamd.gpu import preprocess as kernels
from streamd.gpu import reference
from streamd.messages import Letterbox, Picture
from streamd.models.spec import ModelSpec, ResizeRule
from streamd.runner import assemble
from tests.cuda_on_cpu import emulated_cuda
from tests.fakes import make_frame

MAX_MEAN_DIFFERENCE = 2.0  # grey levels of 255
NUM_PHOTOGRAPHS = 8
PLAIN: dict[str, Any] = {"colour": "rgb", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "pad": (0.0, 0.0, 0.0)}

Fill = Callable[..., None]


def spec_of(rule: ResizeRule, side_px: int) -> ModelSpec:
    return ModelSpec(name="any", task="detect", labels=("a",), input_size=(side_px, side_px), colour="rgb", resize=rule)


LETTERBOX = ResizeRule(antialias=True)
RULES = {
    "letterbox to 224": spec_of(LETTERBOX, 224),
    "letterbox to 320": spec_of(LETTERBOX, 320),
    "letterbox to 416": spec_of(LETTERBOX, 416),
    "shortest edge of 800": spec_of(
        ResizeRule(kind="shortest_edge", min_size=800, max_size=1333, antialias=True), 1344
    ),
}
every_rule = pytest.mark.parametrize("spec", RULES.values(), ids=RULES)


@pytest.fixture(params=["twin", "kernel"])
def fill(request: pytest.FixtureRequest, emulator_folder: Path) -> Iterator[Fill]:
    """Give the twin, and the kernel as it runs on the CPU."""
    if request.param == "twin":
        yield reference.preprocess
        return
    with emulated_cuda(emulator_folder):
        yield kernels.preprocess


def of_rgb(pixels: np.ndarray) -> Picture:
    return Picture((torch.from_numpy(pixels),), "rgb", "bt709", full_range=True, rotation=0)


def drawn(height: int = 480, width: int = 640) -> Picture:
    """Draw rings that grow finer towards the border, stripes of a pixel, and a ramp, each in its own colour."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    rings = 127.5 + 127.5 * np.cos(((x - width / 2) ** 2 + (y - height / 2) ** 2) / 200)
    stripes = np.where(x % 3 == 0, 255, 0)
    return of_rgb(np.stack((rings, stripes, x / width * 255), axis=-1).astype(np.uint8))


def resized(picture: Picture, letterbox: Letterbox, fill: Fill, *, antialias: bool = True) -> Tensor:
    """Return the picture alone, without padding: [3, h, w] in 0..255."""
    out = torch.empty(1, 3, letterbox.height, letterbox.width)
    whole = Letterbox(letterbox.scale_x, letterbox.scale_y, 0, 0, letterbox.width, letterbox.height)
    fill([picture], [whole], out, antialias=antialias, **PLAIN)
    return out[0]


def difference(picture: Picture, spec: ModelSpec, fill: Fill, *, antialias: bool = True) -> float:
    """Return the mean distance, in grey levels, of what `fill` makes of a picture from what PIL makes of it."""
    source = to_rgb(picture)
    letterbox = spec.letterbox(source.shape[1], source.shape[0])
    theirs = Image.fromarray(source).resize((letterbox.width, letterbox.height), Image.Resampling.BILINEAR)
    ours = resized(picture, letterbox, fill, antialias=antialias)
    return float(np.abs(ours.permute(1, 2, 0).numpy() - np.asarray(theirs)).mean())


@every_rule
def test_a_drawing_with_fine_lines_is_what_pil_makes_of_it(spec: ModelSpec, fill: Fill) -> None:
    assert difference(drawn(), spec, fill) < 0.5


def test_without_antialiasing_a_drawing_differs(fill: Fill) -> None:
    assert difference(drawn(), RULES["letterbox to 224"], fill, antialias=False) > 10 * MAX_MEAN_DIFFERENCE


def test_a_picture_that_grows_is_the_same_with_antialiasing(fill: Fill) -> None:
    picture, letterbox = drawn(48, 64), Letterbox(2.0, 2.0, 0, 0, 130, 97)
    plain, antialiased = (resized(picture, letterbox, fill, antialias=antialias) for antialias in (False, True))
    assert torch.equal(plain, antialiased)


@every_rule
def test_photographs_are_within_two_grey_levels_of_pil(shared: Path, spec: ModelSpec, fill: Fill) -> None:
    for path in sorted((shared / "data/persons/images").glob("*.jpg"))[:NUM_PHOTOGRAPHS]:
        picture = of_rgb(np.array(Image.open(path).convert("RGB")))
        assert difference(picture, spec, fill) <= MAX_MEAN_DIFFERENCE, path.name


@every_rule
def test_frames_of_videos_are_within_two_grey_levels_of_pil(shared: Path, spec: ModelSpec, fill: Fill) -> None:
    for path in sorted((shared / "videos").iterdir()):
        with av.open(str(path)) as container:
            (decoded,) = islice(container.decode(video=0), 20, 21)
            assert difference(picture_of(decoded), spec, fill) <= MAX_MEAN_DIFFERENCE, path.name


@pytest.mark.parametrize("antialias", [False, True])
def test_the_daemon_follows_the_models_rule(antialias: bool) -> None:
    spec = spec_of(ResizeRule(antialias=antialias), 64)
    picture = drawn(96, 128)
    frame = replace(make_frame("gate"), picture=picture, width=128, height=96)
    images = torch.empty(1, 3, 64, 64)
    assemble([frame], spec, images)
    expected = resized(picture, spec.letterbox(128, 96), reference.preprocess, antialias=antialias)
    assert torch.equal(images[0, :, :48], expected)


def test_the_demo_clip_is_within_two_grey_levels_of_pil(demo_clip: Path, fill: Fill) -> None:
    with av.open(str(demo_clip)) as container:
        picture = picture_of(next(container.decode(video=0)))
    for name, spec in RULES.items():
        assert difference(picture, spec, fill) <= MAX_MEAN_DIFFERENCE, name
