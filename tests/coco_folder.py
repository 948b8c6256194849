"""Write a small data set in COCO's format: pictures of coloured rectangles and discs, with masks and keypoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

LABELS = ("box", "disc")
KEYPOINTS = ("left_end", "right_end")


def write_coco(folder: Path, num_pictures: int = 8, *, size: tuple[int, int] = (72, 96), seed: int = 0) -> Path:
    """Write pictures of `size` (height, width) with one to three objects each; return the annotation file.

    Boxes are red, discs green, on grey noise; the keypoints are the middles of the left and the right edge.
    """
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    height, width = size
    for number in range(1, num_pictures + 1):
        pixels = random.integers(90, 120, (height, width, 3)).astype(np.uint8)
        for index in range(int(random.integers(1, 4))):
            label = int(random.integers(0, 2))
            w, h = (int(side) for side in random.integers(14, 34, 2))
            x, y = int(random.integers(0, width - w)), int(random.integers(0, height - h))
            mask = _shape(label, size, x, y, w, h)
            pixels[mask] = (220, 40, 40) if label == 0 else (40, 200, 60)
            middle = y + h / 2
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [x, y, w, h],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": _polygon(label, x, y, w, h),
                    "keypoints": [x + 1, middle, 2, x + w - 1, middle, 2 if index else 1],
                    "num_keypoints": 2,
                }
            )
        name = f"{number:04d}.png"
        Image.fromarray(pixels).save(folder / name)
        images.append({"id": number, "file_name": name, "width": width, "height": height})
    categories = [{"id": index + 1, "name": name, "keypoints": list(KEYPOINTS)} for index, name in enumerate(LABELS)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def _shape(label: int, size: tuple[int, int], x: int, y: int, w: int, h: int) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    if label == 0:
        return (columns > x) & (columns < x + w) & (rows > y) & (rows < y + h)
    return ((columns - x - w / 2) / (w / 2)) ** 2 + ((rows - y - h / 2) / (h / 2)) ** 2 <= 1


def _polygon(label: int, x: int, y: int, w: int, h: int) -> list[list[float]]:
    if label == 0:
        return [[x, y, x + w, y, x + w, y + h, x, y + h]]
    angles = np.linspace(0, 2 * np.pi, 32, endpoint=False)
    points = np.stack((x + w / 2 + w / 2 * np.cos(angles), y + h / 2 + h / 2 * np.sin(angles)), axis=1)
    return [points.round(2).ravel().tolist()]
