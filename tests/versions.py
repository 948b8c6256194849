"""Versions of one small model, some of which get into trouble with certain pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from streamd.models import artifact
from streamd.models.spec import ModelSpec

LABELS = ("person", "dog")
SIZE = (48, 64)  # that of the clips: nothing is scaled
TROUBLE_FROM = 140  # luma of a clip's lower right corner, which is reached within its first 25 frames

Trouble = Literal["none", "nan", "raises"]


class Squares(nn.Module):
    """See a person and a dog at fixed places, `shift` pixels to the right; in trouble where the picture is bright.

    Only a bright and even corner is trouble, so that the noise of the exporter and the black of a warm-up are not.
    """

    boxes: Tensor
    scores: Tensor

    def __init__(self, trouble: Trouble = "none", shift: int = 0) -> None:
        super().__init__()
        self.trouble = trouble
        boxes = torch.tensor([[[10.0, 10, 20, 20], [34.0, 12, 46, 34]]])
        boxes[..., 0::2] += shift
        self.register_buffer("boxes", boxes)
        self.register_buffer("scores", torch.tensor([[[0.9, 0.1], [0.2, 0.8]]]))
        self.register_buffer("table", torch.zeros(1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        corner = images[:, :, -8:, -8:].flatten(1)
        is_bright = (corner.amin(1) > TROUBLE_FROM) & (corner.amax(1) - corner.amin(1) < 40)
        nothing = images[:, :1, 0, 0] * 0
        if self.trouble == "raises":
            nothing = nothing + self.get_buffer("table")[is_bright.long() * 9][:, None]  # there is no tenth
        if self.trouble == "nan":
            nothing = torch.where(is_bright[:, None], torch.nan, nothing)
        return {
            "boxes": self.boxes.expand(images.shape[0], -1, -1) + nothing[..., None],
            "scores": self.scores.expand(images.shape[0], -1, -1) + nothing[..., None],
        }


def write_version(path: Path, sha256: str, network: nn.Module | None = None, **changes: object) -> Path:
    """Export a version under a name of its own and with this sha256, as messages show it."""
    settings: dict[str, object] = {
        **{"name": path.stem, "task": "detect", "labels": LABELS, "input_size": SIZE, "colour": "bgr"},
        **{"weights_sha256": sha256, **changes},
    }
    artifact.export(network or Squares(), ModelSpec(**settings), path)  # type: ignore[arg-type]
    return path
