"""`streamd import` makes artifacts that run, and says plainly what does not fit."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torchvision.models import get_model
from typer.testing import CliRunner

from streamd.cli import app
from streamd.errors import ConfigError, ModelError
from streamd.known_models import known_models, show
from streamd.models import artifact


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["import", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_network_of_detectron2_becomes_an_artifact(shared: Path, tmp_path: Path) -> None:
    folder, out = shared / "parity" / "retinanet_R_50_FPN", tmp_path / "model.pt"
    config, weights = folder / "config.yaml", folder / "model_final.pkl"
    said = run("detectron2", "--config", config, "--weights", weights, "--input-size", "96x128", "-o", out)
    assert "input 128x96" in said
    _, spec = artifact.load(out)
    assert spec.input_size == (96, 128) and len(spec.weights_sha256) == 64


def test_a_yolox_is_recognised_by_its_weights(shared: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.pt"
    assert "yolox_nano" in run("yolox", shared / "parity" / "yolox_nano" / "yolox_nano.pth", "-o", out)
    assert artifact.read_spec(out).name == "yolox_nano"


@pytest.mark.parametrize("size", ["800", "800x", "axb", "800*600"])
def test_an_input_size_that_is_none_is_an_error_before_anything_is_written(
    shared: Path, tmp_path: Path, size: str
) -> None:
    folder = shared / "parity" / "retinanet_R_50_FPN"
    files = ("--config", folder / "config.yaml", "--weights", folder / "model_final.pkl")
    with pytest.raises(ConfigError, match="not HEIGHTxWIDTH"):
        run("detectron2", *files, "--input-size", size, "-o", tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


def test_an_input_size_for_a_vitdet_is_refused_and_says_what_to_change(tmp_path: Path) -> None:
    files = ("--config", tmp_path / "vitdet.json", "--weights", tmp_path / "model.pkl")
    with pytest.raises(ConfigError, match=r"cannot be given for a ViTDet.*change square_pad there"):
        run("detectron2", *files, "--input-size", "96x128", "-o", tmp_path / "model.pt")


def test_an_input_size_for_a_network_of_one_size_is_refused(tmp_path: Path) -> None:
    name = "ssdlite320_mobilenet_v3_large"
    torch.save(get_model(name, weights=None, weights_backbone=None).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=rf"cannot be given for {name}: it is built for 320x320"):
        run("torchvision", name, "--weights", tmp_path / "w.pth", "--input-size", "640x640", "-o", tmp_path / "m.pt")
    assert not (tmp_path / "m.pt").exists()


def test_a_missing_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        run("yolox", tmp_path / "nothing.pth", "-o", tmp_path / "model.pt")


def test_an_unknown_network_of_torchvision_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="maskrcnn_resnet50_fpn_v2"):
        run("torchvision", "fasterrcnn", "-o", tmp_path / "model.pt")


def test_labels_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read labels"):
        run("yolox", tmp_path / "a.pth", "-o", tmp_path / "m.pt", "--labels", tmp_path / "none.txt")


def test_the_list_of_models_names_what_can_be_had_and_what_is_here(
    tmp_path: Path, untrained_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.pt").write_bytes(untrained_artifact.read_bytes())
    (tmp_path / "broken.pt").write_bytes(b"no artifact")
    monkeypatch.setenv("STREAMD_MODELS", str(tmp_path))
    models = {model.name: model for model in known_models()}
    assert models["yolox_s"].published == "box 40.5"
    assert models["maskrcnn_resnet50_fpn_v2"].task == "segment"
    assert (models["deeplabv3_resnet50"].task, models["deeplabv3_resnet50"].published) == ("semantic", "mIoU 66.4")
    assert models["panoptic_fpn"].how == "streamd import detectron2"
    assert models["rt_detr_v2"].how == "streamd import hf"
    assert models["untrained"].how == str(tmp_path / "mine.pt")


def test_the_list_of_models_fits_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMD_MODELS", str(tmp_path))
    text = StringIO()
    show(Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert "  maskrcnn_resnet50_fpn          segment             box 37.9, mask 34.6" in lines
    assert "  yolox_s                        detect     640x640  box 40.5" in lines
    assert "streamd import torchvision: BSD-3-Clause (torchvision)" in lines
    [person] = [index for index, line in enumerate(lines) if "streamd-person.pt: Apache-2.0" in line]
    assert lines[person + 1].split(maxsplit=3) == ["streamd-person", "segment", "480x480", "box 34.9, mask 35.8"]
    assert all(len(line) <= 80 for line in lines if line.startswith(" "))
