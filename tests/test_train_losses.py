"""The losses of every family: that they can be learnt, and what they make of odd batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from streamd.train import losses
from streamd.train.losses.config import LossConfig, YoloxLossConfig
from streamd.train.losses.matching import match
from streamd.train.targets import Targets, TrainBatch
from tests.small_networks import INPUT_SIZE, NETWORKS, batch_of, make, picture, some_batch

# Everything that is drawn by chance is taken whole, so that results may be compared.
EVERYTHING = replace(
    LossConfig(),
    rpn=replace(LossConfig().rpn, num_samples=10**6, post_nms_top_k=100),
    roi_heads=replace(LossConfig().roi_heads, num_samples=10**6),
)
# So little of it that a step takes no time.
FEW = replace(
    LossConfig(),
    rpn=replace(LossConfig().rpn, post_nms_top_k=40),
    roi_heads=replace(LossConfig().roi_heads, num_samples=32),
)
_TWO_STAGES = {"rpn_objectness", "rpn_box", "class", "box"}
LOSSES = {
    "yolox": {"box", "objectness", "class"},
    "yolox_masks": {"box", "objectness", "class", "mask"},
    "faster_rcnn": _TWO_STAGES,
    "faster_rcnn_sigmoid": _TWO_STAGES,
    "mask_rcnn": _TWO_STAGES | {"mask"},
    "mask_rcnn_c4": _TWO_STAGES | {"mask"},
    "cascade_mask_rcnn": {"rpn_objectness", "rpn_box", "mask"}
    | {f"{kind}_{stage}" for kind in ("class", "box") for stage in range(3)},
    "keypoint_rcnn": _TWO_STAGES | {"keypoint"},
    "panoptic_fpn": _TWO_STAGES | {"mask", "semantic"},
    "retinanet": {"class", "box"},
    "fcos": {"class", "box", "centreness"},
    "ssd": {"class", "box"},
    "semantic_fpn": {"semantic"},
    "deeplab": {"semantic"},
}
every_family = pytest.mark.parametrize("name", NETWORKS)


def total(found: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(found.values())).sum()


def gradients(network: nn.Module, batch: TrainBatch, config: LossConfig = EVERYTHING) -> dict[str, Tensor]:
    network.zero_grad(set_to_none=True)
    total(losses.compute(network, batch, config, seeds=range(len(batch.targets)))).backward()
    return {name: x.grad.clone() for name, x in network.named_parameters() if x.grad is not None}


def part(batch: TrainBatch, rows: list[int]) -> TrainBatch:
    return TrainBatch(batch.images[rows], batch.sizes[rows], tuple(batch.targets[row] for row in rows))


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-4) -> None:
    """Compare by the largest value of each tensor; those of rounding errors alone by the largest of all."""
    assert found.keys() == expected.keys()
    rounding = 1e-6 * max(float(x.abs().max()) for x in expected.values())
    for name, value in expected.items():
        assert float((found[name] - value).abs().max()) <= tolerance * float(value.abs().max()) + rounding, name


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "deeplab"])  # large, and with nothing new
def test_one_picture_is_learnt(name: str) -> None:
    network = make(name).train()
    batch = batch_of(picture([(8, 10, 40, 50), (50, 6, 80, 36)], [0, 1]))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    history = []
    for step in range(25):
        torch.manual_seed(step)
        found = losses.compute(network, batch, FEW)
        assert set(found) == LOSSES[name]
        optimizer.zero_grad()
        total(found).backward()
        optimizer.step()
        history.append(float(total(found).detach()))
    # Of several steps, since a cell that is newly assigned to an object begins with a large loss.
    assert min(history[-5:]) < 0.65 * history[0]


def without_objects() -> tuple[Tensor, Targets]:
    return picture([], [])


def crowd_alone() -> tuple[Tensor, Targets]:
    """Return a picture with nothing but a crowd, which reaches beyond it as anchors do."""
    image, targets = picture([], [])
    return image, replace(targets, crowds=torch.tensor([[-500.0, -500.0, 600.0, 600.0]]))


def of_one_pixel() -> tuple[Tensor, Targets]:
    return picture([(11, 17, 12, 18), (90, 60, 91, 61)], [0, 2])


def more_objects_than_anchors() -> tuple[Tensor, Targets]:
    corners = 60 * torch.rand(250, 2, generator=torch.Generator().manual_seed(2))
    return picture(torch.cat((corners, corners + 4), dim=1).tolist(), [0] * 250)


def without_masks_and_points() -> tuple[Tensor, Targets]:
    image, targets = picture([(8, 10, 40, 50)], [1])
    return image, replace(targets, masks=None, keypoints=None, semantic=None)


def with_unmarked_points() -> tuple[Tensor, Targets]:
    image, targets = picture([(8, 10, 40, 50)], [1])
    assert targets.keypoints is not None
    return image, replace(targets, keypoints=torch.zeros_like(targets.keypoints))


ODD = (
    without_objects,
    crowd_alone,
    of_one_pixel,
    more_objects_than_anchors,
    without_masks_and_points,
    with_unmarked_points,
)


@every_family
def test_odd_pictures_give_finite_losses_and_a_gradient_for_every_parameter(name: str) -> None:
    network = make(name).eval()
    for odd in (batch_of(one()) for one in ODD):
        found = losses.compute(network, odd, FEW)
        assert set(found) == LOSSES[name]
        network.zero_grad(set_to_none=True)
        total(found).backward()
        assert all(torch.isfinite(value) for value in found.values()), odd
        for key, parameter in network.named_parameters():
            assert parameter.grad is not None, key  # or DistributedDataParallel would wait for it
            assert torch.isfinite(parameter.grad).all(), key


@every_family
def test_every_parameter_learns_from_pictures_with_objects(name: str) -> None:
    network = make(name).eval()
    found = gradients(network, some_batch(), FEW)
    assert [key for key, _ in network.named_parameters() if key not in found or not found[key].any()] == []


@every_family
def test_two_halves_give_the_gradients_of_the_whole(name: str) -> None:
    network = make(name).eval()
    batch = some_batch()
    batch = replace(batch, targets=(*batch.targets[:3], replace(batch.targets[3], masks=None, keypoints=None)))
    halves = [gradients(network, part(batch, rows)) for rows in ([0, 1], [2, 3])]
    mean = {key: 0.5 * (halves[0][key] + halves[1][key]) for key in halves[0]}
    assert_close(mean, gradients(network, batch))


@pytest.mark.parametrize("name", ["yolox_masks", "mask_rcnn"])
def test_samples_are_drawn_for_a_batch_as_for_its_halves(name: str) -> None:
    network, batch = make(name).eval(), some_batch()
    config = replace(
        FEW,
        rpn=replace(FEW.rpn, num_samples=24),
        roi_heads=replace(FEW.roi_heads, num_samples=6),
        yolox=YoloxLossConfig(max_masks=2),
    )
    torch.manual_seed(3)
    whole = losses.compute(network, batch, config)
    torch.manual_seed(3)
    halves = [losses.compute(network, part(batch, rows), config) for rows in ([0, 1], [2, 3])]
    other = losses.compute(network, batch, config)
    for key, value in whole.items():
        torch.testing.assert_close(0.5 * (halves[0][key] + halves[1][key]), value, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(whole[key], other[key]) for key in whole)


@every_family
def test_the_order_of_images_does_not_matter(name: str) -> None:
    network, batch = make(name).eval(), some_batch()
    expected = losses.compute(network, batch, EVERYTHING)
    found = losses.compute(network, part(batch, [2, 0, 3, 1]), EVERYTHING)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)


@every_family
def test_bfloat16_gives_nearly_the_losses_of_float32(name: str) -> None:
    network, batch = make(name).eval(), some_batch()
    expected = total(losses.compute(network, batch, EVERYTHING))
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.compute(network, batch, EVERYTHING)
    assert all(value.dtype == torch.float32 for value in found.values())
    torch.testing.assert_close(total(found), expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in ("semantic_fpn", "deeplab")])
def test_a_crowd_teaches_neither_object_nor_background(name: str) -> None:
    network = make(name).eval()
    found = losses.compute(network, batch_of(crowd_alone()), EVERYTHING)
    assert [key for key, value in found.items() if value != 0 and key != "semantic"] == []
    if name != "ssd":  # which compares as much background as there are anchors of objects
        assert any(value > 0 for value in losses.compute(network, batch_of(without_objects())).values())


def test_the_whole_batch_can_be_divided_by_its_own_count() -> None:
    network = make("retinanet").eval()
    batch = batch_of(without_objects(), picture([(8, 10, 40, 50), (50, 6, 70, 30)], [0, 1]))
    each = [losses.compute(network, part(batch, [row])) for row in range(2)]
    num_positive = num_positive_anchors(network, batch.targets[1])
    found = losses.compute(network, batch, LossConfig(normalization="batch"))
    for key, value in found.items():
        torch.testing.assert_close(value, each[0][key] / num_positive + each[1][key])
        torch.testing.assert_close(losses.compute(network, batch)[key], 0.5 * (each[0][key] + each[1][key]))
    assert num_positive > 1


def num_positive_anchors(network: Any, targets: Targets) -> int:
    images = torch.zeros(1, 3, *INPUT_SIZE)
    anchors = torch.cat(network.config.anchors(network.features(images), images))
    return int((match(anchors, targets, (0.4, 0.5), every_object=True) >= 0).sum())


def test_the_module_returns_what_the_function_does() -> None:
    network, batch = make("faster_rcnn").eval(), some_batch()
    module = losses.Training(network, FEW)
    found = module(batch.images, batch.sizes, batch.targets, seeds=range(4))
    assert found == losses.compute(network, batch, FEW, seeds=range(4))
    assert all(name.startswith("network.") for name in module.state_dict())


def test_each_stage_of_a_cascade_matches_what_the_one_before_moved() -> None:
    network, batch = make("cascade_mask_rcnn").eval(), some_batch()
    stages = network.get_submodule("roi_heads").stages()  # type: ignore[operator]
    for head, predictor in stages:  # all say the same
        head.load_state_dict(stages[0][0].state_dict())
        predictor.load_state_dict(stages[0][1].state_dict())
        torch.nn.init.zeros_(predictor.bbox_pred.weight)

    def train(*thresholds: float) -> dict[str, Tensor]:
        heads = replace(EVERYTHING.roi_heads, iou_thresholds=thresholds)
        return losses.compute(network, batch, replace(EVERYTHING, roi_heads=heads))

    same = train(0.5, 0.5)
    torch.testing.assert_close(same["class_1"], same["class_0"])
    torch.testing.assert_close(same["class_2"], same["class_0"])
    stricter = train(0.5, 0.5, 0.9)
    assert stricter["class_1"] == same["class_1"]
    assert abs(float((stricter["class_2"] - same["class_2"]).detach())) > 1e-6
    with torch.no_grad():  # a quarter to the right, by the weight of the deltas
        stages[0][1].bbox_pred.bias[0] = 0.25 * stages[0][1].box_weights[0]
    moved = train(0.5, 0.5)
    assert moved["class_0"] == same["class_0"]
    assert moved["box_2"] > 1.2 * same["box_2"]


def test_a_compiled_module_gives_the_same_losses() -> None:
    batch = some_batch()
    module = losses.Training(make("ssd").train())
    expected = module(batch.images, batch.sizes, batch.targets)
    module.compile(dynamic=False, backend="eager")
    for key, value in module(batch.images, batch.sizes, batch.targets).items():
        torch.testing.assert_close(value, expected[key])
