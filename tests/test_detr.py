"""The wrapper of DETR's kind around a network that a test makes up; tests/test_importers_hf.py has the real ones."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from streamd.errors import ModelError
from streamd.models import artifact
from streamd.models.detr import Detr
from streamd.models.importers import hf
from streamd.models.spec import ModelSpec, NmsRule, ResizeRule


class TwoQueries(nn.Module):
    """Say the same of each image: two boxes, and logits of three classes."""

    def forward(self, pixel_values: Tensor) -> Any:
        boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5]]]).expand(len(pixel_values), -1, -1)
        logits = torch.tensor([[[2.0, -9.0, 1.0], [-9.0, 0.0, -9.0]]]).expand(len(pixel_values), -1, -1)
        return SimpleNamespace(pred_boxes=boxes, logits=logits)


class OfOneType(nn.Module):
    """Do what a trace would tie to float32: conversions to the type of a tensor, and operators of one type."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 16, 16)
        self.predict = nn.Linear(8, 4 + 2)
        self.grid = (torch.arange(12.0).reshape(1, 2, 3, 2) / 12 - 0.5).tolist()

    def forward(self, pixel_values: Tensor) -> Any:
        x = self.conv(pixel_values.float())
        x = x * torch.ones_like(x, dtype=torch.int64).to(x.dtype)
        grid = torch.tensor(self.grid).expand(x.shape[0], -1, -1, -1)
        sampled = F.grid_sample(x, grid, align_corners=False).flatten(2).transpose(1, 2)
        found = self.predict(sampled + torch.linspace(0, 1, 8)).float()
        return SimpleNamespace(pred_boxes=found[..., :4].sigmoid(), logits=found[..., 4:])


def test_the_best_pairs_of_all_queries_are_given_with_corners_in_pixels() -> None:
    output = Detr(TwoQueries(), (100, 200))(torch.zeros(3, 3, 100, 200))
    assert output["labels"].tolist() == [[0, 2]] * 3
    torch.testing.assert_close(output["scores"], torch.tensor([[2.0, 1.0]] * 3).sigmoid())
    corners = torch.tensor([80.0, 30.0, 120.0, 70.0]).expand(3, 2, 4)  # both pairs are of the first query
    torch.testing.assert_close(output["boxes"], corners)


def test_a_network_that_reads_its_own_type_is_exported_for_other_types_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Detr(OfOneType(), (64, 96)).eval()
    spec = ModelSpec(
        name="small",
        task="detect",
        labels=("a", "b"),
        input_size=(64, 96),
        colour="rgb",
        std=(255.0, 255.0, 255.0),
        resize=ResizeRule(kind="stretch"),
        nms=NmsRule(iou_threshold=1.0),
    )
    artifact.export(network, spec, tmp_path / "model.pt")
    images = torch.rand(3, 3, 64, 96)
    with torch.inference_mode():
        expected = network(images)
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)):
            module, _ = artifact.load(tmp_path / "model.pt", dtype=dtype)
            output = module(images.to(dtype))
            assert output["boxes"].dtype == torch.float32
            torch.testing.assert_close(output["scores"].float(), expected["scores"], atol=tolerance, rtol=0)


def test_a_machine_without_transformers_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # as Python marks what cannot be imported
    with pytest.raises(ModelError, match=r"transformers cannot be imported .*pip install 'streamd\[hf\]'"):
        hf.load("somebody/rt-detr")
