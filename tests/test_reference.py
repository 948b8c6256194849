"""Letterbox against an explicit oracle, torchvision, and pictures that OpenCV letterboxed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from streamd.gpu.reference import preprocess
from streamd.messages import Letterbox, Picture
from streamd.models.spec import ModelSpec, ResizeRule

repeatable = settings(deadline=None, derandomize=True, max_examples=40)
seeds = st.integers(0, 2**32 - 1)

PLAIN: dict[str, Any] = {"colour": "rgb", "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "pad": (114.0, 114.0, 114.0)}

# Y'CbCr -> R'G'B' as textbooks print it: luma step, black, Cr to R, Cb to G, Cr to G, Cb to B.
TEXTBOOK = {
    ("bt601", False): (1.164384, 16, 1.596027, -0.391762, -0.812968, 2.017232),
    ("bt601", True): (1.0, 0, 1.402, -0.344136, -0.714136, 1.772),
    ("bt709", False): (1.164384, 16, 1.792741, -0.213249, -0.532909, 2.112402),
    ("bt709", True): (1.0, 0, 1.5748, -0.187324, -0.468124, 1.8556),
}


def random_bytes(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))


def random_yuv(
    rng: np.random.Generator,
    height: int,
    width: int,
    matrix: Literal["bt601", "bt709"] = "bt601",
    full_range: bool = False,
    rotation: Literal[0, 90, 180, 270] = 0,
) -> Picture:
    chroma = ((height + 1) // 2, (width + 1) // 2)
    planes = (random_bytes(rng, height, width), random_bytes(rng, *chroma), random_bytes(rng, *chroma))
    return Picture(planes, "yuv", matrix, full_range, rotation)


def rgb_picture(plane: Tensor, rotation: Literal[0, 90, 180, 270] = 0) -> Picture:
    return Picture((plane,), "rgb", "bt601", False, rotation)


def fill(picture: Picture, letterbox: Letterbox, size: tuple[int, int], **options: Any) -> Tensor:
    out = torch.full((1, 3, *size), torch.nan)
    preprocess([picture], [letterbox], out, **{**PLAIN, **options})
    return out[0]


def bilinear(plane: np.ndarray, y: float, x: float) -> float:
    """Read a plane at (y, x), in elements, in float64; outside is the nearest border."""
    rows, columns = plane.shape
    y, x = min(max(y, 0.0), rows - 1.0), min(max(x, 0.0), columns - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
    upper = plane[top, left] * (1 - (x - left)) + plane[top, right] * (x - left)
    lower = plane[bottom, left] * (1 - (x - left)) + plane[bottom, right] * (x - left)
    return float(upper * (1 - (y - top)) + lower * (y - top))


def stretched(plane: Tensor, rotation: int, height: int, width: int) -> np.ndarray:
    upright = np.rot90(plane.numpy().astype(np.float64), rotation // 90)
    rows, columns = upright.shape
    out = np.empty((height, width))
    for y, x in np.ndindex(height, width):
        out[y, x] = bilinear(upright, (y + 0.5) * rows / height - 0.5, (x + 0.5) * columns / width - 0.5)
    return out


def mixed(picture: Picture, height: int, width: int) -> np.ndarray:
    """Stretch and mix a yuv picture pixel by pixel into [3, height, width] R'G'B'."""
    y, cb, cr = (stretched(plane, picture.rotation, height, width) for plane in picture.planes)
    step, black, cr_to_red, cb_to_green, cr_to_green, cb_to_blue = TEXTBOOK[picture.matrix, picture.full_range]
    y, cb, cr = step * (y - black), cb - 128, cr - 128
    return np.clip([y + cr_to_red * cr, y + cb_to_green * cb + cr_to_green * cr, y + cb_to_blue * cb], 0, 255)


@repeatable
@given(
    seed=seeds,
    source=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    matrix=st.sampled_from(["bt601", "bt709"]),
    full_range=st.booleans(),
    rotation=st.sampled_from([0, 90, 180, 270]),
    anchor=st.sampled_from(["top_left", "center"]),
)
def test_yuv_pictures_are_turned_letterboxed_and_mixed_as_by_hand(
    seed: int, source: tuple[int, int], matrix: Any, full_range: bool, rotation: Any, anchor: Any
) -> None:
    picture = random_yuv(np.random.default_rng(seed), *source, matrix, full_range, rotation)
    spec = ModelSpec(
        name="any", task="detect", labels=("a",), input_size=(9, 11), colour="bgr", resize=ResizeRule(anchor=anchor)
    )
    height, width = source if rotation in (0, 180) else source[::-1]
    letterbox = spec.letterbox(width, height)
    mean, std = (1.0, 20.0, 300.0), (2.0, 0.5, 50.0)

    filled = fill(picture, letterbox, spec.input_size, colour="bgr", mean=mean, std=std)

    expected = np.full((3, 9, 11), 114.0)
    rows = slice(letterbox.top, letterbox.top + letterbox.height)
    columns = slice(letterbox.left, letterbox.left + letterbox.width)
    expected[:, rows, columns] = mixed(picture, letterbox.height, letterbox.width)[::-1]
    expected = (expected - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    np.testing.assert_allclose(filled.numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("source", [(37, 53), (16, 16), (50, 20)])
def test_rgb_pictures_are_within_one_grey_level_of_torchvision(source: tuple[int, int]) -> None:
    plane = random_bytes(np.random.default_rng(1), *source, 3)
    theirs = transforms.resize(plane.permute(2, 0, 1), [24, 31], antialias=False)
    ours = fill(rgb_picture(plane), Letterbox(1.0, 1.0, 0, 0, 31, 24), (24, 31))
    assert (ours.round() - theirs.float()).abs().max() <= 1.0


@pytest.mark.parametrize("index", [0, 1, 2])
def test_pictures_are_within_one_grey_level_of_opencv(shared: Path, index: int) -> None:
    reference = np.load(shared / "parity" / "yolox_nano" / "io.npz")
    plane = torch.from_numpy(reference[f"image{index}"][..., ::-1].copy())  # stored as BGR
    spec = ModelSpec(name="any", task="detect", labels=("a",), input_size=(416, 416), colour="bgr")
    letterbox = spec.letterbox(plane.shape[1], plane.shape[0])
    ours = fill(rgb_picture(plane), letterbox, spec.input_size, colour="bgr")
    assert np.abs(ours.numpy() - reference[f"input{index}"][0]).max() <= 1.0


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_rgb_pictures_turn_counter_clockwise(rotation: Literal[0, 90, 180, 270]) -> None:
    plane = random_bytes(np.random.default_rng(2), 4, 7, 3)
    upright = np.rot90(plane.numpy(), rotation // 90).copy()
    height, width, _ = upright.shape
    turned = fill(rgb_picture(plane, rotation), Letterbox(1.0, 1.0, 0, 0, width, height), (height, width))
    np.testing.assert_array_equal(turned.permute(1, 2, 0).numpy(), upright)


@pytest.mark.parametrize("source", [(24, 32), (23, 31), (1, 1)])
def test_nv12_gives_what_yuv_gives(source: tuple[int, int]) -> None:
    yuv = random_yuv(np.random.default_rng(3), *source)
    luma, cb, cr = yuv.planes
    nv12 = Picture((luma, torch.stack((cb, cr), dim=-1)), "nv12", yuv.matrix, yuv.full_range, 0)
    letterbox = Letterbox(1.0, 1.0, 1, 2, 15, 11)
    assert torch.equal(fill(nv12, letterbox, (16, 16)), fill(yuv, letterbox, (16, 16)))


def test_pitched_planes_give_what_packed_planes_give() -> None:
    rng = np.random.default_rng(4)
    luma, cb, cr = random_bytes(rng, 10, 64)[:, :18], random_bytes(rng, 5, 32)[:, :9], random_bytes(rng, 5, 40)[:, :9]
    pitched = Picture((luma, cb, cr), "yuv", "bt709", True, 90)
    packed = Picture(tuple(plane.clone() for plane in pitched.planes), "yuv", "bt709", True, 90)
    letterbox = Letterbox(1.0, 1.0, 0, 0, 8, 12)
    assert torch.equal(fill(pitched, letterbox, (12, 12)), fill(packed, letterbox, (12, 12)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_slot_is_overwritten_in_any_layout_and_precision(dtype: torch.dtype, memory_format: Any) -> None:
    rng = np.random.default_rng(5)
    pictures = [random_yuv(rng, 8, 20), rgb_picture(random_bytes(rng, 30, 6, 3)), random_yuv(rng, 1, 1)]
    letterboxes = [
        Letterbox(0.8, 0.8, 0, 5, 16, 6),
        Letterbox(0.5, 0.5, 6, 0, 3, 16),
        Letterbox(16.0, 16.0, 0, 0, 16, 16),
    ]
    out = torch.full((3, 3, 16, 16), torch.nan, dtype=dtype).contiguous(memory_format=memory_format)
    preprocess(pictures, letterboxes, out, **PLAIN)
    for slot, picture, letterbox in zip(out, pictures, letterboxes, strict=True):
        torch.testing.assert_close(slot, fill(picture, letterbox, (16, 16)).to(dtype), rtol=0, atol=0)


def test_white_and_black_of_limited_range_are_255_and_0() -> None:
    luma = torch.tensor([[16, 235]], dtype=torch.uint8)
    grey = torch.full((1, 1), 128, dtype=torch.uint8)
    filled = fill(Picture((luma, grey, grey), "yuv", "bt709", False, 0), Letterbox(1.0, 1.0, 0, 0, 2, 1), (1, 2))
    torch.testing.assert_close(filled, torch.tensor([[[0.0, 255.0]]]).expand(3, 1, 2), rtol=0, atol=1e-4)


def test_a_picture_without_a_slot_is_refused() -> None:
    picture = rgb_picture(torch.zeros(2, 2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="zip"):
        preprocess([picture, picture], [Letterbox(1.0, 1.0, 0, 0, 2, 2)] * 2, torch.empty(1, 3, 2, 2), **PLAIN)
