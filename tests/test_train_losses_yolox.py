"""YOLOX's assignment against the steps of its paper one by one, and its losses at other sizes and with crowds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from streamd.models.yolox import YOLOX, cell_grid
from streamd.train import losses
from streamd.train.losses.boxes import iou
from streamd.train.losses.config import LossConfig, YoloxLossConfig
from streamd.train.losses.prototype_masks import prototype_mask_losses
from streamd.train.losses.simota import Cells, assign
from streamd.train.targets import Targets, TrainBatch
from tests.small_networks import INPUT_SIZE, NUM_CLASSES, batch_of, make, picture

NUMBERS = YoloxLossConfig()


def cells(size: tuple[int, int] = INPUT_SIZE) -> Cells:
    grid, strides = cell_grid(size)
    return Cells(grid, (grid + 0.5) * strides, strides)


def guesses(seed: int, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Make up what a half-trained network says: boxes that are somewhat like those of near objects, and logits."""
    random = torch.Generator().manual_seed(seed)
    where = cells()
    objects = torch.cdist(where.centres, 0.5 * (boxes[:, :2] + boxes[:, 2:])).argmin(1)
    found = boxes[objects] + 3 * torch.randn(len(objects), 4, generator=random)
    objectness, classes = (2 * torch.randn(len(objects), size, generator=random) for size in (1, NUM_CLASSES))
    return found, objectness, classes


def assign_slowly(boxes: Tensor, objectness: Tensor, classes: Tensor, where: Cells, targets: Targets) -> dict[int, int]:
    """Follow the paper object by object and cell by cell: {cell: object}."""
    overlaps = box_iou(targets.boxes, boxes)
    prices: list[dict[int, float]] = []
    for n, box in enumerate(targets.boxes):
        centre = 0.5 * (box[:2] + box[2:])
        reach = NUMBERS.centre_radius * where.strides[:, 0]
        near = ((where.centres - centre).abs().amax(1) < reach).nonzero()[:, 0].tolist()
        expected = F.one_hot(targets.labels[n], NUM_CLASSES).float()
        prices.append({})
        for k in near:
            scores = (classes[k].sigmoid() * objectness[k].sigmoid()).sqrt()
            of_class = F.binary_cross_entropy(scores, expected, reduction="sum")
            prices[n][k] = float(of_class) - NUMBERS.iou_cost * math.log(float(overlaps[n, k]) + 1e-8)
    candidates = sorted({k for price in prices for k in price})
    owner: dict[int, tuple[float, int]] = {}
    for n, price in enumerate(prices):
        best = sorted((float(overlaps[n, k]) for k in candidates), reverse=True)[: NUMBERS.num_candidates]
        for k in sorted(price, key=price.__getitem__)[: max(1, int(sum(best)))]:
            owner[k] = min(owner.get(k, (math.inf, -1)), (price[k], n))
    return {k: n for k, (_, n) in owner.items()}


@pytest.mark.parametrize("seed", range(6))
def test_cells_are_assigned_as_the_paper_says(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    corners = torch.rand(7, 2, generator=random) * torch.tensor([70.0, 40.0])
    boxes = torch.cat((corners, corners + 4 + 20 * torch.rand(7, 2, generator=random)), dim=1)
    targets = Targets(boxes, torch.randint(NUM_CLASSES, (7,), generator=random), torch.zeros(0, 4))
    guess = guesses(seed, boxes)
    found = assign(*guess, cells(), targets, NUMBERS)
    pairs = dict(zip(found.cells.tolist(), found.objects.tolist(), strict=True))
    assert pairs == assign_slowly(*guess, cells(), targets)
    assert len(pairs) == len(found.cells) > 7
    torch.testing.assert_close(found.ious, iou(guess[0][found.cells], boxes[found.objects]))


def test_no_object_gets_no_cell() -> None:
    targets = picture([], [])[1]
    found = assign(*guesses(0, torch.tensor([[0.0, 0.0, 9.0, 9.0]])), cells(), targets, NUMBERS)
    assert [len(part) for part in found] == [0, 0, 0]


def test_images_of_another_size_than_the_networks_give_the_same_losses() -> None:
    built_small, built_large = (
        make("yolox_masks").eval(),
        YOLOX(8, 1, num_classes=NUM_CLASSES, num_prototypes=8, input_size=(128, 160)),
    )
    built_large.load_state_dict(built_small.state_dict())
    batch = batch_of(picture([(8, 10, 40, 50)], [1]))
    expected = losses.compute(built_small, batch, seeds=[0])
    found = losses.compute(built_large.eval(), batch, seeds=[0])
    torch.testing.assert_close(found, expected)
    odd = TrainBatch(batch.images[..., :48], batch.sizes, batch.targets)
    with pytest.raises(ValueError, match="64 x 48 pixels, want multiples of 32"):
        losses.compute(built_small, odd)


def test_what_is_learnt_is_what_forward_decodes() -> None:
    """Boxes of `forward` that fit perfectly have no loss, and the L1 of the raw values none either."""
    network = make("yolox").eval()
    image, targets = picture([(8, 10, 40, 50)], [1])
    with torch.no_grad():
        for level in network.get_submodule("head.reg_preds").children():
            torch.nn.init.zeros_(level.get_parameter("weight"))
    where = cells()
    output = network(image[None])["boxes"][0]
    k = int(((where.centres - torch.tensor([24.0, 30.0])).abs().sum(1) + where.strides[:, 0]).argmin())
    own = replace(targets, boxes=output[k][None].detach())
    config = LossConfig(yolox=YoloxLossConfig(l1_weight=1.0, num_candidates=1, min_cells=1))
    found = losses.compute(network, batch_of((image, own)), config)
    assert float(found["box"].detach()) < 1e-5
    assert float(found["l1"].detach()) < 1e-5
    moved = replace(own, boxes=own.boxes + 1)
    assert float(losses.compute(network, batch_of((image, moved)), config)["l1"].detach()) > 0.05


def test_cells_of_a_crowd_are_free_and_those_of_objects_in_it_are_not() -> None:
    network = make("yolox").eval()
    config = LossConfig(yolox=YoloxLossConfig(min_cells=1))
    image, targets = picture([(8, 10, 40, 50)], [1])
    plain = losses.compute(network, batch_of((image, targets)), config)
    half = replace(targets, crowds=torch.tensor([[0.0, 0.0, 48.0, 64.0]]))
    found = losses.compute(network, batch_of((image, half)), config)
    assert found["box"] == plain["box"]
    assert found["class"] == plain["class"]
    ratio = float((found["objectness"] / plain["objectness"]).detach())
    assert 0.4 < ratio < 0.95


def test_masks_are_compared_within_their_boxes() -> None:
    random = torch.Generator().manual_seed(0)
    prototypes = torch.randn(4, 16, 24, generator=random)
    coefficients = torch.randn(5, 4, generator=random)
    objects = torch.tensor([2, 0, 1, 0, 0])
    masks = torch.rand(3, 64, 96, generator=random) > 0.5
    boxes = torch.tensor([[8.0, 10.0, 40.0, 50.0], [0.0, 0.0, 96.0, 64.0], [33.0, 21.0, 34.0, 22.0]])
    found = prototype_mask_losses(prototypes, coefficients, objects, masks, boxes)
    windows = [(slice(2, 13), slice(2, 10)), (slice(0, 16), slice(0, 24)), (slice(5, 6), slice(8, 9))]
    for i, n in enumerate(objects.tolist()):
        rows, columns = windows[n]
        logits = (coefficients[i, :, None, None] * prototypes).sum(0)[rows, columns]
        expected = masks[n].float().reshape(16, 4, 24, 4).mean((1, 3))[rows, columns]
        torch.testing.assert_close(found[i], F.binary_cross_entropy_with_logits(logits, expected))
