"""What augmentations do to pictures is done to boxes, masks and key points too."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from streamd.datasets import masks, pictures
from streamd.datasets.records import DataSet, Objects, Record, Segment
from streamd.models.spec import KeypointRule, MaskRule, ModelSpec, PanopticRule, ResizeRule
from streamd.train import augment, copy_paste, render, scene
from streamd.train.augment import Augmentation, Sources
from streamd.train.targets import Targets

POINTS = ("left_hand", "right_hand", "nose")
SPEC = ModelSpec(
    name="small",
    task="panoptic",
    labels=("thing",),
    input_size=(96, 128),
    size_multiple=32,
    colour="rgb",
    masks=MaskRule(kind="box"),
    keypoints=KeypointRule(names=POINTS),
    panoptic=PanopticRule(stuff_labels=("things", "grass")),
)
PLAIN = Augmentation.none()
# Every marked object is bright in one channel of its own, on black: two a picture, so that they can be told apart.
CHANNELS = (0, 1)


def changed(**options: Any) -> Augmentation:
    return dataclasses.replace(PLAIN, **options)


def make_record(folder: Path, number: int, size: tuple[int, int], boxes: Sequence[tuple[int, int, int, int]]) -> Record:
    """Paint rectangles, each bright in a channel of its own, and annotate all that can be."""
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    ids = np.full((height, width, 3), (1, 0, 0), np.uint8)
    drawn = []
    for channel, (x1, y1, x2, y2) in zip(CHANNELS, boxes, strict=False):
        inside = np.zeros((height, width), bool)
        inside[y1:y2, x1:x2] = True
        pixels[inside, channel] = 255
        ids[inside] = (2 + channel, 0, 0)
        drawn.append(masks.encode_pixels(inside))
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / f"{number}.png")
    Image.fromarray(ids).save(folder / f"{number}.ids.png")
    corners = np.array(boxes, np.float32).reshape(-1, 4)
    points = np.stack(
        [corners[:, [0, 1]] + 0.5, corners[:, [2, 1]] + (-0.5, 0.5), corners.reshape(-1, 2, 2).mean(1)], 1
    )
    objects = Objects(
        boxes=corners,
        labels=np.array(CHANNELS[: len(boxes)], np.int64),
        is_crowd=np.zeros(len(boxes), bool),
        masks=tuple(drawn),
        keypoints=np.concatenate((points, np.full((len(boxes), 3, 1), 2)), -1).astype(np.float32),
    )
    segments = (Segment(1, 1, False, False), *(Segment(2 + c, 0, True, False) for c in CHANNELS[: len(boxes)]))
    return Record(folder / f"{number}.png", number, width, height, objects, folder / f"{number}.ids.png", segments)


def make_set(folder: Path, sizes: Sequence[tuple[int, int]] = ((80, 60), (50, 90), (200, 150), (60, 60))) -> DataSet:
    records = []
    for number, (width, height) in enumerate(sizes):
        first = (width // 8, height // 6, width // 2, height // 2)
        second = (width // 2 + 4, height // 3, width - 3, height - 5)
        records.append(make_record(folder, number, (width, height), (first, second)))
    return DataSet("marks", ("red", "green"), tuple(records), POINTS, ("things", "grass"))


def draw(
    dataset: DataSet, augmentation: Augmentation, index: int, seed: int, spec: ModelSpec = SPEC
) -> tuple[np.ndarray, Targets, augment.Plan]:
    """Return image [H,W,3] in 0..255, its targets and the plan."""
    sources = Sources([(one.width, one.height) for one in dataset.records], range(len(dataset.records)))
    plan = augment.plan(augmentation, spec, sources, index, np.random.default_rng(seed))

    def read(number: int) -> np.ndarray:
        record = dataset.records[number]
        return pictures.read(record.file, (record.width, record.height))

    image, targets = render.render(plan, dataset, spec, read)
    return image.permute(1, 2, 0).numpy(), targets, plan


def check_marks(image: np.ndarray, targets: Targets, plan: augment.Plan) -> int:
    """Compare every object with the pixels that are bright in its channel, within the layer that it came with."""
    assert targets.masks is not None and targets.keypoints is not None
    num_checked = 0
    for box, label, mask in zip(targets.boxes.numpy(), targets.labels.tolist(), targets.masks.numpy(), strict=True):
        layer = min(plan.layers, key=lambda one: distance(one, box))
        placed = layer.letterbox
        window = np.zeros(mask.shape, bool)
        window[placed.top : placed.top + placed.height, placed.left : placed.left + placed.width] = True
        assert not mask[~window].any()
        bright = (image[..., label] > 200) & window
        dark = (image[..., label] < 20) & window
        assert not (bright & ~mask).any() or borders(bright & ~mask, mask)
        assert not (dark & mask).any() or borders(dark & mask, ~mask & window)
        if bright.any():
            rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
            around = np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            slack = 2 + 0.75 * max(placed.scale_x, placed.scale_y)  # the letterbox cuts a pixel, edges are blurred
            assert np.abs(box - around).max() <= slack, (box, around, layer)
            num_checked += 1
    return num_checked


def borders(few: np.ndarray, many: np.ndarray) -> bool:
    """Tell whether all of the `few` pixels touch the `many`: rounding moves an edge by one."""
    grown = np.zeros(many.shape, bool)
    padded = np.pad(many, 1)
    for down in (0, 1, 2):
        for across in (0, 1, 2):
            grown |= padded[down : down + many.shape[0], across : across + many.shape[1]]
    return bool(grown[few].all())


def distance(layer: augment.Layer, box: np.ndarray) -> float:
    """Return how far a box's middle lies outside of a layer."""
    placed, (x, y) = layer.letterbox, (box[:2] + box[2:]) / 2
    across = max(placed.left - x, x - placed.left - placed.width, 0)
    return float(across + max(placed.top - y, y - placed.top - placed.height, 0))


@pytest.fixture(scope="module")
def marks(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_set(tmp_path_factory.mktemp("marks"))


AUGMENTATIONS = {
    "none": PLAIN,
    "flip": changed(flip=1.0),
    "large-scale jitter": changed(flip=0.5, scale=(0.1, 2.0)),
    "mosaic": changed(flip=0.5, mosaic=1.0),
}
SPECS = {
    "letterbox": SPEC,
    "centred": msgspec.structs.replace(SPEC, resize=ResizeRule(anchor="center")),
    "stretched": msgspec.structs.replace(SPEC, resize=ResizeRule(kind="stretch")),
    "shortest edge": msgspec.structs.replace(
        SPEC, resize=ResizeRule(kind="shortest_edge", min_size=64, max_size=128, pad=None)
    ),
}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_objects_stay_around_their_pixels(marks: DataSet, spec: ModelSpec, augmentation: Augmentation) -> None:
    num_checked = sum(
        check_marks(*draw(marks, augmentation, seed % len(marks.records), seed, spec)) for seed in range(16)
    )
    assert num_checked >= 12


@given(
    sizes=st.lists(st.tuples(st.integers(24, 220), st.integers(24, 220)), min_size=4, max_size=4),
    seed=st.integers(0, 2**31),
    mosaic=st.booleans(),
    scale=st.sampled_from(((1.0, 1.0), (0.5, 2.0), (0.1, 0.4), (3.0, 4.0))),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_picture_keeps_its_objects_in_place(
    tmp_path: Path, sizes: list[tuple[int, int]], seed: int, mosaic: bool, scale: tuple[float, float]
) -> None:
    dataset = make_set(tmp_path / "any", sizes)
    augmentation = changed(flip=0.5, mosaic=float(mosaic), scale=scale, mosaic_scale=scale)
    image, targets, plan = draw(dataset, augmentation, 0, seed)
    check_marks(image, targets, plan)
    boxes, (height, width) = targets.boxes.numpy(), SPEC.input_size
    assert (boxes[:, 2:] > boxes[:, :2]).all() and (boxes >= 0).all() and (boxes <= (width, height) * 2).all()
    assert targets.semantic is not None and set(targets.semantic.unique().tolist()) <= {0, 1, scene.UNLABELLED}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS.values(), ids=AUGMENTATIONS.keys())
def test_semantic_channels_follow_the_pixels(marks: DataSet, augmentation: Augmentation) -> None:
    for seed in range(8):
        image, targets, plan = draw(marks, augmentation, seed % 4, seed)
        semantic = targets.semantic
        assert semantic is not None
        channels = semantic.numpy()
        is_thing = image[..., :2].max(-1) > 200
        is_padding = (image == 114).all(-1)
        assert borders(is_thing & (channels != 0), channels == 0)
        assert borders(is_padding & (channels != scene.UNLABELLED), channels == scene.UNLABELLED)
        assert plan.layers and (channels == 1).any()


def test_mirror_swaps_left_and_right_points(marks: DataSet) -> None:
    _, straight, _ = draw(marks, PLAIN, 0, 0)
    _, turned, _ = draw(marks, changed(flip=1.0), 0, 0)
    assert straight.keypoints is not None and turned.keypoints is not None
    placed = SPEC.letterbox(80, 60)
    expected = straight.keypoints[:, [1, 0, 2]].clone()
    expected[..., 0] = placed.width - expected[..., 0]
    torch.testing.assert_close(turned.keypoints, expected)
    assert scene.mirror_order(("nose", "left_eye", "right_eye", "tail")) == [0, 2, 1, 3]


def test_points_that_are_cut_off_teach_nothing(marks: DataSet) -> None:
    found_cut = 0
    for seed in range(20):
        _, targets, plan = draw(marks, changed(scale=(2.0, 2.0)), 0, seed)
        assert targets.keypoints is not None
        box = plan.layers[0].letterbox
        points = targets.keypoints
        seen = points[..., 2] > 0
        assert (points[~seen] == 0).all()
        assert (points[seen][:, 0] <= box.left + box.width).all() and (points[seen][:, 1] <= box.top + box.height).all()
        found_cut += int((~seen).sum())
    assert found_cut > 0


def test_object_of_which_little_is_left_becomes_a_crowd(tmp_path: Path) -> None:
    record = make_record(tmp_path, 0, (100, 100), [(0, 0, 100, 100), (1, 1, 4, 4)])
    dataset = DataSet("one", ("red", "green"), (record,), POINTS)
    spec = msgspec.structs.replace(SPEC, input_size=(32, 32))
    _, cut, _ = draw(dataset, changed(scale=(4.0, 4.0)), 0, 1, spec)  # shows a sixteenth of the picture
    assert len(cut.boxes) == 0 and len(cut.crowds) == 1
    _, shrunk, _ = draw(dataset, changed(scale=(0.5, 0.5)), 0, 1, spec)
    assert len(shrunk.boxes) == 1 and len(shrunk.crowds) == 1  # the second one has half a pixel


def test_crowds_are_kept_apart(tmp_path: Path) -> None:
    record = make_record(tmp_path, 0, (100, 100), [(0, 0, 50, 50), (50, 50, 90, 90)])
    objects = record.objects
    crowd = Objects(objects.boxes, objects.labels, np.array([False, True]), objects.masks, objects.keypoints)
    dataset = DataSet("one", ("a", "b"), (Record(record.file, 1, 100, 100, crowd),), POINTS)
    _, targets, _ = draw(dataset, PLAIN, 0, 0)
    assert targets.labels.tolist() == [0] and targets.masks is not None and len(targets.masks) == 1
    torch.testing.assert_close(targets.crowds, torch.tensor([[48.0, 48.0, 86.4, 86.4]]))


def test_pasted_objects_cover_what_lies_below_them(tmp_path: Path) -> None:
    below = make_record(tmp_path, 0, (128, 96), [(10, 10, 60, 60), (70, 10, 110, 50)])
    above = make_record(tmp_path, 1, (128, 96), [(40, 30, 90, 80)])
    dataset = DataSet("two", ("red", "green"), (below, above), POINTS)
    sources = Sources([(128, 96)] * 2, (0, 1))
    num_pasted = 0
    for seed in range(24):
        plan = augment.plan(changed(copy_paste=1.0), SPEC, sources, 0, np.random.default_rng(seed))
        assert plan.pasted is not None
        if plan.pasted.record == 0:
            continue
        image, targets = render.render(plan, dataset, SPEC, lambda n: pictures.read(dataset.records[n].file, (128, 96)))
        assert targets.masks is not None and targets.keypoints is not None
        drawn = targets.masks.sum((1, 2)).tolist()
        if len(drawn) == 2:
            continue
        num_pasted += 1
        assert (targets.masks.sum(0) <= 1).all()
        assert drawn == [50 * 50 - 20 * 30, 40 * 40 - 20 * 20, 50 * 50]
        assert targets.boxes.tolist()[2] == [40, 30, 90, 80]
        assert targets.keypoints[0, 2, 2] == 2 and targets.keypoints[1, 0, 2] == 2
        bright = torch.stack([image[label] > 200 for label in targets.labels.tolist()])
        assert (bright & targets.masks).sum((1, 2)).tolist() == drawn
    assert num_pasted > 3


def test_point_under_a_pasted_object_is_hidden() -> None:
    covered = np.zeros((10, 10), bool)
    covered[2:5, 2:5] = True
    points = np.array([[[3, 3, 2], [8, 8, 2], [3, 3, 1], [3, 3, 0]]], np.float32)
    assert copy_paste.hidden_under(points, covered)[0, :, 2].tolist() == [1, 2, 1, 0]


def test_without_masks_nothing_is_pasted_and_mosaics_have_none(marks: DataSet) -> None:
    sources = Sources([(80, 60)] * 4, (1, 2))
    for seed in range(10):
        random = np.random.default_rng(seed)
        assert augment.plan(changed(copy_paste=1.0), SPEC, sources, 0, random).pasted is None
        plan = augment.plan(changed(copy_paste=1.0, mosaic=1.0), SPEC, sources, 1, random)
        assert {layer.record for layer in plan.layers} <= {1, 2}
    bare = marks.records[1]
    objects = Objects(bare.objects.boxes, bare.objects.labels, bare.objects.is_crowd)
    records = (marks.records[0], Record(bare.file, 1, bare.width, bare.height, objects))
    dataset = DataSet("mixed", marks.labels, records)
    found = [draw(dataset, changed(mosaic=1.0), 0, seed) for seed in range(10)]
    for _, targets, plan in found:
        assert (targets.masks is None) == any(layer.record == 1 for layer in plan.layers)


def test_plain_epochs_have_neither_mosaic_nor_paste() -> None:
    sources = Sources([(80, 60)] * 4, (0, 1, 2, 3))
    wild = changed(mosaic=1.0, copy_paste=1.0)
    plan = augment.plan(wild, SPEC, sources, 0, np.random.default_rng(0), plain=True)
    assert len(plan.layers) == 1 and plan.pasted is None


def test_smallest_of_too_many_objects_become_crowds(tmp_path: Path) -> None:
    num = 130
    boxes = np.array([(0, 0, 5 + number / 4, 5) for number in range(num)], np.float32)
    one = masks.encode_pixels(np.ones((40, 40), bool))
    objects = Objects(boxes, np.zeros(num, np.int64), np.zeros(num, bool), (one,) * num)
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "a.png")
    dataset = DataSet("many", ("a",), (Record(tmp_path / "a.png", 1, 40, 40, objects),))
    _, targets, _ = draw(dataset, PLAIN, 0, 0)
    assert (len(targets.boxes), len(targets.crowds)) == (100, 30)
    assert targets.boxes[:, 2].min() > targets.crowds[:, 2].max()
    detector = msgspec.structs.replace(SPEC, masks=None)
    assert len(draw(dataset, PLAIN, 0, 0, detector)[1].boxes) == num


def test_colours_change_within_the_picture_alone_and_grey_stays_grey(tmp_path: Path) -> None:
    pixels = np.full((40, 80, 3), 100, np.uint8)
    pixels[:, 40:] = (200, 60, 60)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    nothing = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    dataset = DataSet("grey", ("a",), (Record(tmp_path / "a.png", 1, 80, 40, nothing),))
    seen = set()
    for seed in range(6):
        for colour in ("rgb", "bgr"):
            spec = msgspec.structs.replace(SPEC, colour=colour)
            image, _, _ = draw(dataset, Augmentation(flip=0.0, hue=0.1, saturation=0.5, value=0.3), 0, seed, spec)
            assert (image[64:] == 114).all()
            grey = image[:60, :60]
            np.testing.assert_allclose(grey, np.broadcast_to(grey[..., :1], grey.shape), atol=1e-3)
            assert 70 <= grey.mean() <= 130
            order = (0, 1, 2) if colour == "rgb" else (2, 1, 0)
            seen.add(tuple(np.round(image[30, 110, order]).tolist()))
    assert len(seen) == 6  # rgb and bgr agree, and each seed differs


def test_image_is_normalised_in_the_order_of_the_spec(marks: DataSet) -> None:
    spec = msgspec.structs.replace(
        SPEC, colour="bgr", mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 5.0), resize=ResizeRule(pad=None)
    )
    image, _, plan = draw(marks, changed(mosaic=1.0), 0, 3, spec)
    plain, _, _ = draw(marks, changed(mosaic=1.0), 0, 3, msgspec.structs.replace(spec, mean=(0,) * 3, std=(1,) * 3))
    inside = np.zeros(image.shape[:2], bool)
    for layer in plan.layers:
        box = layer.letterbox
        inside[box.top : box.top + box.height, box.left : box.left + box.width] = True
    expected = (plain - (10, 20, 30)) / (2, 4, 5)
    np.testing.assert_allclose(image[inside], expected[inside], atol=1e-4)
    assert (image[~inside] == 0).all()  # the padding is the mean


def test_input_sizes_are_multiples_and_keep_the_shape() -> None:
    augmentation = changed(multi_scale=(0.5, 1.5))
    spec = msgspec.structs.replace(SPEC, input_size=(320, 640), size_multiple=16)
    sizes = {augment.input_size(augmentation, spec, np.random.default_rng(seed)) for seed in range(200)}
    assert len(sizes) > 8
    assert all(height % 32 == 0 and width % 32 == 0 and abs(width / height - 2) < 0.3 for height, width in sizes)
    assert {augment.input_size(PLAIN, spec, np.random.default_rng(seed)) for seed in range(9)} == {(320, 640)}
    shortest = msgspec.structs.replace(
        spec, resize=ResizeRule(kind="shortest_edge", min_size=320, max_size=640, pad=None)
    )
    smaller = augment.at_size(shortest, (160, 320))
    assert (smaller.resize.min_size, smaller.resize.max_size) == (160, 320)
    placed = smaller.letterbox(640, 480)
    assert (placed.width, placed.height) == (213, 160)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"flip": 1.5}, "flip is 1.5, expected 0 to 1"),
        ({"hue": 0.6}, "hue is 0.6"),
        ({"scale": (2.0, 1.0)}, "scale is \\(2.0, 1.0\\)"),
        ({"multi_scale": (0.0, 1.0)}, "multi_scale"),
        ({"mosaic": float("nan")}, "mosaic is nan"),
        ({"last_epochs_plain": -1}, "last_epochs_plain is -1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        Augmentation(**options)  # type: ignore[arg-type]


def test_every_option_says_what_it_does() -> None:
    descriptions = Augmentation.descriptions()
    assert set(descriptions) == set(Augmentation.__slots__)
    assert all(text.endswith(".") for text in descriptions.values())


def test_recipes_refuse_options_that_do_not_exist() -> None:
    read = TypeAdapter(Augmentation)
    assert read.validate_python({"mosaic": 0.5, "scale": (0.5, 1.5)}) == Augmentation(mosaic=0.5, scale=(0.5, 1.5))
    with pytest.raises(ValidationError, match="mosiac"):
        read.validate_python({"mosiac": 0.5})
    with pytest.raises(ValidationError, match="flip is 2"):
        read.validate_python({"flip": 2})


def test_page_on_data_has_every_option_with_its_default() -> None:
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text("utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("|")]
    found = {key: yaml.safe_load(default) for key, default in rows if key in Augmentation.__slots__}
    expected = dataclasses.asdict(Augmentation())
    assert {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()} == expected
