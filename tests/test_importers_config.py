"""Detectron2's configurations: read safely, completed, and checked."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from streamd.errors import ModelError
from streamd.models import coco
from streamd.models.importers.config import MAX_DETECTIONS, anchor_grid, base_spec, max_detections, read
from streamd.models.importers.datasets import CITYSCAPES, labels_of
from streamd.models.importers.defaults import DEFAULTS
from streamd.models.spec import ResizeRule


def written(folder: Path, text: str, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def keys_of(tree: dict[str, object], place: str = "") -> set[str]:
    keys = set()
    for key, value in tree.items():
        keys |= keys_of(value, f"{place}{key}.") if isinstance(value, dict) else {place + key}
    return keys


def test_the_defaults_are_keys_and_types_that_detectron2_writes_out(shared: Path) -> None:
    full = yaml.safe_load((shared / "parity/faster_rcnn_R_50_FPN/config.yaml").read_text())
    others = ("MODEL.REGNETS.", "MODEL.DENSEPOSE_ON", "MODEL.ROI_DENSEPOSE_HEAD.")  # not of Detectron2 itself
    own = {key for key in keys_of(DEFAULTS) if not key.startswith(others)}
    assert own <= keys_of(full)
    assert read(shared / "parity/faster_rcnn_R_50_FPN/config.yaml")["MODEL"]["RESNETS"]["WIDTH_PER_GROUP"] == 16


def test_keys_that_are_left_out_have_detectron2s_defaults(tmp_path: Path) -> None:
    config = read(written(tmp_path, "MODEL: {RESNETS: {DEPTH: 101}, MASK_ON: true}"))
    assert config["MODEL"]["RESNETS"] == DEFAULTS["MODEL"]["RESNETS"] | {"DEPTH": 101}
    assert config["MODEL"]["MASK_ON"] is True
    assert config["INPUT"] == DEFAULTS["INPUT"]
    assert DEFAULTS["MODEL"]["RESNETS"]["DEPTH"] == 50


def test_a_base_is_read_first_relative_to_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    written(tmp_path / "base", "MODEL: {RESNETS: {DEPTH: 18, NORM: BN}, MASK_ON: true}", "root.yaml")
    written(tmp_path / "base", "_BASE_: root.yaml\nMODEL: {RESNETS: {DEPTH: 34}}", "middle.yaml")
    config = read(written(tmp_path, '_BASE_: "base/middle.yaml"\nMODEL: {MASK_ON: False}'))
    resnets = config["MODEL"]["RESNETS"]
    assert (resnets["DEPTH"], resnets["NORM"], config["MODEL"]["MASK_ON"]) == (34, "BN", False)
    assert "_BASE_" not in config


def test_bases_that_name_each_other_again_and_again_are_refused_in_time(tmp_path: Path) -> None:
    for number in range(19):
        written(tmp_path, f"_BASE_: [{number + 1}.yaml, {number + 1}.yaml]", f"{number}.yaml")
    written(tmp_path, "VERSION: 2", "19.yaml")
    with pytest.raises(ModelError, match="more than 64 files"):
        read(tmp_path / "0.yaml")


def test_numbers_and_tuples_that_yaml_takes_for_words_are_read(tmp_path: Path) -> None:
    text = """
INPUT:
  MIN_SIZE_TRAIN: (640, 672)
SOLVER:
  BASE_LR: 2e-2
MODEL:
  PIXEL_STD: !!python/tuple [1, 2, 3]
  RPN: {NMS_THRESH: 1, CONV_DIMS: "(-1, -1)"}
"""
    config = read(written(tmp_path, text))
    assert config["INPUT"]["MIN_SIZE_TRAIN"] == [640, 672]
    assert config["SOLVER"]["BASE_LR"] == 0.02
    assert config["MODEL"]["PIXEL_STD"] == [1, 2, 3]
    assert config["MODEL"]["RPN"]["CONV_DIMS"] == [-1, -1]
    assert isinstance(config["MODEL"]["RPN"]["NMS_THRESH"], float)


def test_a_negative_number_of_detections_sets_no_limit_but_the_one_that_fixed_shapes_need(tmp_path: Path) -> None:
    numbers = {number: read(written(tmp_path, f"TEST: {{DETECTIONS_PER_IMAGE: {number}}}")) for number in (-1, 0, 7)}
    assert max_detections(numbers[7]) == 7
    assert max_detections(numbers[-1]) == MAX_DETECTIONS == 1000
    with pytest.raises(ModelError, match="DETECTIONS_PER_IMAGE is 0"):
        max_detections(numbers[0])


def test_the_expression_of_detectron2s_own_retinanet_is_known(tmp_path: Path) -> None:
    text = """
MODEL:
  ANCHOR_GENERATOR:
    SIZES: !!python/object/apply:eval ["[[x, x * 2**(1.0/3), x * 2**(2.0/3) ] for x in [32, 64, 128, 256, 512 ]]"]
"""
    sizes = anchor_grid(read(written(tmp_path, text)), (8, 16, 32, 64, 128)).sizes
    assert sizes[1] == pytest.approx((64, 80.635, 101.594), abs=1e-3)


@pytest.mark.parametrize(
    "value",
    [
        '!!python/object/apply:eval [\'__import__("os").remove("canary")\']',
        "!!python/object/apply:eval []",
        "!!python/object/apply:os.remove [canary]",
        "!!python/object/new:os.remove [canary]",
        "!!python/name:os.remove",
        "!!python/module:os",
        "!!python/object:collections.Counter {}",
        "!custom 1",
    ],
)
def test_tags_that_name_anything_of_python_are_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "canary").touch()
    with pytest.raises(ModelError, match=r"config.yaml: cannot be read: line 2: "):
        read(written(tmp_path, f"MODEL:\n  X: {value}"))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MODEL: {RESNETS: {DEPTH: fifty}}", r"MODEL.RESNETS.DEPTH is 'fifty', want a whole number"),
        ("MODEL: {RESNETS: {DEPTH: true}}", r"MODEL.RESNETS.DEPTH is True, want a whole number"),
        ("MODEL: {MASK_ON: 1}", r"MODEL.MASK_ON is 1, want a truth value"),
        ("MODEL: {RESNETS: 50}", r"MODEL.RESNETS is 50, want a map"),
        ("MODEL: null", r"MODEL is None, want a map"),
        ("MODEL: {FPN: {IN_FEATURES: res2}}", r"IN_FEATURES is 'res2', want a list"),
        ("VERSION: 1", "VERSION is 1"),
        ("_BASE_: config.yaml", "is its own _BASE_"),
        ("_BASE_: detectron2://x.yaml", "fetch that configuration"),
        ("_BASE_: missing.yaml", r"missing.yaml: cannot be read"),
        ("_BASE_: ~nobody-of-that-name/a.yaml", "no file has that name"),
        ("just words", "not a configuration of Detectron2"),
        ("", "not a configuration of Detectron2"),
        ("MODEL: {", "cannot be read: line 1"),
        ("X: 2001-99-99", "cannot be read: month must be in"),
        ("MODEL: " + "[" * 3000, "cannot be read"),
        ("MODEL: " + "[" * 30 + "]" * 30, "nested too deeply"),
        ("X: '" + "(" * 5000 + "'\nMODEL: 1", "MODEL is 1, want a map"),
        ("A: " + "x" * (1 << 20), "larger than 1 MiB"),
        ("a: &a [x, x, x, x]\nb: &b [*a, *a, *a, *a]\n" + "".join(
            f"c{n}: &c{n} [{', '.join([f'*c{n - 1}' if n else '*b'] * 4)}]\n" for n in range(9)
        ), "its aliases multiply"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read(written(tmp_path, text))


def test_the_input_is_the_longest_picture_rounded_up_to_what_the_pyramid_needs(tmp_path: Path) -> None:
    config = read(written(tmp_path, "DATASETS: {TRAIN: [coco_2017_train]}\nINPUT: {FORMAT: RGB}"))
    spec = base_spec(config, name="x", task="detect", num_classes=80, size_multiple=32)
    assert spec.input_size == (800, 1344)
    assert spec.size_multiple == 32
    assert spec.resize == ResizeRule(kind="shortest_edge", min_size=800, max_size=1333, pad=None, antialias=True)
    assert (spec.colour, spec.mean, spec.std) == ("rgb", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))
    assert spec.labels == coco.LABELS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("INPUT: {FORMAT: YUV-BT.601}", "INPUT.FORMAT is 'YUV-BT.601'"),
        ("INPUT: {MIN_SIZE_TEST: 0}", "MIN_SIZE_TEST is 0"),
        ("INPUT: {MAX_SIZE_TEST: 700}", "MAX_SIZE_TEST 700"),
        ("MODEL: {PIXEL_MEAN: [0.5]}", "PIXEL_MEAN is .0.5., want three numbers"),
        ("MODEL: {PIXEL_STD: [a, b, c]}", "PIXEL_STD is .* want three numbers"),
    ],
)
def test_an_input_that_no_model_can_have_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        base_spec(read(written(tmp_path, text)), name="x", task="detect", num_classes=3)


def test_rotated_anchors_are_refused(tmp_path: Path) -> None:
    config = read(written(tmp_path, "MODEL: {ANCHOR_GENERATOR: {NAME: RotatedAnchorGenerator}}"))
    with pytest.raises(ModelError, match="RotatedAnchorGenerator"):
        anchor_grid(config, (16,))


def test_anchors_may_be_given_once_for_all_levels(tmp_path: Path) -> None:
    config = read(
        written(tmp_path, "MODEL: {ANCHOR_GENERATOR: {SIZES: [32, 64], ASPECT_RATIOS: [[1.0, 2.0]], OFFSET: 0.5}}")
    )
    grid = anchor_grid(config, (8, 16))
    assert (grid.sizes, grid.aspect_ratios, grid.offset) == (((32, 64),), ((1.0, 2.0),), 0.5)


def test_labels_are_those_of_a_known_data_set_with_as_many_classes() -> None:
    assert labels_of(["mine", "cityscapes_fine_instance_seg_train"], 8) == CITYSCAPES
    assert labels_of(["keypoints_coco_2017_train"], 1) == ("person",)
    assert labels_of(["coco_2017_train"], 2) == ("class_0", "class_1")
    assert labels_of([], 1) == ("class_0",)
