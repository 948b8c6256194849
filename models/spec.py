"""What a model file says of itself: the `streamd.json` inside the TorchScript artifact."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

from streamd.messages import Letterbox

Task = Literal["detect", "segment", "keypoints", "panoptic", "semantic", "densepose"]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ResizeRule(_Record, frozen=True, kw_only=True):
    """How a frame is placed into the network's input, and scaled: bilinearly with half-pixel centres.

    - letterbox: scale = min(input / source) over both sides; the scaled size is truncated to whole pixels
    - shortest_edge: scale = min(min_size / shorter side, max_size / longer side), and smaller where that would not fit
      into the input; the scaled size is rounded, as Detectron2's ResizeShortestEdge does
    - stretch: the frame fills the input, whatever its shape

    `antialias`: where a frame shrinks by n, each pixel is made of all that lie within n of it, weighted by a triangle,
    as PIL and torchvision.transforms do. Without it only the four nearest count, as with OpenCV and F.interpolate.
    A model wants what it was trained with.
    """

    kind: Literal["letterbox", "shortest_edge", "stretch"] = "letterbox"
    anchor: Literal["top_left", "center"] = "top_left"
    pad: float | None = 114.0  # value of the padding, 0..255, before normalisation; None: the mean, so 0 after it
    min_size: int = 0  # pixels, for shortest_edge alone
    max_size: int = 0
    antialias: bool = False


class NmsRule(_Record, frozen=True, kw_only=True):
    """Defaults of the suppression; the daemon's configuration may override the thresholds."""

    score_threshold: float = 0.3  # a score takes part if it is >= this; see `just_above`
    iou_threshold: float = 0.45
    max_detections: int = 100
    multi_label: bool = False  # False: only the best class of each candidate counts; unused where `labels` are given


class MaskRule(_Record, frozen=True, kw_only=True):
    """Where the masks come from.

    - prototype: `forward` gives `prototypes` and `coefficients`
    - box: the method `masks` gives one square of probabilities for each kept box, which is pasted over it
    """

    kind: Literal["prototype", "box"] = "prototype"
    threshold: float = 0.5  # of the mask's probability


class KeypointRule(_Record, frozen=True, kw_only=True):
    """What the heat maps of the method `keypoints` stand for."""

    names: tuple[str, ...]  # J


class DensePoseRule(_Record, frozen=True, kw_only=True):
    """What the maps of the method `densepose` stand for, in this order of their channels.

    `num_coarse` scores, of the background first; then, each with the background first and one channel a part, the
    parts' scores, U, V. What is neither the background by the coarse scores nor by the others belongs to a part.
    """

    num_parts: int = 24
    num_coarse: int = 2
    up_scale: int = 2  # by which the maps are enlarged, bilinearly, before they are laid over the box

    @property
    def num_channels(self) -> int:
        return self.num_coarse + 3 * (self.num_parts + 1)


class PanopticRule(_Record, frozen=True, kw_only=True):
    """How masks and `semantic` become segments that do not overlap, as Detectron2's PanopticFPN joins them."""

    stuff_labels: tuple[str, ...]  # of `semantic`'s channels; channel 0 stands for all things and gives no segment
    score_threshold: float = 0.5  # objects with lower scores become no segment
    overlap_threshold: float = 0.5  # nor do those of which better ones cover more than this part
    stuff_area_limit: int = 4096  # source pixels; smaller regions of a stuff label are left out


class Blueprint(_Record, frozen=True, kw_only=True):
    """How the network was built, so that training can build it again (`streamd.models.rebuild`)."""

    kind: Literal["yolox", "detectron2", "vitdet", "torchvision"]
    variant: str = ""  # the name of the builder, of yolox and torchvision
    numbers: dict[str, Any] = {}  # its arguments; Detectron2's configuration; the description of a ViTDet


class ModelSpec(_Record, frozen=True, kw_only=True):
    """Everything that is needed before and after `forward`."""

    schema: int = 1
    name: str
    task: Task
    labels: tuple[str, ...]  # of the objects; for the task semantic of the pixels: `semantic`'s channels
    input_size: tuple[int, int]  # height, width in pixels
    size_multiple: int = 1  # both sides of input_size must be multiples of this
    sized: bool = False  # `forward` takes (images, sizes [B,2] float32: height, width of each picture in its padding)
    colour: Literal["bgr", "rgb"]
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # in the order of `colour`, 0..255; image = (pixel - mean) / std
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: ResizeRule = ResizeRule()
    nms: NmsRule = NmsRule()
    masks: MaskRule | None = None
    keypoints: KeypointRule | None = None
    densepose: DensePoseRule | None = None
    panoptic: PanopticRule | None = None
    weights_sha256: str = ""  # of the checkpoint that the artifact was made from
    licence: str = ""
    metrics: dict[str, float] = {}
    blueprint: Blueprint | None = None  # None: it cannot be trained

    @property
    def padding(self) -> tuple[float, float, float]:
        """The value of the padding before normalisation, 0..255, in the order of `colour`."""
        return self.mean if self.resize.pad is None else (self.resize.pad,) * 3

    @property
    def semantic_labels(self) -> tuple[str, ...]:
        """The labels of `semantic`'s channels; empty where `forward` gives none."""
        if self.panoptic:
            return self.panoptic.stuff_labels
        return self.labels if self.task == "semantic" else ()

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that the artifact has beside `forward`."""
        has = {
            "masks": self.masks is not None and self.masks.kind == "box",
            "keypoints": self.keypoints is not None,
            "densepose": self.densepose is not None,
        }
        return tuple(name for name, is_there in has.items() if is_there)

    def letterbox(self, width: int, height: int) -> Letterbox:
        """Say where a source of `width` x `height` pixels lands in the network's input."""
        input_height, input_width = self.input_size
        if self.resize.kind == "stretch":
            scaled_height, scaled_width = self.input_size
            scale_x, scale_y = scaled_width / width, scaled_height / height
        elif self.resize.kind == "shortest_edge":
            scaled_height, scaled_width = self._shortest_edge(height, width)
            scale_x, scale_y = scaled_width / width, scaled_height / height
        else:
            scale_x = scale_y = min(input_height / height, input_width / width)
            scaled_width, scaled_height = max(1, int(width * scale_x)), max(1, int(height * scale_y))
        centred = self.resize.anchor == "center"
        return Letterbox(
            scale_x=scale_x,
            scale_y=scale_y,
            left=(input_width - scaled_width) // 2 if centred else 0,
            top=(input_height - scaled_height) // 2 if centred else 0,
            width=scaled_width,
            height=scaled_height,
        )

    def _shortest_edge(self, height: int, width: int) -> tuple[int, int]:
        """Return the scaled (height, width), in the steps of Detectron2, which decide what a half is rounded to."""
        scale = self.resize.min_size / min(height, width)
        # Not height * scale for the shorter side: the product may miss min_size by a bit.
        shorter = float(self.resize.min_size)
        scaled = (shorter, scale * width) if height < width else (scale * height, shorter)
        if max(scaled) > self.resize.max_size:
            scaled = _times(scaled, self.resize.max_size / max(scaled))
        rounded = [int(side + 0.5) for side in scaled]
        if any(side > limit for side, limit in zip(rounded, self.input_size, strict=True)):
            fit = min(limit / side for side, limit in zip(scaled, self.input_size, strict=True))
            rounded = [int(side + 0.5) for side in _times(scaled, fit)]
        return max(1, rounded[0]), max(1, rounded[1])


def just_above(threshold: float) -> float:
    """Return the least float32 above `threshold`, so that `score >= just_above(t)` says what `score > t` says.

    As where torch compares: `threshold` is rounded to float32 first.
    """
    return float(np.nextafter(np.float32(threshold), np.float32(np.inf)))


def _times(sides: tuple[float, float], factor: float) -> tuple[float, float]:
    return sides[0] * factor, sides[1] * factor
