"""Letterbox and paste against explicit oracles, torchvision, and pictures that OpenCV letterboxed."""

from __future__ import annotations

import math
from itertools import pairwise, product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.transforms.v2 import functional as transforms

from streamd.gpu.reference import paste_boxes, paste_prototypes, preprocess
from streamd.gpu.rle import Bits
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


def pasted(bits: Bits, height: int, width: int) -> np.ndarray:
    rows, columns = bits.bits.shape
    frame = np.zeros((height, width), dtype=bool)
    frame[bits.y0 : bits.y0 + rows, bits.x0 : bits.x0 + columns] = bits.bits.numpy()
    return frame


def random_boxes(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Make boxes in and around a frame, half of them on half pixels, some empty."""
    corners = rng.uniform([-8, -8], [width + 4, height + 4], (count, 2))
    boxes = np.concatenate((corners, corners + rng.uniform(0, 20, (count, 2))), axis=1)
    boxes[::2] = np.round(boxes[::2] * 2) / 2
    boxes[3::4, 2:] = boxes[3::4, :2]
    return boxes.astype(np.float32)


@repeatable
@given(seed=seeds, count=st.integers(0, 6), grid=st.tuples(st.integers(1, 6), st.integers(1, 6)))
def test_prototype_masks_are_sampled_at_each_pixel_centre(seed: int, count: int, grid: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    height, width, input_size, threshold = 13, 17, (24, 20), 0.4
    letterbox = Letterbox(20 / 17, 20 / 17, 0, 4, 20, 15)
    prototypes, coefficients = rng.normal(size=(3, *grid)), rng.normal(size=(count, 3))
    boxes = random_boxes(rng, count, height, width)
    masks = paste_prototypes(
        torch.tensor(prototypes, dtype=torch.float32),
        torch.tensor(coefficients, dtype=torch.float32),
        torch.from_numpy(boxes),
        torch.tensor([letterbox.scale_x, letterbox.scale_y, letterbox.left, letterbox.top, width, height]),
        input_size,
        threshold,
    )
    assert len(masks) == count
    limit = math.log(threshold / (1 - threshold))
    for mask, box, mix in zip(masks, boxes, coefficients, strict=True):
        logits = np.einsum("p,phw->hw", mix, prototypes)
        frame = pasted(mask, height, width)
        for y, x in product(range(height), range(width)):
            inside = box[0] <= x + 0.5 < box[2] and box[1] <= y + 0.5 < box[3]
            grid_y = ((y + 0.5) * letterbox.scale_y + letterbox.top) * grid[0] / input_size[0] - 0.5
            grid_x = ((x + 0.5) * letterbox.scale_x + letterbox.left) * grid[1] / input_size[1] - 0.5
            logit = bilinear(logits, grid_y, grid_x)
            if abs(logit - limit) > 1e-4:  # closer than float32 can tell
                assert frame[y, x] == (inside and logit > limit), (y, x)


@repeatable
@given(seed=seeds, count=st.integers(0, 6), size=st.sampled_from([1, 2, 5]), threshold=st.sampled_from([0.3, 0.5, 0.7]))
def test_box_masks_are_stretched_over_their_boxes(seed: int, count: int, size: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    height, width = 13, 17
    masks, boxes = rng.random((count, size, size)), random_boxes(rng, count, height, width)
    bits = paste_boxes(torch.tensor(masks, dtype=torch.float32), torch.from_numpy(boxes), width, height, threshold)
    assert len(bits) == count
    for mask, box, region in zip(masks, boxes.astype(np.float64), bits, strict=True):
        frame = pasted(region, height, width)
        ringed = np.pad(mask, 1)
        for y, x in product(range(height), range(width)):
            near = math.floor(box[0]) - 1 <= x < math.ceil(box[2]) + 1
            near &= math.floor(box[1]) - 1 <= y < math.ceil(box[3]) + 1
            if not near or box[2] <= box[0] or box[3] <= box[1]:
                assert not frame[y, x]
                continue
            mask_y = (y + 0.5 - box[1]) / (box[3] - box[1]) * size + 0.5
            mask_x = (x + 0.5 - box[0]) / (box[2] - box[0]) * size + 0.5
            value = bilinear(ringed, mask_y, mask_x)
            if abs(value - threshold) > 1e-4:
                assert frame[y, x] == (value >= threshold), (y, x)


def test_box_masks_equal_grid_sample_as_detectron2_calls_it() -> None:
    rng = torch.Generator().manual_seed(6)
    height, width = 60, 80
    masks = torch.rand(8, 28, 28, generator=rng)
    corners = torch.rand(8, 2, generator=rng) * 50 - 5
    boxes = torch.cat((corners, corners + 3 + torch.rand(8, 2, generator=rng) * 60), dim=1)
    for mask, box, bits in zip(masks, boxes, paste_boxes(masks, boxes, width, height, 0.5), strict=True):
        grid_y = (torch.arange(height) + 0.5 - box[1]) / (box[3] - box[1]) * 2 - 1
        grid_x = (torch.arange(width) + 0.5 - box[0]) / (box[2] - box[0]) * 2 - 1
        grid = torch.stack(torch.meshgrid(grid_x, grid_y, indexing="xy"), dim=-1)
        value = torch.nn.functional.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0].numpy()
        differs = pasted(bits, height, width) != (value >= 0.5)
        assert (np.abs(value[differs] - 0.5) < 1e-4).all()


@pytest.mark.parametrize(
    "spoilt", [[0, 0, math.nan, 5], [math.nan] * 4, [-math.inf, 0, 5, 5], [5, 5, 1, 1], [3, 3, 3, 9]]
)
def test_masks_of_senseless_boxes_are_empty(spoilt: list[float]) -> None:
    boxes = torch.tensor([spoilt, [-1e30, -1e30, 1e30, 1e30]])
    for bits in (
        paste_boxes(torch.ones(2, 4, 4), boxes, 10, 8, 0.5),
        paste_prototypes(
            torch.ones(1, 2, 2), torch.ones(2, 1), boxes, torch.tensor([1.0, 1.0, 0.0, 0.0, 10.0, 8.0]), (8, 10), 0.5
        ),
    ):
        assert bits[0].bits.numel() == 0
        assert bits[1].bits.all() and bits[1].bits.shape == (8, 10)


def test_masks_of_neighbouring_boxes_neither_overlap_nor_leave_a_gap() -> None:
    edges = [0.0, 2.5, 3.3, 7.0, 10.0]
    boxes = torch.tensor([[left, 0.0, right, 4.0] for left, right in pairwise(edges)])
    masks = paste_prototypes(
        torch.ones(1, 2, 2), torch.ones(4, 1), boxes, torch.tensor([1.0, 1.0, 0.0, 0.0, 10.0, 4.0]), (4, 10), 0.5
    )
    np.testing.assert_array_equal(np.sum([pasted(mask, 4, 10) for mask in masks], axis=0), np.ones((4, 10)))
