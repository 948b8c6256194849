"""Detectors of the DETR kind from transformers: RT-DETR (arXiv:2407.17140), D-FINE (arXiv:2410.13842), RF-DETR.

    images -> the network of transformers -> queries: a box and logits each -> the best pairs of a box and a class

The network itself is wrapped, not rebuilt. Queries are trained not to say the same twice, so nothing is suppressed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Detr(nn.Module):
    """Detect objects in images of one size, to which frames are stretched."""

    def __init__(self, network: nn.Module, input_size: tuple[int, int]) -> None:
        """Wrap an object detection network of transformers; `input_size` is (height, width)."""
        super().__init__()
        self.network = network
        self.input_size = input_size

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the best pairs of a box and a class in images [B,3,H,W], as many as there are queries.

        `boxes` [B,K,4] are x1 y1 x2 y2 in input pixels, `scores` [B,K] in 0..1, `labels` [B,K].
        """
        boxes, logits = self.queries(images)
        num_queries, num_classes = logits.shape[1:]
        scores, pairs = logits.float().sigmoid().flatten(1).topk(num_queries, dim=1)
        query = torch.div(pairs, num_classes, rounding_mode="floor")
        best = self.corners(boxes).gather(1, query[..., None].expand(-1, -1, 4))
        return {"boxes": best, "scores": scores, "labels": pairs % num_classes}

    def corners(self, boxes: Tensor) -> Tensor:
        """Turn centres and sizes in parts of the image into corners in input pixels, float32."""
        height, width = self.input_size
        x, y, w, h = boxes.float().unbind(-1)
        corners = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
        return torch.stack(corners, dim=-1)

    def queries(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the network says: boxes [B,Q,4], centre and size in parts of the image, and logits [B,Q,C]."""
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            with _tracing(images):
                output = self.network(pixel_values=images)
        else:
            output = self.network(pixel_values=images)
        return output.pred_boxes, output.logits


@contextmanager
def _tracing(images: Tensor) -> Iterator[None]:
    """Let a trace of code that is not ours serve other types of weights, without a warning for each number it reads.

    Sizes become constants, as they may; that the batch stays free is tried out when an artifact is written.
    """
    with warnings.catch_warnings(), _FollowType(images):
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        yield


class _FollowType(TorchFunctionMode):
    """Have what is turned into float32, the type of the weights in a trace, be turned into that of the images instead.

    A trace would keep float32, also for weights of float16. Operators that need both operands of one type get that.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images = images

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.float or (func is Tensor.to and torch.float32 in (*args[1:], *kwargs.values())):
            return args[0].type_as(self.images)
        if func is F.linear:
            args = (*(operand.type_as(self.images) for operand in args[:2]), *args[2:])
        elif func is F.grid_sample:
            args = (args[0], args[1].type_as(args[0]), *args[2:])
        return func(*args, **kwargs)
