"""What an artifact promises: whether its spec makes sense, and whether the network does what the spec says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from streamd.errors import ModelError
from streamd.messages import RawOutput
from streamd.models.spec import DensePoseRule, ModelSpec

SCHEMA = 1
MAX_SIDE = 8192  # input pixels

# The rules that a task needs, of ModelSpec's fields; those that it may have besides.
_RULES: Mapping[str, tuple[set[str], set[str]]] = {
    "detect": (set(), set()),
    "segment": ({"masks"}, set()),
    "keypoints": ({"keypoints"}, {"masks"}),
    "densepose": ({"densepose"}, {"masks", "keypoints"}),
    "panoptic": ({"masks", "panoptic"}, {"keypoints"}),
    "semantic": (set(), set()),
}

Shape = list[int | str]  # a name stands for a number that must be the same wherever the name is


def describe_wrong_spec(spec: ModelSpec) -> str | None:
    """Say what in a spec contradicts the rest of it; None where all is well."""
    needed, allowed = _RULES[spec.task]
    present = {name for name in ("masks", "keypoints", "densepose", "panoptic") if getattr(spec, name) is not None}
    if spec.schema != SCHEMA:
        return f"schema is {spec.schema}, this streamd reads {SCHEMA}"
    if not spec.labels:
        return "labels is empty"
    if not 1 <= min(spec.input_size) <= max(spec.input_size) <= MAX_SIDE:
        return f"input_size is {list(spec.input_size)}, both must be positive, and at most {MAX_SIDE}"
    if spec.size_multiple < 1 or any(side % spec.size_multiple for side in spec.input_size):
        return f"input_size is {list(spec.input_size)}, both must be multiples of size_multiple {spec.size_multiple}"
    if 0.0 in spec.std:
        return "std holds a 0, which would be divided by"
    if missing := needed - present:
        return f"task is {spec.task!r} without a rule for {', '.join(sorted(missing))}"
    if unused := present - needed - allowed:
        return f"task is {spec.task!r} with a rule for {', '.join(sorted(unused))}"
    if (rule := spec.densepose) and not _is_sound(rule):
        return (
            f"densepose has num_parts {rule.num_parts}, num_coarse {rule.num_coarse} and up_scale {rule.up_scale}; "
            "want 1 to 255, 2 to 255, 1 to 16"
        )
    if spec.resize.kind == "shortest_edge" and not 1 <= spec.resize.min_size <= spec.resize.max_size:
        return f"resize has min_size {spec.resize.min_size} and max_size {spec.resize.max_size}"
    if spec.sized and spec.resize.anchor != "top_left":
        return "a sized model needs its pictures at the top left"
    return None


def _is_sound(rule: DensePoseRule) -> bool:
    return 1 <= rule.num_parts <= 255 and 2 <= rule.num_coarse <= 255 and 1 <= rule.up_scale <= 16


def check_output(output: object, spec: ModelSpec, num_images: int, path: Path) -> None:
    """Raise ModelError unless the output of `forward` has the names and shapes that `spec` promises."""
    expected = _expected_shapes(output, spec, num_images)
    if not isinstance(output, dict) or not all(isinstance(output.get(name), Tensor) for name in expected):
        got = sorted(map(str, output)) if isinstance(output, dict) else type(output).__name__
        raise ModelError(f"{path}: forward must return a dict of tensors with the keys {list(expected)}, got {got}")
    wrong = _mismatches({name: output[name] for name in expected}, expected)
    if "labels" in expected and output["labels"].dtype != torch.int64:
        wrong.append(f"labels are {output['labels'].dtype}, not torch.int64")
    if wrong:
        raise ModelError(
            f"{path}: forward gives wrong shapes for {num_images} image(s) and {len(spec.labels)} labels: "
            f"{'; '.join(wrong)}; want {', '.join(f'{name} {_as_text(shape)}' for name, shape in expected.items())}"
        )


def check_method(name: str, output: object, boxes: Tensor, spec: ModelSpec, path: Path) -> None:
    """Raise ModelError unless the output of a method beside `forward` for `boxes` [B,N,4] fits `spec`."""
    num_images, num_boxes = boxes.shape[:2]
    channels: Shape = []
    if spec.keypoints and name == "keypoints":
        channels = [len(spec.keypoints.names)]
    if spec.densepose and name == "densepose":
        channels = [spec.densepose.num_channels]
    expected: Shape = [num_images, num_boxes, *channels, "S", "S"]
    if not isinstance(output, Tensor) or _mismatches({name: output}, {name: expected}):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ModelError(
            f"{path}: the method {name} gives {got} for boxes of shape {list(boxes.shape)}; want {_as_text(expected)}"
        )


def pack(output: Mapping[str, Tensor]) -> RawOutput:
    """Name the outputs of a `forward` that was checked; a semantic model has no candidates."""
    candidates = {name: output[name] for name in ("boxes", "scores", "labels") if name in output}
    semantic = output.get("semantic")
    if "boxes" not in output and semantic is not None:
        empty = semantic.new_zeros(len(semantic), 0, dtype=torch.float32)
        candidates = {"boxes": empty[..., None].expand(-1, -1, 4), "scores": empty, "labels": empty.long()}
    num_features = sum(name.startswith("features.") for name in output)
    return RawOutput(
        **candidates,
        prototypes=output.get("prototypes"),
        coefficients=output.get("coefficients"),
        features=tuple(output[f"features.{index}"] for index in range(num_features)),
        semantic=semantic,
    )


def _expected_shapes(output: object, spec: ModelSpec, num_images: int) -> dict[str, Shape]:
    """Say which outputs `spec` promises, in the form that `output` has chosen: pairs, or scores for each label."""
    names = set(output) if isinstance(output, dict) else set()
    expected: dict[str, Shape] = {}
    if spec.task != "semantic":
        expected["boxes"] = [num_images, "K", 4]
        is_pairs = "labels" in names
        expected["scores"] = [num_images, "K"] if is_pairs else [num_images, "K", len(spec.labels)]
        if is_pairs:
            expected["labels"] = [num_images, "K"]
    if spec.masks and spec.masks.kind == "prototype":
        expected["coefficients"] = [num_images, "K", "P"]
        expected["prototypes"] = [num_images, "P", "h", "w"]
    if spec.methods:
        num_features = max(1, sum(str(name).startswith("features.") for name in names))
        for index in range(num_features):
            expected[f"features.{index}"] = [num_images, f"D{index}", f"h{index}", f"w{index}"]
    if spec.semantic_labels:
        expected["semantic"] = [num_images, len(spec.semantic_labels), "h_s", "w_s"]
    return expected


def _mismatches(tensors: Mapping[str, Tensor], expected: Mapping[str, Shape]) -> list[str]:
    """Name the tensors whose shape is not as expected; the first tensor with a name says what it stands for."""
    known: dict[str, int] = {}
    return [
        f"{name} is {list(tensor.shape)}"
        for name, tensor in tensors.items()
        if not _fits(list(tensor.shape), expected[name], known)
    ]


def _fits(shape: list[int], expected: Shape, known: dict[str, int]) -> bool:
    if len(shape) != len(expected):
        return False
    pairs = zip(shape, expected, strict=True)
    return shape == [known.setdefault(side, got) if isinstance(side, str) else side for got, side in pairs]


def _as_text(shape: Shape) -> str:
    return f"[{','.join(map(str, shape))}]"
