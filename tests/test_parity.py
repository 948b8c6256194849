"""Checkpoints of Detectron2, imported and exported, give what Detectron2 itself gave."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from streamd.errors import ModelError
from streamd.gpu.reference import preprocess
from streamd.messages import Detections, Picture
from streamd.models import artifact, parity
from streamd.models.importers import detectron2
from streamd.models.spec import ModelSpec, ResizeRule
from streamd.models.yolox import yolox_nano
from tests.parity_reference import Reference, assert_same, read_reference

# Objects without a partner in the worst picture. These networks know nothing and have a thousand proposals that
# overlap by every amount, so that a rounding error may decide whether one suppresses another.
FOLDERS = {
    "cascade_mask_rcnn_R_50_FPN": 0,
    "faster_rcnn_R_50_FPN": 0,
    "keypoint_rcnn_R_50_FPN": 1,
    "mask_rcnn_R_50_FPN": 0,
    "panoptic_fpn_R_50": 0,
    "retinanet_R_50_FPN": 0,
    "vitdet": 0,
}


@dataclass(frozen=True, slots=True, eq=False)
class Imported:
    """An artifact made of a folder's checkpoint, and what it finds in the folder's pictures."""

    path: Path
    reference: Reference
    detections: list[Detections]
    max_lost: int


@pytest.fixture(scope="module", params=sorted(FOLDERS))
def imported(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Imported]:
    folder = shared / "parity" / request.param
    reference = read_reference(folder)
    checkpoint = folder / "model_final.pkl"
    if request.param == "vitdet":  # whose input is a square of one size
        network, spec = detectron2.load_vitdet(folder / "arch.json", checkpoint)
    else:
        network, spec = detectron2.load(folder / "config.yaml", checkpoint)
        input_size = parity.common_size(reference.resized, spec.size_multiple)
        spec = msgspec.structs.replace(spec, input_size=input_size)
    path = tmp_path_factory.mktemp("parity") / f"{request.param}.pt"
    artifact.export(network, spec, path)
    detections = parity.run(path, reference.resized, reference.sizes)
    yield Imported(path, reference, detections, FOLDERS[request.param])


@pytest.mark.slow
def test_an_imported_checkpoint_finds_what_detectron2_found(imported: Imported) -> None:
    for found, expected in zip(imported.detections, imported.reference.detections, strict=True):
        assert_same(found, expected, imported.max_lost)


@pytest.mark.slow
def test_pictures_give_the_same_one_by_one_as_in_a_batch(imported: Imported) -> None:
    reference = imported.reference
    for resized, size, together in zip(reference.resized, reference.sizes, imported.detections, strict=True):
        (alone,) = parity.run(imported.path, [resized], [size])
        assert_same(alone, together, imported.max_lost)


@pytest.mark.slow
def test_an_imported_checkpoint_runs_in_half_precision(imported: Imported) -> None:
    module, spec = artifact.load(imported.path, dtype=torch.float16)
    images = torch.zeros(1, 3, *spec.input_size, dtype=torch.float16)
    with torch.inference_mode():
        raw = artifact.forward(module, spec, images, torch.tensor([spec.input_size], dtype=torch.float32))
    assert raw.boxes.dtype == torch.float32, "a coordinate above 2048 has no half pixels in float16"


def test_the_common_size_is_that_of_the_largest_sides_rounded_up() -> None:
    pictures = [np.zeros((3, 224, 299), np.uint8), np.zeros((3, 249, 224), np.uint8)]
    assert parity.common_size(pictures) == (256, 320)
    assert parity.common_size(pictures, multiple=1) == (249, 299)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = ModelSpec(name="small", task="detect", labels=("a", "b", "c"), input_size=(64, 96), colour="bgr")
    path = tmp_path_factory.mktemp("models") / "small.pt"
    artifact.export(yolox_nano(3, input_size=spec.input_size), spec, path)
    return path


def test_a_picture_that_does_not_fit_the_input_is_an_error_that_says_so(small: Path) -> None:
    with pytest.raises(ModelError, match=r"input is \[64, 96\], too small for a picture of \[65, 20\]"):
        parity.run(small, [np.zeros((3, 65, 20), np.uint8)], [(130, 40)])


RULES = {
    "shortest_edge": ((800, 1344), ResizeRule(kind="shortest_edge", min_size=800, max_size=1333, pad=None)),
    "letterbox": ((640, 640), ResizeRule()),
}


@pytest.mark.parametrize("rule", RULES)
def test_photographs_are_resized_as_pil_does_to_two_grey_levels(shared: Path, rule: str) -> None:
    input_size, resize = RULES[rule]
    spec = ModelSpec(name=rule, task="detect", labels=("a",), input_size=input_size, colour="rgb", resize=resize)
    photographs = sorted((shared / "data" / "persons").rglob("*.jpg"))[:5]
    assert photographs
    for photograph in photographs:
        pixels = np.array(Image.open(photograph).convert("RGB"))
        box = spec.letterbox(pixels.shape[1], pixels.shape[0])
        image = torch.empty(1, 3, *input_size)
        picture = Picture((torch.from_numpy(pixels),), "rgb", "bt709", full_range=True, rotation=0)
        preprocess([picture], [box], image, colour="rgb", mean=spec.mean, std=spec.std, pad=spec.padding)
        ours = image[0, :, box.top : box.top + box.height, box.left : box.left + box.width].permute(1, 2, 0).numpy()
        theirs = Image.fromarray(pixels).resize((box.width, box.height), Image.Resampling.BILINEAR)
        assert np.abs(ours - np.asarray(theirs)).mean() < 2
