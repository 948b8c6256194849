"""Detectors of transformers: small ones with random weights, against its own post-processing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamd.errors import ModelError
from streamd.messages import Batch, Frame
from streamd.models import artifact
from streamd.models.importers import hf
from streamd.postprocess import postprocess
from tests.fakes import make_frame

transformers: Any = pytest.importorskip("transformers", reason="needs transformers: pip install 'streamd[hf]'")

# Their own configurations say this of their default loss function, which is not used.
pytestmark = pytest.mark.filterwarnings("ignore:.*loss_type=None.*")

SIDE = 128  # input pixels
SHARED = {
    "encoder_in_channels": [16, 24, 32],
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 32,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 32,
    "decoder_attention_heads": 2,
    "decoder_layers": 2,
    "num_queries": 20,
    "num_labels": 5,
}


def rt_detr() -> Any:
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(backbone_config=small_resnet(), **SHARED))


def rt_detr_v2() -> Any:
    config = transformers.RTDetrV2Config(backbone_config=small_resnet(), **SHARED)
    return transformers.RTDetrV2ForObjectDetection(config)


def small_resnet() -> Any:
    return transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )


def d_fine() -> Any:
    backbone = transformers.HGNetV2Config(
        embedding_size=8,
        hidden_sizes=[16, 16, 24, 32],
        depths=[1, 1, 1, 1],
        stem_channels=[3, 8, 8],
        stage_in_channels=[8, 16, 16, 24],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[16, 16, 24, 32],
        stage_num_blocks=[1, 1, 1, 1],
        stage_numb_of_layers=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    return transformers.DFineForObjectDetection(transformers.DFineConfig(backbone_config=backbone, **SHARED))


def rf_detr() -> Any:
    backbone = {
        "model_type": "rf_detr_dinov2",
        "hidden_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": SIDE,
        "patch_size": 16,
        "out_indices": [2, 4],
        "num_windows": 2,
    }
    config = transformers.RfDetrConfig(
        backbone_config=backbone,
        d_model=32,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        num_queries=20,
        num_labels=5,
        group_detr=2,
    )
    return transformers.RfDetrForObjectDetection(config)


def processor_of(build: Callable[[], Any]) -> Any:
    size = {"height": SIDE, "width": SIDE}
    return (
        transformers.RfDetrImageProcessor(size=size)
        if build is rf_detr
        else transformers.RTDetrImageProcessor(size=size)
    )


@pytest.fixture(params=[rt_detr, rt_detr_v2, d_fine, rf_detr], ids=lambda build: build.__name__)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Save a small network as its repository on the hub would be."""
    torch.manual_seed(0)
    request.param().save_pretrained(tmp_path)
    processor_of(request.param).save_pretrained(tmp_path)
    return tmp_path


def test_the_artifact_finds_what_transformers_itself_finds(folder: Path, tmp_path: Path) -> None:
    network, spec = hf.load(str(folder))  # export compares network and artifact at two batch sizes
    artifact.export(network, spec, tmp_path / "model.pt")
    module, _ = artifact.load(tmp_path / "model.pt", optimized=True)
    sizes = [(90, 160), (200, 120)]  # height, width of the sources
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    threshold = 0.005  # what a network that knows nothing reaches
    with torch.inference_mode():
        raw = artifact.forward(module, spec, images, torch.empty(0))
        output = network.network(pixel_values=images)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    expected = processor.post_process_object_detection(output, threshold, sizes)
    rule = type(spec.nms)(score_threshold=threshold, iou_threshold=1.0, max_detections=20)
    batch = Batch(tuple(map(frame_of, sizes)), images, tuple(spec.letterbox(width, height) for height, width in sizes))
    for found, theirs, (height, width) in zip(postprocess(raw, batch, spec, rule), expected, sizes, strict=True):
        limit = np.array([width, height, width, height], dtype=np.float32)
        boxes = np.clip(theirs["boxes"].numpy(), 0, limit)  # streamd ends boxes where the frame ends
        visible = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)
        assert visible.sum() >= 10
        np.testing.assert_allclose(found.scores, theirs["scores"].numpy()[visible], atol=1e-5)
        np.testing.assert_allclose(found.boxes, boxes[visible], atol=1e-2)
        np.testing.assert_array_equal(found.labels, theirs["labels"].numpy()[visible])


def frame_of(size: tuple[int, int]) -> Frame:
    """Make the frame of a picture of (height, width) pixels, which nobody looks at any more."""
    return replace(make_frame(), width=size[1], height=size[0])


def test_an_artifact_in_half_precision_gives_what_the_network_gives_in_half_precision(
    folder: Path, tmp_path: Path
) -> None:
    network, spec = hf.load(str(folder))
    artifact.export(network, spec, tmp_path / "model.pt")
    module, _ = artifact.load(tmp_path / "model.pt", dtype=torch.bfloat16)
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        got, expected = module(images), network.bfloat16()(images)
    torch.testing.assert_close(got["scores"], expected["scores"], atol=2e-3, rtol=0)
    assert got["boxes"].dtype == torch.float32


def test_the_spec_says_how_the_image_processor_prepares_pictures(tmp_path: Path) -> None:
    processor = transformers.RfDetrImageProcessor(size={"height": SIDE, "width": SIDE})
    _, spec = hf.wrap(rf_detr(), processor, name="small", labels="abcde")
    assert (spec.input_size, spec.resize.kind, spec.labels) == ((SIDE, SIDE), "stretch", tuple("abcde"))
    assert (spec.nms.iou_threshold, spec.nms.max_detections) == (1.0, 20)
    picture = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    expected = processor(picture, return_tensors="pt")["pixel_values"][0]
    ours = (picture - np.array(spec.mean)) / np.array(spec.std)
    np.testing.assert_allclose(ours.transpose(2, 0, 1), expected.numpy(), atol=1e-4)


def test_a_processor_that_keeps_the_shape_of_pictures_is_refused() -> None:
    processor = transformers.RfDetrImageProcessor(size={"shortest_edge": 100, "longest_edge": 200})
    with pytest.raises(ModelError, match=r"small: its image processor resizes to .*want a height and a width"):
        hf.wrap(rf_detr(), processor, name="small")


def test_labels_must_be_as_many_as_the_classes() -> None:
    with pytest.raises(ModelError, match="small: has 5 classes, so it needs as many labels, got 2"):
        hf.wrap(rt_detr(), processor_of(rt_detr), name="small", labels=["a", "b"])


def test_weights_that_lack_something_are_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    rt_detr().save_pretrained(tmp_path)
    processor_of(rt_detr).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"decoder_layers": 3}))
    with pytest.raises(ModelError, match=r"do not fit the configuration: \d+ missing keys \(\S*bbox_embed.2"):
        hf.load(str(tmp_path))


def test_another_kind_of_network_and_a_folder_without_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read as a detector of transformers"):
        hf.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "yolos"}))
    with pytest.raises(ModelError, match="model_type is 'yolos'; streamd imports rt_detr, rt_detr_v2, d_fine, rf_detr"):
        hf.load(str(tmp_path))
