"""Files that somebody hands over: configurations, models, data sets, pictures."""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from streamd import config_file
from streamd.datasets import data, pictures
from streamd.errors import ConfigError, DataError, ModelError
from streamd.models import artifact, vitdet
from streamd.models.importers import config as detectron2_config
from streamd.models.importers import pickles
from streamd.models.spec import ModelSpec
from streamd.models.weights import read_checkpoint
from streamd.train import recipe
from tests.conftest import ROOT
from tests.fuzz.target import Target, folder, written

SPEC = ModelSpec(name="tiny", task="detect", labels=("a", "b"), input_size=(16, 16), colour="rgb")


class Tiny(nn.Module):
    """The least that a detector may be."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        boxes = self.layer(images).mean((2, 3))[:, None]
        return {"boxes": boxes, "scores": boxes[..., :2].sigmoid()}


@cache
def tiny_artifact() -> Path:
    path = folder() / "sound.pt"
    torch.manual_seed(0)
    artifact.export(Tiny(), SPEC, path)
    return path


@cache
def _entries() -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(tiny_artifact()) as archive:
        return [(name, archive.read(name)) for name in sorted(archive.namelist())]


def configuration(content: bytes) -> None:
    with suppress(ConfigError):
        config_file.load(written("streamd.yaml", content))


def recipe_file(content: bytes) -> None:
    with suppress(ConfigError):
        recipe.load(written("recipe.yaml", content))


def detectron2_yaml(content: bytes) -> None:
    with suppress(ModelError):
        detectron2_config.read(written("config.yaml", content))


def vitdet_json(content: bytes) -> None:
    with suppress(ModelError):
        vitdet.read(written("arch.json", content))


def artifact_file(content: bytes) -> None:
    with suppress(ModelError):
        artifact.load(written("model.pt", content))


def artifact_entry(content: bytes) -> None:
    """Replace the entry that the first byte chooses by the rest."""
    entries = _entries()
    chosen = content[0] % len(entries) if content else 0
    path = written("model.pt", b"")
    with zipfile.ZipFile(path, "w") as archive:
        for number, (name, old) in enumerate(entries):
            archive.writestr(name, content[1:] if number == chosen else old)
    with suppress(ModelError):
        artifact.load(path)


def checkpoint_zip(content: bytes) -> None:
    """Make the bytes the pickle of a checkpoint of today."""
    path = written("weights.pth", b"")
    with zipfile.ZipFile(path, "w") as archive:
        entries = {"data.pkl": content, "data/0": bytes(16), "version": b"3\n", "byteorder": b"little"}
        for name, entry in entries.items():
            archive.writestr(f"weights/{name}", entry)
    with suppress(ModelError):
        read_checkpoint(path)


def checkpoint_file(content: bytes) -> None:
    with suppress(ModelError):
        read_checkpoint(written("weights.pth", content))


def zoo_pickle(content: bytes) -> None:
    with suppress(ModelError):
        pickles.read(written("weights.pkl", content))


def coco_json(content: bytes) -> None:
    written("coco/a.png", _png())
    with suppress(DataError):
        data.read(written("coco/train.json", content), format="coco", deep=True)


def panoptic_json(content: bytes) -> None:
    written("panoptic/a.png", _png())
    written("panoptic/train/a.png", _png())
    with suppress(DataError):
        data.read(written("panoptic/train.json", content), format="panoptic")


def voc_xml(content: bytes) -> None:
    written("voc/JPEGImages/a.png", _png())
    written("voc/Annotations/a.xml", content)
    with suppress(DataError):
        data.read(folder() / "voc", format="voc")


def yolo_yaml(content: bytes) -> None:
    written("yolo/images/a.png", _png())
    with suppress(DataError):
        data.read(written("yolo/data.yaml", content), format="yolo", split="train")


def yolo_labels(content: bytes) -> None:
    written("labels/data.yaml", b"names: [a, b]\ntrain: images\n")
    written("labels/images/a.png", _png())
    written("labels/labels/a.txt", content)
    with suppress(DataError):
        data.read(folder() / "labels", format="yolo", split="train")


def picture(content: bytes) -> None:
    path = written("picture.jpg", content)
    with suppress(DataError), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of damaged EXIF and of large pictures
        size = pictures.inspect(path, (4, 3), deep=True)
        pictures.read(path, size)
        pictures.read_segment_ids(path)


@cache
def _png() -> bytes:
    return _picture("png")


def _picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(36, dtype=np.uint8).reshape(3, 4, 3)).save(file, kind)
    return file.getvalue()


def _checkpoint(*, is_zip: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"model": {"w": torch.zeros(4)}}, file, _use_new_zipfile_serialization=is_zip)
    return file.getvalue()


def _checkpoint_pickle() -> bytes:
    with zipfile.ZipFile(io.BytesIO(_checkpoint(is_zip=True))) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def _zoo() -> list[bytes]:
    arrays = {"conv1_w": np.arange(4, dtype=np.float32), "b": np.float64(1)}
    return [pickle.dumps({"model": arrays}, protocol) for protocol in range(6)]


COCO = {
    "images": [{"id": 1, "file_name": "a.png", "width": 4, "height": 3}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 2, 2], "segmentation": [[0, 0, 2, 0, 2, 2]]},
        {"id": 2, "image_id": 1, "category_id": 1, "segmentation": {"size": [3, 4], "counts": "35N"}, "iscrowd": 1},
        {"id": 3, "image_id": 1, "category_id": 1, "segmentation": {"size": [3, 4], "counts": [3, 9]}},
    ],
    "categories": [{"id": 1, "name": "a", "keypoints": ["nose"]}],
}
PANOPTIC = COCO | {
    "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [{"id": 131328, "category_id": 1}]}]
}
VOC = b"""<annotation><filename>a.png</filename><size><width>4</width><height>3</height></size><object><name>a</name>
<difficult>0</difficult><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></object></annotation>
"""
DETECTRON2 = b'MODEL: {META_ARCHITECTURE: RetinaNet}\nINPUT: {MIN_SIZE_TEST: 800, FORMAT: "BGR"}\nVERSION: 2\n'
RECIPE = b"name: a\nmodel: {start: yolox_nano}\ndata: {train: {path: a}, val: {path: b}}\nepochs: 1\n"
YAML = (
    b"&a ",
    b"*a",
    b"<<: ",
    b"!!python/object/apply:os.system ",
    b"- ",
    b": ",
    b"${A}",
    b"1:1:1",
    b"[[",
    b"\n  ",
    b"? ",
)


def shipped(*names: str) -> list[bytes]:
    """Read files of configs/."""
    return [(ROOT / "configs" / name).read_bytes() for name in names]


TARGETS = {
    "configuration": Target(configuration, lambda: shipped("example.yaml", "streamd.yaml"), YAML),
    "recipe": Target(recipe_file, lambda: [RECIPE], YAML),
    "detectron2_yaml": Target(detectron2_yaml, lambda: [DETECTRON2], (*YAML, b"_BASE_: ", b"(1, 2)")),
    "vitdet_json": Target(vitdet_json, lambda: [b'{"backbone": {"img_size": 64}}'], (b"[", b"{", b'"')),
    "artifact": Target(artifact_file, lambda: [tiny_artifact().read_bytes()], (b"PK\1\2", b"PK\5\6")),
    "artifact_entry": Target(
        artifact_entry,
        lambda: [bytes([number]) + content for number, (_, content) in enumerate(_entries())],
        (b"torch.", b"ops.", b"getattr(", b"CONSTANTS.c0", b"while ", b"cstorage\n", b"Q", b"R", b"1e9"),
    ),
    "model_spec": Target(
        lambda content: artifact_entry(bytes([_spec_entry()]) + content), lambda: [msgspec.json.encode(SPEC)], (b"1e9",)
    ),
    "checkpoint": Target(checkpoint_file, lambda: [_checkpoint(is_zip=True), _checkpoint(is_zip=False)]),
    "checkpoint_pickle": Target(checkpoint_zip, lambda: [_checkpoint_pickle()], (b"cos\nsystem\n", b"R", b"Q", b"b.")),
    "zoo_pickle": Target(zoo_pickle, _zoo, (b"cos\nsystem\n", b"R", b"b.", b"\x8e", b"\x96", b"r")),
    "coco_json": Target(coco_json, lambda: [msgspec.json.encode(COCO)], (b"1e999", b"[[", b"NaN", b"99999999999")),
    "panoptic_json": Target(panoptic_json, lambda: [msgspec.json.encode(PANOPTIC)], (b"1e999", b"[[", b"NaN")),
    "voc_xml": Target(voc_xml, lambda: [VOC], (b"<!DOCTYPE a>", b"&a;", b"nan", b"1e999", b"<object>")),
    "yolo_yaml": Target(yolo_yaml, lambda: [b"path: .\ntrain: images\nnames: {0: a, 1: b}\n"], YAML),
    "yolo_labels": Target(yolo_labels, lambda: [b"0 .5 .5 .2 .2\n1 0 0 1 0 1 1\n"], (b"nan", b"inf", b"1e999")),
    "picture": Target(picture, lambda: [_picture(kind) for kind in ("png", "jpeg", "gif", "tiff", "bmp", "webp")]),
}


def _spec_entry() -> int:
    return next(number for number, (name, _) in enumerate(_entries()) if name.endswith("streamd.json"))
