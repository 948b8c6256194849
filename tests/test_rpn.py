"""Proposals against a loop over images and levels, as Detectron2 writes it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

from streamd.models.anchors import AnchorGrid, decode_deltas
from streamd.models.rpn import ProposalGenerator, RpnConfig, RpnHead

ANCHORS = AnchorGrid(strides=(8, 16), sizes=((16.0,), (32.0,)), aspect_ratios=((0.5, 1.0, 2.0),))
CONFIG = RpnConfig(ANCHORS, in_features=("p3", "p4"), pre_nms_top_k=80, post_nms_top_k=40)
SIZES = torch.tensor([[64.0, 96.0], [50.0, 70.0], [64.0, 33.0]])


def random_features() -> tuple[dict[str, Tensor], Tensor]:
    """Make maps for images [3,3,64,96]."""
    random = torch.Generator().manual_seed(0)
    features = {
        "p3": torch.randn(3, 8, 8, 12, generator=random),
        "p4": torch.randn(3, 8, 4, 6, generator=random),
        "p5": torch.randn(3, 8, 2, 3, generator=random),
    }
    return features, torch.zeros(3, 3, 64, 96)


def generator(config: RpnConfig = CONFIG) -> ProposalGenerator:
    """Build a generator whose head moves and ranks the anchors at random."""
    torch.manual_seed(1)
    made = ProposalGenerator(8, config).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made


def propose_one_by_one(made: ProposalGenerator, features: dict[str, Tensor], sizes: Tensor) -> list[Tensor]:
    config = made.config
    maps = [features[name] for name in config.in_features]
    logits, deltas = made.rpn_head(maps)
    proposals = []
    for image, (height, width) in enumerate(sizes.tolist()):
        boxes, scores, levels = [], [], []
        for level, anchors in enumerate(config.anchors(maps)):
            best = logits[level][image].argsort(descending=True)[: config.pre_nms_top_k]
            boxes.append(decode_deltas(deltas[level][image][best], anchors[best], config.box_weights))
            scores.append(logits[level][image][best])
            levels.append(torch.full_like(best, level))
        found, score, level_of = torch.cat(boxes), torch.cat(scores), torch.cat(levels)
        found[:, 0::2] = found[:, 0::2].clamp(0, width)
        found[:, 1::2] = found[:, 1::2].clamp(0, height)
        large = ((found[:, 2:] - found[:, :2]) > config.min_size).all(1)
        found, score, level_of = found[large], score[large], level_of[large]
        keep = batched_nms(found, score, level_of, config.nms_threshold)[: config.post_nms_top_k]
        proposals.append(found[keep])
    return proposals


@pytest.mark.parametrize("nms_threshold", [0.7, 0.2])
@pytest.mark.parametrize("min_size", [0.0, 15.0])
@torch.inference_mode()
def test_proposals_equal_those_of_a_loop_over_images_and_levels(nms_threshold: float, min_size: float) -> None:
    made = generator(replace(CONFIG, nms_threshold=nms_threshold, min_size=min_size, box_weights=(1.0, 2.0, 1.5, 3.0)))
    features, images = random_features()
    proposals = made(features, images, SIZES)
    expected = propose_one_by_one(made, features, SIZES)
    for boxes, valid, wanted in zip(proposals.boxes, proposals.valid, expected, strict=True):
        torch.testing.assert_close(boxes[valid], wanted)
    assert len({len(wanted) for wanted in expected}) > 1 or min_size == 0  # else the padding would not be seen


@torch.inference_mode()
def test_missing_proposals_are_zero_boxes_at_the_end_that_are_not_valid() -> None:
    features, images = random_features()
    boxes, valid = generator(replace(CONFIG, nms_threshold=0.05))(features, images, SIZES)
    assert boxes.shape == (3, 40, 4)
    assert not valid.all()
    assert valid.any()
    assert (valid.int().diff() <= 0).all()
    assert (boxes[~valid] == 0).all()


@torch.inference_mode()
def test_proposals_come_with_the_logits_by_which_they_are_ranked() -> None:
    made = generator()
    features, images = random_features()
    proposals, ranked = made.propose(features, images, SIZES)
    logits, _ = made.rpn_head([features[name] for name in CONFIG.in_features])
    known = torch.cat([level.flatten() for level in logits])
    for own, valid in zip(ranked, proposals.valid, strict=True):
        assert (own[valid].diff() <= 0).all() and (own[~valid] == -torch.inf).all()
        assert torch.isin(own[valid], known).all()


@torch.inference_mode()
def test_there_are_no_more_rows_than_candidates() -> None:
    features, images = random_features()
    proposals = generator(replace(CONFIG, pre_nms_top_k=1000, post_nms_top_k=2000))(features, images, SIZES)
    assert proposals.boxes.shape == (3, 8 * 12 * 3 + 4 * 6 * 3, 4)


@torch.inference_mode()
def test_a_batch_of_three_equals_three_batches_of_one() -> None:
    made = generator()
    features, images = random_features()
    together = made(features, images, SIZES)
    for i in range(3):
        alone = made({name: x[i : i + 1] for name, x in features.items()}, images[i : i + 1], SIZES[i : i + 1])
        torch.testing.assert_close(alone.boxes[0], together.boxes[i], rtol=0, atol=1e-4)
        assert torch.equal(alone.valid[0], together.valid[i])


@torch.inference_mode()
def test_a_logit_that_is_not_finite_gives_no_proposal() -> None:
    made = generator()
    features, images = random_features()
    features["p3"][0, :, 3, 4] = torch.nan  # the 3x3 convolution spreads it over nine cells
    boxes, valid = made(features, images, SIZES)
    assert boxes.isfinite().all()
    assert valid[0].any()


@pytest.mark.parametrize(
    ("conv_dims", "names"),
    [
        ((-1,), ["conv.weight", "conv.bias"]),
        ((-1, 6), ["conv.conv0.weight", "conv.conv0.bias", "conv.conv1.weight", "conv.conv1.bias"]),
    ],
)
def test_parameters_are_named_as_in_detectron2(conv_dims: tuple[int, ...], names: list[str]) -> None:
    head = RpnHead(8, 3, conv_dims)
    predictors = [f"{layer}.{kind}" for layer in ("objectness_logits", "anchor_deltas") for kind in ("weight", "bias")]
    assert list(head.state_dict()) == names + predictors
    assert head.objectness_logits.in_channels == (8 if conv_dims[-1] == -1 else conv_dims[-1])


def test_the_head_lists_anchors_by_cell_and_then_by_shape() -> None:
    head = RpnHead(4, 3)
    x = torch.randn(2, 4, 5, 6)
    logits, deltas = head([x])
    hidden = head.conv(x)
    for row, column, anchor in itertools.product((0, 4), (1, 5), (0, 2)):
        index = (row * 6 + column) * 3 + anchor
        torch.testing.assert_close(logits[0][:, index], head.objectness_logits(hidden)[:, anchor, row, column])
        of_anchor = head.anchor_deltas(hidden)[:, 4 * anchor : 4 * anchor + 4, row, column]
        torch.testing.assert_close(deltas[0][:, index], of_anchor)


def test_every_parameter_of_the_head_gets_a_gradient_and_proposals_carry_none() -> None:
    made = generator().train()
    features, images = random_features()
    assert not made(features, images, SIZES).boxes.requires_grad
    logits, deltas = made.rpn_head([features["p3"]])
    (logits[0].sum() + deltas[0].sum()).backward()
    assert [name for name, parameter in made.named_parameters() if parameter.grad is None] == []


def test_levels_with_different_numbers_of_anchors_are_refused() -> None:
    anchors = AnchorGrid(strides=(8, 16), sizes=((16.0,), (32.0, 48.0)), aspect_ratios=((1.0,),))
    with pytest.raises(ValueError, match=r"\(1, 2\) anchors"):
        ProposalGenerator(8, replace(CONFIG, anchors=anchors))
