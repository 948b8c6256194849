"""Time the kernels beside what users have today, after comparing each with it on the same random data.

    python -m benchmarks.gpu_kernels [--device cpu] [--small]

Prints a JSON line for each row. `--small` uses sizes that a sanitizer, or a CPU with the twins, does in seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchvision
from pycocotools import mask as coco_mask
from torch import Tensor
from torch.nn import functional as F

from benchmarks.gpu_rows import Row, median_ms, say
from streamd.gpu import ops, reference
from streamd.messages import Letterbox, Picture
from streamd.models.spec import ModelSpec

IOU = 0.5
SECTOR_BYTES = 32
MAX_DETECTIONS = 100


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything."""

    num_images: int
    num_boxes: int
    num_labels: int
    num_masks: int
    num_frames: int
    frame: tuple[int, int]  # width, height
    network_input: int


FULL = Sizes(
    num_images=16, num_boxes=10_000, num_labels=80, num_masks=100, num_frames=32, frame=(1920, 1080), network_input=640
)
SMALL = Sizes(num_images=2, num_boxes=300, num_labels=5, num_masks=7, num_frames=2, frame=(192, 108), network_input=64)


def random_candidates(sizes: Sizes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Scatter boxes [B, K, 4] around objects, as a detector does, with scores and labels [B, K]."""
    generator = torch.Generator().manual_seed(0)
    shape = (sizes.num_images, sizes.num_boxes)
    centres = torch.rand(sizes.num_images, 200, 2, generator=generator) * 1000
    chosen = torch.randint(0, 200, shape, generator=generator)
    centre = centres.gather(1, chosen[..., None].expand(-1, -1, 2)) + torch.randn(*shape, 2, generator=generator) * 8
    half = 20 + torch.rand(*shape, 2, generator=generator) * 80
    boxes = torch.cat((centre - half, centre + half), dim=-1)
    labels = torch.randint(0, sizes.num_labels, shape, generator=generator)
    return boxes.to(device), torch.rand(shape, generator=generator).to(device), labels.to(device)


def torchvision_nms(boxes: Tensor, scores: Tensor, labels: Tensor) -> list[Tensor]:
    return [
        torchvision.ops.batched_nms(*image, IOU)[:MAX_DETECTIONS] for image in zip(boxes, scores, labels, strict=True)
    ]


def time_nms(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    candidates = random_candidates(sizes, device)

    def ours() -> tuple[Tensor, Tensor]:
        return ops.nms(*candidates, IOU, 0.0, MAX_DETECTIONS)

    keep, count = ours()
    for kept, number, expected in zip(keep, count, torchvision_nms(*candidates), strict=True):
        if not torch.equal(kept[:number], expected):
            raise AssertionError("nms: not what torchvision.ops.batched_nms keeps")
    ours_ms, theirs_ms = median_ms(ours, device), median_ms(lambda: torchvision_nms(*candidates), device)
    case = f"nms, {sizes.num_images} images x {sizes.num_boxes} boxes x {sizes.num_labels} classes"
    yield Row(case, ours_ms, "ms")
    yield Row(f"{case}, torchvision's batched_nms in a loop", theirs_ms, "ms")
    yield Row("nms against torchvision", theirs_ms / ours_ms, "x", 5)


def random_nv12(sizes: Sizes, device: torch.device) -> list[Picture]:
    """Make frames with the pitch of a decoder's surfaces: rows begin at multiples of 512 bytes."""
    width, height = sizes.frame
    pitch = -(-width // 512) * 512
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for _ in range(sizes.num_frames):
        surface = torch.randint(0, 256, (height * 3 // 2, pitch), generator=generator, dtype=torch.uint8).to(device)
        luma, chroma = surface[:height, :width], surface[height:, :width].unflatten(1, (width // 2, 2))
        pictures.append(Picture((luma, chroma), "nv12", "bt709", False, 0))
    return pictures


def bytes_to_move(sizes: Sizes, letterbox: Letterbox) -> int:
    """Count what must be read of NV12 frames and written as float16: source elements that have weight in some output.

    Memory comes in sectors of 32 bytes, so a row that is read counts every sector that holds such an element.
    """
    width, height = sizes.frame
    target = letterbox.height, letterbox.width
    luma = len(_tapped(height, target[0])) * _sectors(_tapped(width, target[1]))
    pairs = _tapped(width // 2, target[1])
    chroma = len(_tapped(height // 2, target[0])) * _sectors(np.concatenate((pairs * 2, pairs * 2 + 1)))
    return sizes.num_frames * ((luma + chroma) * SECTOR_BYTES + 3 * 2 * sizes.network_input**2)


def _tapped(source: int, target: int) -> np.ndarray:
    """Return which of `source` elements bilinear sampling to `target` reads with a weight above 0."""
    position = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    first = np.floor(position).astype(np.int64)
    return np.unique(np.concatenate((first, first[position > first] + 1)))


def _sectors(columns: np.ndarray) -> int:
    return len(np.unique(columns // SECTOR_BYTES))


def time_preprocess(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    pictures = random_nv12(sizes, device)
    side = sizes.network_input
    spec = ModelSpec(name="m", task="detect", labels=("a",), input_size=(side, side), colour="rgb")
    letterboxes = [spec.letterbox(*sizes.frame)] * len(pictures)

    def fill(preprocess: Callable[..., None], antialias: bool = False) -> Tensor:
        out = torch.empty(len(pictures), 3, side, side, dtype=torch.float16, device=device)
        rule = {"colour": "rgb", "mean": (124.0, 116.0, 104.0), "std": (58.0, 57.0, 57.0), "pad": spec.padding}
        preprocess(pictures, letterboxes, out, antialias=antialias, **rule)
        return out

    for antialias in (False, True):
        ours, theirs = (fill(preprocess, antialias) for preprocess in (ops.preprocess, reference.preprocess))
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
    ours_ms = median_ms(lambda: fill(ops.preprocess), device)
    theirs_ms = median_ms(lambda: fill(reference.preprocess), device)
    moved = bytes_to_move(sizes, letterboxes[0])
    limit_ms = moved / copy_bytes_per_s(device, moved) * 1e3
    case = f"preprocess, {sizes.num_frames} NV12 frames of {sizes.frame[0]}x{sizes.frame[1]} to {side}x{side} fp16"
    yield Row(case, ours_ms, "ms", note=f"{moved / 1e6:.0f} MB must move")
    yield Row("preprocess, of the limit by bandwidth", 100 * limit_ms / ours_ms, "%", 70)
    yield Row("preprocess against torch operators", theirs_ms / ours_ms, "x", 3)
    yield Row(f"{case}, antialiased", median_ms(lambda: fill(ops.preprocess, True), device), "ms")


def random_masks(sizes: Sizes, share: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make mask probabilities [1, N, 28, 28] of blobs, and boxes [1, N, 4] that each cover `share` of the frame."""
    generator = torch.Generator().manual_seed(0)
    width, height = sizes.frame
    side = torch.linspace(-1, 1, 28)
    distance = side[:, None] ** 2 + side[None] ** 2
    radius = 0.5 + torch.rand(sizes.num_masks, 1, 1, generator=generator) * 0.5
    extent = torch.tensor([width, height]) * share**0.5
    corner = torch.rand(sizes.num_masks, 2, generator=generator) * (torch.tensor([width, height]) - extent)
    boxes = torch.cat((corner, corner + extent), dim=-1)
    return torch.sigmoid(8 * (radius**2 - distance))[None].to(device), boxes[None].to(device)


def paste_as_detectron2(masks: Tensor, boxes: Tensor, width: int, height: int) -> list[bytes]:
    """Sample each mask at every pixel of the frame, bring the pixels to the host, encode them there."""
    x1, y1, x2, y2 = boxes[..., None].unbind(1)
    x = (torch.arange(width, device=boxes.device) + 0.5 - x1) / (x2 - x1) * 2 - 1
    y = (torch.arange(height, device=boxes.device) + 0.5 - y1) / (y2 - y1) * 2 - 1
    grid = torch.stack((x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1)
    pasted = F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0] >= 0.5
    pixels = np.asfortranarray(pasted.cpu().numpy().transpose(1, 2, 0).astype(np.uint8))
    return [encoded["counts"] for encoded in coco_mask.encode(pixels)]


def time_masks(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    width, height = sizes.frame
    placements = torch.tensor([[1, 1, 0, 0, width, height]], dtype=torch.float32, device=device)
    valid = torch.ones(1, sizes.num_masks, dtype=torch.bool, device=device)
    for share, to_reach in ((0.1, 10.0), (1.0, None)):
        masks, boxes = random_masks(sizes, share, device)

        def ours(masks: Tensor = masks, boxes: Tensor = boxes) -> list[bytes]:
            capacity = 2 * sizes.num_masks * (width + 1)
            encoded = ops.encode_box_masks(masks, boxes, valid, placements, threshold=0.5, capacity=capacity)
            return encoded.strings()

        def theirs(masks: Tensor = masks, boxes: Tensor = boxes) -> list[bytes]:
            return paste_as_detectron2(masks[0], boxes[0], width, height)

        _assert_same_masks(ours(), theirs(), height, width)
        ours_ms, theirs_ms = _wall_ms(ours), _wall_ms(theirs)
        case = f"paste + rle, {sizes.num_masks} masks of {share:.0%} of {width}x{height}"
        yield Row(f"{case}, to strings on the host", ours_ms, "ms")
        yield Row(f"{case}, grid_sample and pycocotools", theirs_ms, "ms")
        yield Row(f"{case} against grid_sample and pycocotools", theirs_ms / ours_ms, "x", to_reach)


def _assert_same_masks(ours: Sequence[bytes], theirs: Sequence[bytes], height: int, width: int) -> None:
    """Pixels on the very border may round to either side: the masks must agree but for one in a thousand."""
    for one, other in zip(ours, theirs, strict=True):
        pair = [{"size": [height, width], "counts": counts} for counts in (one, other)]
        overlap = float(coco_mask.iou([pair[0]], [pair[1]], [0])[0, 0])
        if overlap < 0.999:
            raise AssertionError(f"masks: overlap of {overlap:.4f} with what Detectron2's way gives")


def _wall_ms(function: Callable[[], object]) -> float:
    """Return the median wall time of a function that ends on the host."""
    return median_ms(function, torch.device("cpu"), num_runs=10)


def copy_bytes_per_s(device: torch.device, num_bytes: int) -> float:
    """Measure a copy within the device that reads and writes so many bytes in all, cold in its cache."""
    # As large as what is compared with, but never served by the cache of the last run: the buffers rotate.
    count = max(1, 400_000_000 // num_bytes)
    sources = [torch.ones(num_bytes // 2, dtype=torch.uint8, device=device) for _ in range(count)]
    target = torch.empty_like(sources[0])

    def copy_all() -> None:
        for source in sources:
            target.copy_(source)

    return count * num_bytes / median_ms(copy_all, device) * 1e3


Timed = Callable[[Sizes, torch.device], Iterator[Row]]
TIMED: Sequence[Timed] = (time_nms, time_masks, time_preprocess)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    for timed in TIMED:
        try:
            for row in timed(SMALL if options.small else FULL, torch.device(options.device, 0)):
                say(row)
        except Exception as err:  # one kernel that fails must not hide the others
            say(Row(timed.__name__.removeprefix("time_"), None, "", note=f"{type(err).__name__}: {err}"[:300]))


if __name__ == "__main__":
    main()
