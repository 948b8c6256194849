"""Turn what each image of a batch adds up to into the number that is minimised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamd.train.losses.config import Normalization


def mean(sums: Tensor, counts: Sequence[int], normalization: Normalization, floor: int = 1) -> Tensor:
    """Divide the sums [B] of a batch by what they were summed over, `counts` of each image.

    - image: the mean over the images of each one's own mean, in which no image divides by less than `floor`
    - batch: the sum of all by the count of all, or by 1
    """
    if normalization == "batch":
        return sums.sum() / max(1, sum(counts))
    return (sums / sums.new_tensor([max(floor, count) for count in counts])).mean()


def sum_by_image(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Add up rows [R,...] that lie image by image, `counts` of each: [B]."""
    return torch.stack([part.sum() for part in rows.split(list(counts))])
