"""What a spec may say, and what a network must give for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from streamd.errors import ModelError
from streamd.models.contract import check_method, check_output, describe_wrong_spec, pack
from streamd.models.spec import DensePoseRule, KeypointRule, MaskRule, ModelSpec, PanopticRule, ResizeRule

DETECT = ModelSpec(name="any", task="detect", labels=("a", "b", "c"), input_size=(64, 96), colour="bgr")
BOX_MASKS, POINTS = MaskRule(kind="box"), KeypointRule(names=("head", "tail"))
STUFF = PanopticRule(stuff_labels=("things", "sky", "sea"))
PATH = Path("model.pt")


def spec_of(**fields: Any) -> ModelSpec:
    return msgspec.structs.replace(DETECT, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"task": "segment", "masks": MaskRule()},
        {"task": "keypoints", "keypoints": POINTS},
        {"task": "keypoints", "keypoints": POINTS, "masks": BOX_MASKS, "sized": True},
        {"task": "panoptic", "masks": BOX_MASKS, "panoptic": STUFF},
        {"task": "semantic"},
        {"task": "densepose", "densepose": DensePoseRule()},
        {"task": "densepose", "densepose": DensePoseRule(num_coarse=15), "masks": BOX_MASKS, "keypoints": POINTS},
        {"size_multiple": 32},
        {"resize": ResizeRule(kind="shortest_edge", min_size=50, max_size=90, pad=None)},
    ],
)
def test_a_spec_that_makes_sense_is_taken(fields: dict[str, Any]) -> None:
    assert describe_wrong_spec(spec_of(**fields)) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "segment"}, "'segment' without a rule for masks"),
        ({"task": "keypoints", "masks": BOX_MASKS}, "'keypoints' without a rule for keypoints"),
        ({"task": "panoptic", "masks": BOX_MASKS}, "'panoptic' without a rule for panoptic"),
        ({"task": "densepose"}, "'densepose' without a rule for densepose"),
        ({"task": "densepose", "densepose": DensePoseRule(num_parts=256)}, "num_parts 256, num_coarse 2"),
        ({"task": "densepose", "densepose": DensePoseRule(num_coarse=1)}, "num_coarse 1"),
        ({"task": "densepose", "densepose": DensePoseRule(up_scale=0)}, "up_scale 0"),
        ({"masks": BOX_MASKS, "keypoints": POINTS}, "'detect' with a rule for keypoints, masks"),
        ({"task": "semantic", "panoptic": STUFF}, "'semantic' with a rule for panoptic"),
        ({"size_multiple": 40}, "multiples of size_multiple 40"),
        ({"resize": ResizeRule(kind="shortest_edge", max_size=90)}, "min_size 0 and max_size 90"),
        ({"resize": ResizeRule(kind="shortest_edge", min_size=90, max_size=50)}, "min_size 90 and max_size 50"),
        ({"sized": True, "resize": ResizeRule(anchor="center")}, "pictures at the top left"),
    ],
)
def test_a_spec_that_contradicts_itself_is_refused(fields: dict[str, Any], message: str) -> None:
    assert message in str(describe_wrong_spec(spec_of(**fields)))


def pairs() -> dict[str, Tensor]:
    return {
        "boxes": torch.zeros(2, 7, 4),
        "scores": torch.zeros(2, 7),
        "labels": torch.zeros(2, 7, dtype=torch.int64),
        "features.0": torch.zeros(2, 5, 8, 12),
        "features.1": torch.zeros(2, 5, 4, 6),
        "semantic": torch.zeros(2, 3, 16, 24),
    }


PAIRS = spec_of(task="panoptic", masks=BOX_MASKS, keypoints=POINTS, panoptic=STUFF)


def test_pairs_with_features_and_semantic_are_taken_and_packed() -> None:
    check_output(pairs(), PAIRS, 2, PATH)
    raw = pack(pairs())
    assert raw.labels is not None and raw.semantic is not None
    assert [list(feature.shape) for feature in raw.features] == [[2, 5, 8, 12], [2, 5, 4, 6]]
    assert raw.prototypes is None and raw.coefficients is None


def test_a_semantic_model_has_no_candidates() -> None:
    output = {"semantic": torch.zeros(2, 3, 16, 24).half()}
    check_output(output, spec_of(task="semantic"), 2, PATH)
    raw = pack(output)
    assert list(raw.boxes.shape) == [2, 0, 4] and list(raw.scores.shape) == [2, 0]
    assert raw.labels is not None and raw.labels.dtype == torch.int64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(2, 7, 3)}, r"scores is \[2, 7, 3\]; want boxes \[2,K,4\], scores \[2,K\]"),
        ({"labels": torch.zeros(2, 7)}, r"labels are torch.float32, not torch.int64"),
        ({"labels": torch.zeros(2, 6, dtype=torch.int64)}, r"labels is \[2, 6\]"),
        ({"features.1": torch.zeros(1, 5, 4, 6)}, r"features.1 is \[1, 5, 4, 6\]"),
        ({"features.0": None}, r"keys \['boxes', 'scores', 'labels', 'features.0', 'features.1', 'semantic'\]"),
        ({"semantic": torch.zeros(2, 4, 16, 24)}, r"semantic is \[2, 4, 16, 24\].*semantic \[2,3,h_s,w_s\]"),
        ({"semantic": None}, r"keys .*'semantic'"),
    ],
)
def test_output_that_does_not_fit_the_spec_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_output(pairs() | change, PAIRS, 2, PATH)


def test_a_gap_in_the_features_is_refused() -> None:
    output = pairs()
    output["features.2"] = output.pop("features.1")
    with pytest.raises(ModelError, match=r"features\.1"):
        check_output(output, PAIRS, 2, PATH)


@pytest.mark.parametrize(
    ("name", "output", "message"),
    [
        (
            "masks",
            torch.zeros(2, 5, 8, 9),
            r"masks gives \[2, 5, 8, 9\] for boxes of shape \[2, 5, 4\]; want \[2,5,S,S\]",
        ),
        ("masks", torch.zeros(2, 4, 8, 8), r"masks gives \[2, 4, 8, 8\]"),
        ("keypoints", torch.zeros(2, 5, 3, 8, 8), r"keypoints gives \[2, 5, 3, 8, 8\].*want \[2,5,2,S,S\]"),
        ("keypoints", {}, "keypoints gives dict"),
    ],
)
def test_a_method_that_does_not_fit_the_spec_is_refused(name: str, output: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_method(name, output, torch.zeros(2, 5, 4), PAIRS, PATH)


def test_the_maps_of_densepose_have_as_many_channels_as_its_rule_says() -> None:
    spec = spec_of(task="densepose", densepose=DensePoseRule(num_parts=4, num_coarse=3))
    check_method("densepose", torch.zeros(2, 5, 18, 8, 8), torch.zeros(2, 5, 4), spec, PATH)
    with pytest.raises(ModelError, match=r"densepose gives \[2, 5, 17, 8, 8\].*want \[2,5,18,S,S\]"):
        check_method("densepose", torch.zeros(2, 5, 17, 8, 8), torch.zeros(2, 5, 4), spec, PATH)


def test_a_method_that_fits_the_spec_is_taken() -> None:
    check_method("masks", torch.zeros(2, 5, 8, 8), torch.zeros(2, 5, 4), PAIRS, PATH)
    check_method("keypoints", torch.zeros(2, 5, 2, 8, 8), torch.zeros(2, 5, 4), PAIRS, PATH)
