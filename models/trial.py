"""Try a model out: the inputs, and one run of everything that it has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamd.errors import ModelError
from streamd.models.contract import check_method, check_output, pack
from streamd.models.spec import ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """What a model is tried with; the same at each call."""

    images: Tensor  # [B,3,H,W], normalised
    sizes: Tensor | None  # [B,2], for a sized model
    boxes: Tensor  # [B,N,4] in input pixels; the last of each image is padding, a zero box
    labels: Tensor  # [B,N]

    @classmethod
    def blank(cls, spec: ModelSpec, device: torch.device | str, dtype: torch.dtype) -> Inputs:
        """Make one empty image."""
        height, width = spec.input_size
        return cls(
            images=torch.zeros(1, 3, height, width, dtype=dtype, device=device),
            sizes=torch.tensor([[height, width]], dtype=torch.float32, device=device) if spec.sized else None,
            boxes=torch.tensor([[[0, 0, width, height], [0, 0, 0, 0]]], dtype=torch.float32, device=device),
            labels=torch.zeros(1, 2, dtype=torch.int64, device=device),
        )

    @classmethod
    def noise(cls, spec: ModelSpec, num_images: int, num_boxes: int) -> Inputs:
        """Make images of noise, normalised as `spec` says; of a sized model they are partly padding."""
        random = torch.Generator().manual_seed(0)
        limit = torch.tensor(spec.input_size, dtype=torch.float32)
        pixels = torch.rand(num_images, 3, *spec.input_size, generator=random) * 255
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (spec.mean, spec.std))
        corners = torch.rand(num_images, num_boxes, 2, 2, generator=random) * limit.flip(0)
        boxes = torch.cat((corners.amin(2), corners.amax(2)), dim=-1)
        boxes[:, -1] = 0
        return cls(
            images=(pixels - mean) / std,
            sizes=(torch.rand(num_images, 2, generator=random) / 2 + 0.5).mul(limit).ceil() if spec.sized else None,
            boxes=boxes,
            labels=torch.randint(len(spec.labels), (num_images, num_boxes), generator=random),
        )

    @property
    def forward(self) -> tuple[Tensor, ...]:
        """The arguments of `forward`."""
        return (self.images,) if self.sizes is None else (self.images, self.sizes)

    def of_methods(self, spec: ModelSpec, output: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
        """Return the arguments of each method, of what `forward` gave."""
        features = list(pack(output).features)
        return {
            name: (features, self.boxes, self.labels) if name == "masks" else (features, self.boxes)
            for name in spec.methods
        }


def run(model: nn.Module, inputs: Inputs, spec: ModelSpec, path: Path) -> dict[str, Tensor]:
    """Run `forward` and then each method, whose result stands under its name.

    Raises ModelError where one is missing or gives what `spec` does not promise, and what the model itself raises.
    """
    output = model(*inputs.forward)
    check_output(output, spec, len(inputs.images), path)
    results = dict(output)
    for name, arguments in inputs.of_methods(spec, output).items():
        method = getattr(model, name, None)
        if method is None:
            raise ModelError(f"{path}: the network has no method {name}, which its spec promises")
        results[name] = method(*arguments)
        check_method(name, results[name], inputs.boxes, spec, path)
    return results
