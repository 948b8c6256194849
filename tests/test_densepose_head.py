"""The DensePose head against a plain computation from its weights, box by box."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import roi_align
from typer.testing import CliRunner

from streamd import wire
from streamd.cli import app
from streamd.errors import ModelError
from streamd.gpu.densepose import make_charts
from streamd.models import artifact, parity, rcnn
from streamd.models.densepose_head import DILATIONS, DensePoseHeadConfig
from streamd.models.importers import config, detectron2
from streamd.models.rcnn import Rcnn
from streamd.models.roi_heads import RoiHeads, RoiHeadsConfig, make_roi_heads
from streamd.models.roi_pooler import PoolerConfig
from streamd.models.semantic import SemanticHeadConfig
from streamd.models.spec import DensePoseRule
from streamd.predict import predict
from tests.test_densepose import as_densepose_does
from tests.test_roi_heads import FakeBackbone

PYRAMID = FakeBackbone(64, p2=4, p3=8)
RULE = DensePoseRule(num_parts=5, num_coarse=3)
DECODER = SemanticHeadConfig(in_features=("p2", "p3"), num_classes=64, conv_dim=16, norm="")
POOLER = PoolerConfig(6, 2, "align_unshifted")
BOXES = torch.tensor(
    [
        [[3.0, 4.0, 30.5, 60.0], [1.0, 1.0, 185.0, 103.0], [0.0, 0.0, 0.0, 0.0]],
        [[50.0, 8.0, 77.0, 20.0], [0.0, 30.0, 20.0, 63.0], [10.0, 10.0, 12.0, 13.0]],
    ]
)
# What the DensePose project adds to Detectron2's configuration of a small pyramid.
SMALL = """
MODEL:
  BACKBONE: {NAME: build_resnet_fpn_backbone}
  RESNETS: {DEPTH: 18, RES2_OUT_CHANNELS: 16, STEM_OUT_CHANNELS: 8, OUT_FEATURES: [res2, res3, res4, res5]}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 64}
  ANCHOR_GENERATOR: {SIZES: [[32], [64], [128], [256], [512]]}
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6], PRE_NMS_TOPK_TEST: 50, POST_NMS_TOPK_TEST: 20}
  DENSEPOSE_ON: true
  ROI_HEADS: {NAME: DensePoseROIHeads, IN_FEATURES: [p2, p3, p4, p5], NUM_CLASSES: 1, SCORE_THRESH_TEST: 0.0}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 2, FC_DIM: 16, POOLER_RESOLUTION: 7, POOLER_TYPE: ROIAlign}
  ROI_DENSEPOSE_HEAD:
    NAME: DensePoseV1ConvXHead
    POOLER_TYPE: ROIAlign
    POOLER_RESOLUTION: 8
    CONV_HEAD_DIM: 32
    NUM_STACKED_CONVS: 2
    DECODER_NUM_CLASSES: 64
    DECODER_CONV_DIMS: 16
DATASETS: {TRAIN: [densepose_coco_2014_train]}
INPUT: {MIN_SIZE_TEST: 64, MAX_SIZE_TEST: 96}
"""


def make(**changes: Any) -> RoiHeads:
    densepose = DensePoseHeadConfig(num_convs=2, conv_dim=32, rule=RULE, pooler=POOLER, **changes)
    torch.manual_seed(0)
    heads = make_roi_heads(PYRAMID, RoiHeadsConfig(num_classes=1, in_features=("p2", "p3"), densepose=densepose))
    for name, parameter in heads.named_parameters():
        if name.endswith("bias") or ".norm." in name:
            nn.init.normal_(parameter, std=0.3)
    return heads.eval()


def random_features() -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(2, 64, 128 // side, 192 // side, generator=random) for name, side in PYRAMID.strides.items()
    }


def decoded(state: dict[str, Tensor], features: dict[str, Tensor]) -> Tensor:
    fine = F.relu(F.conv2d(features["p2"], state["decoder.p2.0.weight"], state["decoder.p2.0.bias"], padding=1))
    coarse = F.relu(F.conv2d(features["p3"], state["decoder.p3.0.weight"], state["decoder.p3.0.bias"], padding=1))
    total = fine + F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)
    return F.conv2d(total, state["decoder.predictor.weight"], state["decoder.predictor.bias"])


def pooled(features: dict[str, Tensor], image: int, box: Tensor) -> Tensor:
    """Cut one box out of the level that suits its size: p3 from 112 pixels on, where p2 is the finest."""
    x1, y1, x2, y2 = box.tolist()
    name = "p3" if ((x2 - x1) * (y2 - y1)) ** 0.5 >= 112 else "p2"
    if name not in features:
        name = "decoded"
    scale = 1 / PYRAMID.strides.get(name, 4)
    return roi_align(features[name][image : image + 1], [box[None]], 6, scale, 2, aligned=False)


def pyramid(state: dict[str, Tensor], x: Tensor) -> Tensor:
    def finish(y: Tensor, name: str) -> Tensor:
        return F.relu(torch.group_norm(y, 32, state[f"{name}.weight"], state[f"{name}.bias"]))

    start = "densepose_head.ASPP"
    paths = [finish(F.conv2d(x, state[f"{start}.convs.0.0.weight"]), f"{start}.convs.0.1")]
    for index, dilation in enumerate(DILATIONS, start=1):
        y = F.conv2d(x, state[f"{start}.convs.{index}.0.weight"], padding=dilation, dilation=dilation)
        paths.append(finish(y, f"{start}.convs.{index}.1"))
    mean = finish(F.conv2d(x.mean((2, 3), keepdim=True), state[f"{start}.convs.4.1.weight"]), f"{start}.convs.4.2")
    paths.append(F.interpolate(mean, x.shape[2:], mode="bilinear", align_corners=False))
    return F.relu(F.conv2d(torch.cat(paths, dim=1), state[f"{start}.project.0.weight"]))


def expected_maps(state: dict[str, Tensor], x: Tensor, is_deeplab: bool, has_norm: bool) -> Tensor:
    if is_deeplab:
        x = pyramid(state, x)
    for index in (1, 2):
        name = f"densepose_head.body_conv_fcn{index}"
        x = F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), padding=1)
        if has_norm:
            x = F.group_norm(x, 32, state[f"{name}.norm.weight"], state[f"{name}.norm.bias"])
        x = F.relu(x)
    names = [f"densepose_predictor.{name}_lowres" for name in ("ann_index", "index_uv", "u", "v")]
    maps = [F.conv_transpose2d(x, state[f"{n}.weight"], state[f"{n}.bias"], stride=2, padding=1) for n in names]
    return torch.cat(maps, dim=1)


@pytest.mark.parametrize(
    ("kind", "norm", "decoder"),
    [("convolutions", "", None), ("convolutions", "", DECODER), ("deeplab", "GN", DECODER), ("deeplab", "", None)],
)
@torch.inference_mode()
def test_maps_are_those_of_each_box_alone(kind: str, norm: str, decoder: SemanticHeadConfig | None) -> None:
    heads, features = make(kind=kind, norm=norm, decoder=decoder), random_features()
    state = dict(heads.state_dict())
    maps = heads.densepose(list(features.values()), BOXES)
    assert list(maps.shape) == [2, 3, RULE.num_channels, 12, 12] and maps.isfinite().all()
    source = {"decoded": decoded(state, features)} if decoder else features
    for image, row in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2)):
        x = pooled(source, image, BOXES[image, row])
        expected = expected_maps(state, x, kind == "deeplab", bool(norm))
        assert expected.std() > 0.01, "a comparison of nothing"
        torch.testing.assert_close(maps[image, row], expected[0], rtol=1e-4, atol=1e-5)


def test_weights_have_the_names_of_the_published_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(SMALL.replace("DensePoseV1ConvXHead", "DensePoseDeepLabHead"))
    network, _ = detectron2.build(path)
    names = {
        name.removeprefix("roi_heads.") for name in network.state_dict() if "densepose" in name or "decoder" in name
    }
    expected = {f"densepose_head.ASPP.convs.{index}.{part}" for index in range(4) for part in ("0.weight", "1.weight")}
    expected |= {f"densepose_head.ASPP.convs.{index}.1.bias" for index in range(4)}
    expected |= {f"densepose_head.ASPP.convs.4.{part}" for part in ("1.weight", "2.weight", "2.bias")}
    expected |= {"densepose_head.ASPP.project.0.weight"}
    for index in (1, 2):
        expected |= {f"densepose_head.body_conv_fcn{index}.{part}" for part in ("weight", "norm.weight", "norm.bias")}
    predictors = ("ann_index_lowres", "index_uv_lowres", "u_lowres", "v_lowres")
    expected |= {f"densepose_predictor.{name}.{part}" for name in predictors for part in ("weight", "bias")}
    convs = ("p2.0", "p3.0", "p4.0", "p4.2", "p5.0", "p5.2", "p5.4", "predictor")
    expected |= {f"decoder.{name}.{part}" for name in convs for part in ("weight", "bias")}
    assert names == expected


def test_the_numbers_of_the_published_configurations_are_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    text = yaml.safe_load(SMALL)
    text["MODEL"]["ROI_DENSEPOSE_HEAD"] = {"NAME": "DensePoseV1ConvXHead", "POOLER_TYPE": "ROIAlign"}
    path.write_text(yaml.safe_dump(text))
    whole = DensePoseHeadConfig(
        decoder=SemanticHeadConfig(in_features=("p2", "p3", "p4", "p5"), num_classes=256, conv_dim=256, norm="")
    )
    assert rcnn.roi_heads_config(config.read(path)).densepose == whole
    # densepose_rcnn_R_50_FPN_s1x_legacy
    text["MODEL"]["ROI_DENSEPOSE_HEAD"] |= {
        "NUM_COARSE_SEGM_CHANNELS": 15,
        "POOLER_RESOLUTION": 14,
        "DECODER_ON": False,
    }
    path.write_text(yaml.safe_dump(text))
    legacy = DensePoseHeadConfig(rule=DensePoseRule(num_coarse=15), pooler=PoolerConfig(14, 2, "align_unshifted"))
    assert rcnn.roi_heads_config(config.read(path)).densepose == legacy
    text["MODEL"]["DENSEPOSE_ON"] = False
    path.write_text(yaml.safe_dump(text))
    assert rcnn.roi_heads_config(config.read(path)).densepose is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("NUM_STACKED_CONVS: 2", "UV_CONFIDENCE: {ENABLED: true}", "UV_CONFIDENCE.ENABLED is true"),
        ("NUM_STACKED_CONVS: 2", "SEGM_CONFIDENCE: {ENABLED: true}", "SEGM_CONFIDENCE.ENABLED is true"),
        ("NUM_STACKED_CONVS: 2", "PREDICTOR_NAME: DensePoseEmbeddingPredictor", "'DensePoseEmbeddingPredictor'"),
        ("DensePoseV1ConvXHead", "DensePoseDeepLabHead\n    DEEPLAB: {NONLOCAL_ON: 1}", "NONLOCAL_ON is true"),
        ("DensePoseV1ConvXHead", "DensePoseDeepLabHead\n    DEEPLAB: {NORM: BN}", "DEEPLAB.NORM is 'BN'"),
        ("DensePoseV1ConvXHead", "HRNetHead", "NAME is 'HRNetHead'; streamd builds DensePoseV1ConvXHead"),
        ("DECODER_CONV_DIMS: 16", "DECODER_COMMON_STRIDE: 8", "cannot be doubled to the stride 8|stride 8, but boxes"),
        ("DECODER_CONV_DIMS: 16", "DECONV_KERNEL: 3", "a deconvolution of 3 cells"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(SMALL.replace(old, new))
    with pytest.raises(ModelError, match=message):
        detectron2.build(path)


@pytest.mark.parametrize("head", ["DensePoseV1ConvXHead", "DensePoseDeepLabHead"])
def test_an_artifact_computes_what_the_network_does_for_any_batch(tmp_path: Path, head: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(SMALL.replace("DensePoseV1ConvXHead", head))
    torch.manual_seed(0)
    network, spec = detectron2.build(path)
    assert isinstance(network, Rcnn)
    network.eval()
    assert (spec.name, spec.task, spec.labels) == ("densepose_rcnn", "densepose", ("person",))
    assert spec.densepose == DensePoseRule() and spec.methods == ("densepose",)
    artifact.export(network, spec, tmp_path / "model.pt")
    module, _ = artifact.load(tmp_path / "model.pt")
    images, sizes = torch.randn(2, 3, *spec.input_size) * 60, torch.tensor([[64.0, 96.0], [60.0, 80.0]])
    with torch.inference_mode():
        raw = artifact.forward(module, spec, images, sizes)
        together = module.densepose(list(raw.features), BOXES)
        close = {"rtol": 1e-4, "atol": 1e-4 * together.std().item()}  # untrained, its values are in the hundreds
        torch.testing.assert_close(together, network.densepose(raw.features, BOXES), **close)
        for image in range(2):
            one = artifact.forward(module, spec, images[image : image + 1], sizes[image : image + 1])
            alone = module.densepose(list(one.features), BOXES[image : image + 1])
            torch.testing.assert_close(alone[0], together[image], **close)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Import a checkpoint as the DensePose project writes them, of random weights that find objects and parts."""
    folder = tmp_path_factory.mktemp("densepose")
    given, weights, model = folder / "config.yaml", folder / "model_final.pkl", folder / "model.pt"
    given.write_text(SMALL + "TEST: {DETECTIONS_PER_IMAGE: 5}\n")
    torch.manual_seed(1)
    network, _ = detectron2.build(given)
    nn.init.constant_(network.get_parameter("roi_heads.densepose_predictor.u_lowres.bias"), 0.5)
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    weights.write_bytes(pickle.dumps({"model": state, "__author__": "nobody"}))
    arguments = ["import", "detectron2", "--config", given, "--weights", weights, "-o", model]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return model


@torch.inference_mode()
def test_an_artifact_runs_in_half_precision(imported: Path) -> None:
    module, spec = artifact.load(imported, dtype=torch.float16)
    images = torch.zeros(1, 3, *spec.input_size, dtype=torch.float16)
    raw = artifact.forward(module, spec, images, torch.tensor([[64.0, 96.0]]))
    maps = module.densepose(list(raw.features), BOXES[:1])
    assert maps.dtype == torch.float16 and maps.isfinite().all()
    charts = make_charts(maps, BOXES[:1], DensePoseRule())
    assert charts.dtype == torch.uint8


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_an_imported_checkpoint_predicts_charts_of_a_picture(imported: Path, tmp_path: Path) -> None:
    picture, said = tmp_path / "street.png", io.StringIO()
    Image.fromarray(noise(200, 300)).save(picture)
    assert (
        predict(str(imported), [picture], json_lines=True, console=Console(file=said, width=20), out=tmp_path / "drawn")
        == 0
    )
    message = wire.decode(said.getvalue().encode(), "detections")
    assert len(message.objects) == 5
    for found in message.objects:
        chart = found.densepose
        assert chart is not None and found.label == "person"
        x1, y1, x2, y2 = found.box
        np.testing.assert_allclose(chart.box, (x1, y1, x2 - x1, y2 - y1), atol=1.02)  # whole pixels, rounded down
        assert max(chart.size) == min(128, max(chart.box[2:]))
        part, coordinates = chart.decode()
        assert part.max() <= 24 and not coordinates[:, part == 0].any()
    assert any(found.densepose and found.densepose.decode()[0].any() for found in message.objects)
    assert len(list((tmp_path / "drawn").iterdir())) == 1


def test_charts_are_those_that_densepose_makes_of_the_boxes(imported: Path) -> None:
    resized, size = noise(64, 96).transpose(2, 0, 1).copy(), (160, 240)
    (found,) = parity.run(imported, [resized], [size])
    module, spec = artifact.load(imported)
    images = (torch.from_numpy(resized).float() - torch.tensor(spec.mean)[:, None, None])[None]
    with torch.inference_mode():
        raw = artifact.forward(module, spec, images, torch.tensor([[64.0, 96.0]]))
        maps = module.densepose(list(raw.features), torch.from_numpy(found.boxes)[None] * 0.4)[0]
    assert found.charts is not None and len(found.charts) == 5
    for chart, own in zip(found.charts, maps, strict=True):
        _, height, width = chart.planes.shape
        expected = as_densepose_does(own, (height, width), DensePoseRule())
        same = chart.planes[0] == expected[0]
        assert same.mean() > 0.995
        assert np.abs(chart.planes[1:, same] / 255 - expected[1:, same]).mean() < 0.01
    assert any(chart.planes[1:].any() for chart in found.charts)
