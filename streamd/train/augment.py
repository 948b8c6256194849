"""Decide how a training image is made of one or several pictures; render.py then makes it.

What is decided is a `Plan`: numbers alone, a function of the pictures' sizes and of a generator of random numbers. Each
picture of it goes into the network's input once, by the daemon's own letterbox and kernel, so nothing is resampled
twice, and a plan without any augmentation is what the daemon does with a frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import msgspec
import numpy as np

from streamd.messages import Letterbox
from streamd.models.spec import ModelSpec

_MULTI_SCALE_STEP_PX = 32  # or the next multiple of the spec's own
_MOSAIC_CENTRE = (0.25, 0.75)  # where four pictures meet, as part of the image's sides
_LUMA = np.array((0.299, 0.587, 0.114))  # ITU-R BT.601: of red, green, blue


def _option(default: Any, description: str) -> Any:
    return field(default=default, metadata={"description": description})


@dataclass(frozen=True, slots=True)
class Augmentation:
    """How much a training image may differ from its picture. Raises ValueError for what is out of range.

    The description of each field is in its metadata.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}  # for recipes, where a slip must not be silent

    flip: float = _option(0.5, "Probability of a mirror image; key points change sides by their names (left_, right_).")
    hue: float = _option(0.015, "Colours turn by up to this part of the colour circle, either way.")
    saturation: float = _option(0.3, "Saturation is multiplied by 1 - this to 1 + this.")
    value: float = _option(0.3, "Brightness is multiplied by 1 - this to 1 + this.")
    multi_scale: tuple[float, float] = _option(
        (1.0, 1.0), "The input size of a batch is that of the model times a factor from this range."
    )
    scale: tuple[float, float] = _option(
        (1.0, 1.0),
        "Large-scale jitter: a picture is scaled by a factor from this range after the letterbox, then cropped or "
        "padded; (0.1, 2.0) is usual.",
    )
    mosaic: float = _option(0.0, "Probability that an image is made of four pictures.")
    mosaic_scale: tuple[float, float] = _option((0.5, 1.5), "As `scale`, for each picture of a mosaic.")
    copy_paste: float = _option(
        0.0, "Probability that objects of another picture are pasted into an image; both need masks."
    )
    last_epochs_plain: int = _option(0, "So many epochs at the end have neither mosaic nor copy-paste.")

    def __post_init__(self) -> None:
        for name in ("flip", "mosaic", "copy_paste", "saturation", "value"):
            _need(0 <= getattr(self, name) <= 1, name, getattr(self, name), "0 to 1")
        _need(0 <= self.hue <= 0.5, "hue", self.hue, "0 to 0.5")
        for name in ("multi_scale", "scale", "mosaic_scale"):
            low, high = getattr(self, name)
            _need(0.05 <= low <= high <= 4, name, (low, high), "a lower and a higher factor within 0.05 to 4")
        _need(self.last_epochs_plain >= 0, "last_epochs_plain", self.last_epochs_plain, "0 or more")

    @classmethod
    def none(cls) -> Augmentation:
        """Return the one that leaves every picture as the daemon sees it."""
        return cls(flip=0.0, hue=0.0, saturation=0.0, value=0.0)

    @classmethod
    def descriptions(cls) -> dict[str, str]:
        """Say what each option does."""
        return {one.name: one.metadata["description"] for one in fields(cls)}


def _need(is_fine: bool, name: str, value: object, expected: str) -> None:
    if not is_fine:
        raise ValueError(f"{name} is {value}, expected {expected}")


@dataclass(frozen=True, slots=True)
class Layer:
    """One picture's place in an image."""

    record: int  # index into DataSet.records
    mirrored: bool  # done first; what follows is in the mirrored picture's pixels
    crop: tuple[int, int, int, int]  # x1 y1 x2 y2
    letterbox: Letterbox  # where the crop lands: image = (picture - crop's corner) * scale + (left, top)
    is_whole: bool  # placed as the daemon places it


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What one image is made of."""

    layers: tuple[Layer, ...]  # they do not overlap
    size: tuple[int, int]  # height, width of what is picture in the image, as the daemon tells the network
    colour: np.ndarray | None = None  # [3,3]: new red, green, blue of the old
    pasted: Layer | None = None  # objects of it go over the layers
    paste_seed: int = 0  # which objects


@dataclass(frozen=True, slots=True)
class Sources:
    """What planning must know of a data set."""

    sizes: Sequence[tuple[int, int]]  # width, height of each record's picture
    masked: Sequence[int]  # indices of the records that have masks, rising


def plan(
    augmentation: Augmentation,
    spec: ModelSpec,
    sources: Sources,
    index: int,
    random: np.random.Generator,
    *,
    plain: bool = False,
) -> Plan:
    """Decide on the image of record `index`; `plain` says that neither mosaic nor copy-paste is wanted now."""
    # Every draw is made, wanted or not: an option that is switched on leaves the other ones' randomness alone.
    wants_mosaic, wants_paste = random.random(2) < (augmentation.mosaic, augmentation.copy_paste)
    colour = _colour(augmentation, random)
    paste_seed = int(random.integers(2**31))
    others = _companions(sources, index, random)
    if wants_mosaic and not plain:
        layers = _mosaic(augmentation, spec, sources, (index, *others[:3]), random)
        size = spec.input_size
    else:
        layers = (_single(augmentation, spec, sources, index, random),)
        size = (layers[0].letterbox.height, layers[0].letterbox.width)
    has_masks = _is_in(sources.masked, index)
    pasted = (
        _single(augmentation, spec, sources, others[3], random) if has_masks and wants_paste and not plain else None
    )
    return Plan(layers, size, colour, pasted, paste_seed)


def input_size(augmentation: Augmentation, spec: ModelSpec, random: np.random.Generator) -> tuple[int, int]:
    """Draw height and width of a batch's images: multiples of what the network needs, the shape nearly kept."""
    factor = random.uniform(*augmentation.multi_scale)
    if augmentation.multi_scale == (1.0, 1.0):
        return spec.input_size
    step = spec.size_multiple * max(1, _MULTI_SCALE_STEP_PX // spec.size_multiple)
    height, width = (max(step, step * round(side * factor / step)) for side in spec.input_size)
    return height, width


def at_size(spec: ModelSpec, size: tuple[int, int]) -> ModelSpec:
    """Return the spec with another input size, and with the sides of its resize rule in proportion."""
    if size == spec.input_size:
        return spec
    factor = math.sqrt(size[0] * size[1] / (spec.input_size[0] * spec.input_size[1]))
    rule = msgspec.structs.replace(
        spec.resize, min_size=round(spec.resize.min_size * factor), max_size=round(spec.resize.max_size * factor)
    )
    return msgspec.structs.replace(spec, input_size=size, resize=rule)


def _companions(sources: Sources, index: int, random: np.random.Generator) -> list[int]:
    """Draw the records that may join `index`: those with masks where it has some, so that the masks stay of use."""
    places = random.random(4)
    pool: Sequence[int] = sources.masked if _is_in(sources.masked, index) else range(len(sources.sizes))
    return [int(pool[int(place * len(pool))]) for place in places]


def _is_in(rising: Sequence[int], index: int) -> bool:
    place = int(np.searchsorted(rising, index)) if len(rising) else 0
    return place < len(rising) and rising[place] == index


def _single(
    augmentation: Augmentation, spec: ModelSpec, sources: Sources, index: int, random: np.random.Generator
) -> Layer:
    """Place one picture as the daemon does, but for the large-scale jitter."""
    mirrored = bool(random.random() < augmentation.flip)
    factor, across, down = random.uniform(*augmentation.scale), *random.random(2)
    width, height = sources.sizes[index]
    letterbox = spec.letterbox(width, height)
    if augmentation.scale == (1.0, 1.0):
        return Layer(index, mirrored, (0, 0, width, height), letterbox, is_whole=True)
    room_down, room_across = spec.input_size
    x = _span(width, letterbox.width * factor, room_across, across)
    y = _span(height, letterbox.height * factor, room_down, down)
    centred = spec.resize.anchor == "center"
    corner = ((room_across - x[2]) // 2, (room_down - y[2]) // 2) if centred else (0, 0)
    return _layer(index, mirrored, x, y, corner)


def _mosaic(
    augmentation: Augmentation, spec: ModelSpec, sources: Sources, indices: Sequence[int], random: np.random.Generator
) -> tuple[Layer, ...]:
    """Let four pictures meet at a point; of one that is too large for its quarter, any part may show."""
    height, width = spec.input_size
    part_x, part_y = random.uniform(*_MOSAIC_CENTRE, 2)
    centre_x, centre_y = round(width * part_x), round(height * part_y)
    layers = []
    for number, index in enumerate(indices):
        is_right, is_lower = number % 2, number // 2
        mirrored = bool(random.random() < augmentation.flip)
        factor, across, down = random.uniform(*augmentation.mosaic_scale), *random.random(2)
        letterbox = spec.letterbox(*sources.sizes[index])
        room = (width - centre_x if is_right else centre_x, height - centre_y if is_lower else centre_y)
        x = _span(sources.sizes[index][0], letterbox.width * factor, room[0], across)
        y = _span(sources.sizes[index][1], letterbox.height * factor, room[1], down)
        corner = (centre_x if is_right else centre_x - x[2], centre_y if is_lower else centre_y - y[2])
        layers.append(_layer(index, mirrored, x, y, corner))
    return tuple(layers)


def _span(source: int, scaled: float, room: int, offset: float) -> tuple[int, int, int]:
    """Fit a side of `source` pixels, scaled to `scaled`, into `room`: return its first and last pixel and its length.

    `offset` in 0..1 says which part is seen of what is too long: from the first to the last.
    """
    if scaled <= room:
        return 0, source, max(1, round(scaled))
    step = scaled / source
    start = offset * (scaled - room)
    first = min(int(start / step), source - 1)
    return first, max(first + 1, min(source, math.ceil((start + room) / step))), room


def _layer(
    index: int, mirrored: bool, x: tuple[int, int, int], y: tuple[int, int, int], corner: tuple[int, int]
) -> Layer:
    letterbox = Letterbox(
        scale_x=x[2] / (x[1] - x[0]),
        scale_y=y[2] / (y[1] - y[0]),
        left=corner[0],
        top=corner[1],
        width=x[2],
        height=y[2],
    )
    return Layer(index, mirrored, (x[0], y[0], x[1], y[1]), letterbox, is_whole=False)


def _colour(augmentation: Augmentation, random: np.random.Generator) -> np.ndarray | None:
    """Draw a change of hue, saturation and value as one matrix [3,3] float32.

    Hue turns about the grey axis (Rodrigues' formula), saturation moves to or from the luma: what HSV means by them,
    without its corners, and in one pass.
    """
    turn, purity, gain = random.uniform(-1, 1, 3)
    if not (augmentation.hue or augmentation.saturation or augmentation.value):
        return None
    angle = 2 * math.pi * augmentation.hue * turn
    third = 1 / math.sqrt(3)
    cross = third * np.array(((0, -1, 1), (1, 0, -1), (-1, 1, 0)))
    hue = math.cos(angle) * np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) / 3
    kept = 1 + augmentation.saturation * purity
    saturation = kept * np.eye(3) + (1 - kept) * np.tile(_LUMA, (3, 1))
    return ((1 + augmentation.value * gain) * saturation @ hue).astype(np.float32)
