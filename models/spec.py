"""What a model file says of itself: the `streamd.json` inside the TorchScript artifact."""

from __future__ import annotations

from typing import Literal

import msgspec

from streamd.messages import Letterbox


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


class ResizeRule(_Record, frozen=True, kw_only=True):
    """How a frame is placed into the network's input. The scale is min(input / source) over both sides,
    the scaled size is truncated to whole pixels, the interpolation is bilinear with half-pixel centres."""

    kind: Literal["letterbox"] = "letterbox"
    anchor: Literal["top_left", "center"] = "top_left"
    pad: float = 114.0  # value of the padding, 0..255, before normalisation


class NmsRule(_Record, frozen=True, kw_only=True):
    """Defaults of the suppression; the daemon's configuration may override the thresholds."""

    score_threshold: float = 0.3
    iou_threshold: float = 0.45
    max_detections: int = 100
    multi_label: bool = False  # False: only the best class of each candidate counts


class MaskRule(_Record, frozen=True, kw_only=True):
    kind: Literal["prototype"] = "prototype"
    threshold: float = 0.5  # of the mask's probability


class ModelSpec(_Record, frozen=True, kw_only=True):
    """Everything that is needed before and after `forward`."""

    schema: int = 1
    name: str
    task: Literal["detect", "segment"]
    labels: tuple[str, ...]
    input_size: tuple[int, int]  # height, width in pixels
    colour: Literal["bgr", "rgb"]
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)  # in the order of `colour`, 0..255; image = (pixel - mean) / std
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    resize: ResizeRule = ResizeRule()
    nms: NmsRule = NmsRule()
    masks: MaskRule | None = None
    weights_sha256: str = ""  # of the checkpoint that the artifact was made from
    licence: str = ""
    metrics: dict[str, float] = {}

    def letterbox(self, width: int, height: int) -> Letterbox:
        """Say where a source of `width` x `height` pixels lands in the network's input."""
        input_height, input_width = self.input_size
        scale = min(input_height / height, input_width / width)
        scaled_width, scaled_height = max(1, int(width * scale)), max(1, int(height * scale))
        centred = self.resize.anchor == "center"
        return Letterbox(
            scale_x=scale,
            scale_y=scale,
            left=(input_width - scaled_width) // 2 if centred else 0,
            top=(input_height - scaled_height) // 2 if centred else 0,
            width=scaled_width,
            height=scaled_height,
        )
