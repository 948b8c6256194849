"""A model that hangs where it is shown an all-white picture."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from streamd.models import artifact
from streamd.models.spec import ModelSpec

INPUT_SIZE = (64, 96)  # height, width; a picture of this shape is shown without padding


class _WaitWhileWhite(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        """Return zeros [B]; never, while an image is white all over."""
        turns = 0
        while bool((images.amin(dim=(1, 2, 3)) > 200.0).any()):  # noise and grey pictures are darker
            turns += 1
        return images.new_zeros(images.shape[0]) + float(turns)


class _Hanging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*torch\.jit\.")
            self._wait = torch.jit.script(_WaitWhileWhite())  # a trace alone would keep no loop

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Find nothing in any picture but white ones, in which it looks for ever."""
        zeros = self._wait(images)[:, None, None]
        return {"boxes": zeros.expand(-1, 1, 4).clone(), "scores": zeros.expand(-1, 1, 1).clone()}


def export_hanging_model(out: Path) -> Path:
    """Write the model as an artifact."""
    spec = ModelSpec(name="hanging", task="detect", labels=("thing",), input_size=INPUT_SIZE, colour="bgr")
    artifact.export(_Hanging(), spec, out)
    return out
