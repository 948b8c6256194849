"""SSD (arXiv:1512.02325) and SSDlite of torchvision, for batches of stretched pictures.

    images -> backbone -> head -> the best boxes of each class -> boxes, scores, labels

Attribute names are torchvision's, so that its checkpoints load as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD

from streamd.models.anchors import clip_boxes, decode_deltas
from streamd.models.layers import static_size


class Ssd(nn.Module):
    """Detect objects in images of one size, which they fill."""

    anchors: Tensor
    sizes: Tensor
    classes: Tensor

    def __init__(self, network: SSD, input_size: tuple[int, int]) -> None:
        """Take over a network of torchvision. `input_size` is (height, width)."""
        super().__init__()
        self.backbone = network.backbone
        self.head = network.head
        self.box_weights = tuple(network.box_coder.weights)
        self.num_candidates = network.topk_candidates  # of each class
        images = torch.zeros(1, 3, *input_size)
        was_training = network.training
        with torch.no_grad():
            maps = list(network.eval().backbone(images).values())
            (anchors,) = network.anchor_generator(ImageList(images, [input_size]), maps)
            num_outputs = network.head(maps)["cls_logits"].shape[-1]
        network.train(was_training)
        # Constants, so that a trace holds neither a batch size nor a device; not part of the state dict.
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("sizes", torch.tensor([input_size], dtype=torch.float32), persistent=False)
        self.register_buffer("classes", torch.arange(num_outputs - 1)[:, None], persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the best boxes of each class: boxes [B,K,4] in input pixels, scores [B,K], labels [B,K].

        `images` is [B,3,H,W]. torchvision's class 0, the background, is left out.
        """
        output = self.head(list(self.backbone(images).values()))
        boxes = clip_boxes(decode_deltas(output["bbox_regression"], self.anchors, self.box_weights), self.sizes)
        by_class = output["cls_logits"].float().softmax(-1)[..., 1:].transpose(1, 2)
        scores, index = by_class.topk(min(self.num_candidates, static_size(by_class)[1]), dim=-1)
        labels = self.classes.expand_as(index)
        rows = index.flatten(1)[..., None].expand(-1, -1, 4)
        return {"boxes": boxes.gather(1, rows), "scores": scores.flatten(1), "labels": labels.flatten(1)}
