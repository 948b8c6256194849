"""Reading data sets: every format, and everything that can be wrong in one."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from streamd.datasets import data, masks, pictures
from streamd.datasets.findings import Kind
from streamd.datasets.records import DataSet
from streamd.errors import DataError
from tests.train_data import make_shapes

SIZE = (40, 30)  # width, height


def save_picture(file: Path, size: tuple[int, int] = SIZE, **options: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, **options)


def annotation(number: int = 1, **changes: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 1, "category_id": 7, "bbox": [4.0, 5.0, 10.0, 8.0], "iscrowd": 0} | changes


def coco(**changes: Any) -> dict[str, Any]:
    """Return a sound file of one picture with one object; `changes` replace its lists."""
    image = {"id": 1, "file_name": "a.jpg", "width": SIZE[0], "height": SIZE[1]}
    categories = [{"id": 9, "name": "cup"}, {"id": 7, "name": "box"}]
    return {"images": [image], "annotations": [annotation()], "categories": categories} | changes


@pytest.fixture
def read_coco(tmp_path: Path) -> Callable[..., DataSet]:
    """Read a COCO file that differs in some lists from the sound one."""
    save_picture(tmp_path / "images" / "a.jpg")

    def read(*, deep: bool = False, **changes: Any) -> DataSet:
        (tmp_path / "train.json").write_text(json.dumps(coco(**changes)))
        return data.read(tmp_path / "train.json", deep=deep)

    return read


def only_problem(dataset: DataSet) -> tuple[str, str, str]:
    assert len(dataset.problems) == 1, dataset.problems
    problem = dataset.problems[0]
    return problem.kind, problem.place, problem.text


def test_labels_are_numbered_by_rising_category_id(read_coco: Callable[..., DataSet]) -> None:
    dataset = read_coco()
    assert dataset.labels == ("box", "cup")
    record = dataset.records[0]
    assert (record.width, record.height, record.image_id) == (*SIZE, 1)
    np.testing.assert_array_equal(record.objects.boxes, [[4, 5, 14, 13]])
    assert record.objects.labels.tolist() == [0]
    assert record.objects.masks is None and record.objects.keypoints is None
    assert not dataset.problems


@pytest.mark.parametrize(
    ("changes", "kind", "text"),
    [
        ({"bbox": [50, 5, 10, 8]}, "box outside", "50 5 60 13"),
        ({"bbox": [-9, -8, 9, 8]}, "box outside", "lies outside the 40 x 30 pixels"),
        ({"bbox": [4, 5, 0, 8]}, "no area", "0 x 8 pixels"),
        ({"bbox": [4, 5, 6, -2]}, "no area", "6 x -2 pixels"),
        ({"bbox": [4, 5, float("nan"), 8]}, "bad box", "not four finite numbers"),
        ({"bbox": [4, 5, 6]}, "bad box", "[4, 5, 6]"),
        ({"bbox": [4, 5, "6", 7]}, "bad box", "not four finite numbers"),
        ({"bbox": "4 5 6 7"}, "bad box", "not four finite numbers"),
        ({"bbox": [4, 5, 10**400, 7]}, "bad box", "not four finite numbers"),
        ({"bbox": None}, "bad box", "neither a box nor a sound mask"),
        ({"category_id": 8}, "unknown category", "no category has the id 8"),
        ({"category_id": [7]}, "unknown category", "no category has the id [7]"),
        ({"image_id": 3}, "unknown picture", "no picture has the id 3"),
        ({"image_id": "1"}, "bad record", "needs an integer 'image_id'"),
        ({"iscrowd": 2}, "bad record", "'iscrowd' is 2"),
        ({"id": 1}, "duplicate id", "an earlier annotation has this id"),
        ({"bbox": [4.0, 5.0, 10.0, 8.0]}, "duplicate box", "the same label and box"),
    ],
)
def test_bad_annotation_is_listed_and_dropped(
    read_coco: Callable[..., DataSet], changes: dict[str, Any], kind: str, text: str
) -> None:
    bad = annotation(2, bbox=[1, 1, 5, 5]) | changes
    dataset = read_coco(annotations=[annotation(), bad])
    found = only_problem(dataset)
    assert found[0] == kind and text in found[2] and found[1].startswith("train.json: annotation")
    np.testing.assert_array_equal(dataset.records[0].objects.boxes, [[4, 5, 14, 13]])


def test_box_that_leaves_the_picture_is_cut_and_said_so(read_coco: Callable[..., DataSet]) -> None:
    dataset = read_coco(annotations=[annotation(804, bbox=[30, 20, 20, 20])])
    assert only_problem(dataset)[:2] == ("box clipped", "train.json: annotation 804")
    np.testing.assert_array_equal(dataset.records[0].objects.boxes, [[30, 20, 40, 30]])


def test_box_that_is_rounded_over_the_edge_is_cut_in_silence(read_coco: Callable[..., DataSet]) -> None:
    dataset = read_coco(annotations=[annotation(bbox=[30, 20, 10.6, 10.4])])
    assert not dataset.problems
    np.testing.assert_array_equal(dataset.records[0].objects.boxes, [[30, 20, 40, 30]])


@pytest.mark.parametrize(
    ("segmentation", "text"),
    [
        ([[1, 2, 3, 4]], "at least three pairs"),
        ([[1, 2, 3, 4, 5, 6, 7]], "at least three pairs"),
        ([[1, 2, 3, 4, 5, float("inf")]], "no finite number"),
        ([7], "at least three pairs"),
        ("abc", "neither polygons nor run lengths"),
        ({"size": [3, 3], "counts": [9]}, "has the size [3, 3]"),
        ({"size": [30, 40], "counts": [5, 5]}, "add up to 10 pixels"),
        ({"size": [30, 40], "counts": [1300, -100]}, "neither a string nor a list"),
        ({"size": [30, 40], "counts": "not run lengths"}, "damaged"),
        ({"size": [30, 40], "counts": "o" * 200}, "damaged"),
    ],
)
def test_picture_with_a_bad_mask_counts_as_one_without_masks(
    read_coco: Callable[..., DataSet], segmentation: object, text: str
) -> None:
    sound = annotation(segmentation=[[4, 5, 14, 5, 14, 13, 4, 13]])
    dataset = read_coco(annotations=[sound, annotation(2, bbox=[1, 1, 5, 5], segmentation=segmentation)])
    assert [problem.kind for problem in dataset.problems] == ["bad mask", "missing mask"]
    assert text in dataset.problems[0].text
    assert len(dataset.records[0].objects.boxes) == 2
    assert dataset.records[0].objects.masks is None


def test_masks_of_all_three_forms_are_the_same_pixels(read_coco: Callable[..., DataSet]) -> None:
    expected = np.zeros((30, 40), bool)
    expected[5:13, 4:14] = True
    runs = np.flatnonzero(np.diff(np.concatenate(([0], expected.T.reshape(-1), [0])).astype(int)))
    counts = np.diff([0, *runs, expected.size]).tolist()
    compressed = masks.encode_pixels(expected)
    forms = [
        [[4, 5, 14, 5, 14, 13, 4, 13]],
        {"size": [30, 40], "counts": counts},
        {"size": [30, 40], "counts": compressed["counts"].decode()},
    ]
    for form in forms:
        dataset = read_coco(annotations=[annotation(segmentation=form, bbox=None)])
        found = dataset.records[0].objects
        assert found.masks is not None and not dataset.problems
        np.testing.assert_array_equal(masks.decode(found.masks[0]), expected)
        np.testing.assert_array_equal(found.boxes, [[4, 5, 14, 13]])


def test_polygon_of_enormous_coordinates_is_cut_to_the_picture(read_coco: Callable[..., DataSet]) -> None:
    dataset = read_coco(annotations=[annotation(segmentation=[[-1e12, -1e12, 1e12, -1e12, 1e12, 1e12, -1e12, 1e12]])])
    found = dataset.records[0].objects.masks
    assert found is not None and masks.decode(found[0]).all()


def test_picture_says_itself_whether_it_has_masks(read_coco: Callable[..., DataSet]) -> None:
    image = coco()["images"][0]
    with_mask = annotation(segmentation=[[4, 5, 14, 5, 14, 13, 4, 13]])
    unsaid = read_coco(images=[image | {"has_masks": False}], annotations=[with_mask])
    assert unsaid.records[0].objects.masks is None
    empty = read_coco(images=[image | {"has_masks": True}], annotations=[])
    assert empty.records[0].objects.masks == ()


@pytest.mark.parametrize("points", [[1.0, 2.0], [1.0, 2.0, 5, 3.0, 4.0, 1], [1.0, float("nan"), 2, 3.0, 4.0, 1], "xyv"])
def test_bad_keypoints_are_left_out_and_their_object_stays(read_coco: Callable[..., DataSet], points: object) -> None:
    categories = [{"id": 7, "name": "person", "keypoints": ["left_eye", "right_eye"]}]
    dataset = read_coco(categories=categories, annotations=[annotation(keypoints=points)])
    assert only_problem(dataset)[0] == "bad keypoints"
    assert dataset.keypoint_names == ("left_eye", "right_eye")
    np.testing.assert_array_equal(dataset.records[0].objects.keypoints, np.zeros((1, 2, 3)))


def test_unmarked_keypoints_have_no_place(read_coco: Callable[..., DataSet]) -> None:
    categories = [{"id": 7, "name": "person", "keypoints": ["nose", "tail"]}]
    dataset = read_coco(categories=categories, annotations=[annotation(keypoints=[5, 6, 2, 7, 8, 0])])
    np.testing.assert_array_equal(dataset.records[0].objects.keypoints, [[[5, 6, 2], [0, 0, 0]]])


def test_pictures_that_cannot_be_used_are_listed_and_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("sound.jpg", "twice.jpg", "cut.jpg", "other_size.jpg"):
        save_picture(folder / name)
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no picture")
    Image.fromarray(np.zeros((30, 40), np.uint16)).save(folder / "deep.png")
    names = ["sound.jpg", "gone.jpg", "text.jpg", "deep.png", "other_size.jpg", "sound.jpg", "cut.jpg"]
    images: list[Any] = [
        {"id": number, "file_name": name, "width": 40, "height": 31 if name == "other_size.jpg" else 30}
        for number, name in enumerate(names, start=1)
    ]
    images += [{"id": 1, "file_name": "twice.jpg", "width": 40, "height": 30}, {"id": 99}, "x", {"file_name": "a\0"}]
    images += [{"id": 50, "file_name": "too_long" * 40}, {"id": 51, "file_name": "half of a character: \ud800"}]
    (tmp_path / "a.json").write_text(json.dumps(coco(images=images)))
    dataset = data.read(tmp_path, deep=True)
    assert [record.file.name for record in dataset.records] == ["sound.jpg"]
    kinds = Counter(problem.kind for problem in dataset.problems)
    expected = {"missing file": 2, "unreadable picture": 3, "size differs": 1, "duplicate picture": 1}
    assert kinds == expected | {"duplicate id": 1, "bad record": 4}
    shallow = data.read(tmp_path)
    assert [record.file.name for record in shallow.records] == ["sound.jpg", "cut.jpg"]
    with pytest.raises(DataError, match=r"cut\.jpg: cannot read the picture: .*data check --deep"):
        pictures.read(shallow.records[1].file, SIZE)


def test_picture_is_turned_where_the_annotations_are_of_the_turned_one(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise brings it upright
    save_picture(tmp_path / "a.jpg", (30, 40), exif=exif, quality=100, subsampling=0)
    stored = pictures.read(tmp_path / "a.jpg", (30, 40))
    assert pictures.inspect(tmp_path / "a.jpg", (30, 40)) == (30, 40)
    assert pictures.inspect(tmp_path / "a.jpg", (40, 30)) == (40, 30)
    np.testing.assert_array_equal(pictures.read(tmp_path / "a.jpg", (40, 30)), np.rot90(stored, -1))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"images": [', "line 1, column 13: not valid JSON"),
        ("[1, 2]", "expected an object, got a list"),
        ('{"images": []}', "the key 'annotations' is missing (it has 'images')"),
        ('{"images": {}, "annotations": [], "categories": []}', "images: expected a list, got dict"),
        ('{"images": [], "annotations": [], "categories": []}', "the list is empty"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "categories[0]: expected an integer 'id'"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "the id 1 is there 2 times",
        ),
        ("\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_bad_file_stops_with_one_error_that_names_the_place(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "bad.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as caught:
        data.read(file)
    assert str(caught.value).startswith(str(file)) and expected in str(caught.value)


def test_wrong_folders_and_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file or folder"):
        data.read(tmp_path / "nothing")
    with pytest.raises(DataError, match="no data set was found here; expected a JSON file"):
        data.read(tmp_path)
    for name in ("instances_train2017.json", "instances_val2017.json"):
        (tmp_path / name).write_text(json.dumps(coco()))
    with pytest.raises(DataError, match="2 JSON files fit; name one of them: instances_train2017"):
        data.read(tmp_path)
    with pytest.raises(DataError, match="no JSON file fits the split 'test'"):
        data.read(tmp_path, split="test")
    with pytest.raises(DataError, match=r"none of its pictures \(a.jpg, ...\) was found"):
        data.read(tmp_path, split="val")
    with pytest.raises(DataError, match="there is no such folder of pictures"):
        data.read(tmp_path, split="val", images=tmp_path / "pictures")
    (tmp_path / "val2017").mkdir()
    save_picture(tmp_path / "val2017" / "a.jpg")
    assert len(data.read(tmp_path, split="val").records) == 1
    with pytest.raises(DataError, match="is not panoptic, but the format says panoptic"):
        data.read(tmp_path, split="val", format="panoptic")


def test_data_set_without_a_usable_picture_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no picture")
    (tmp_path / "a.json").write_text(json.dumps(coco()))
    with pytest.raises(DataError, match=r"no picture is usable: unreadable picture \(1\); the first: a.json: image 1"):
        data.read(tmp_path)


def test_fingerprint_changes_with_annotations_and_pictures_but_not_with_the_folder(tmp_path: Path) -> None:
    prints = set()
    for name, box, size in (("a", 4, SIZE), ("b", 4, SIZE), ("c", 5, SIZE), ("d", 4, (40, 31))):
        save_picture(tmp_path / name / "a.jpg", size)
        image = coco()["images"][0] | {"width": size[0], "height": 30 if name != "d" else 31}
        content = coco(images=[image], annotations=[annotation(bbox=[box, 5, 9, 9])])
        (tmp_path / name / "x.json").write_text(json.dumps(content))
        prints.add(data.read(tmp_path / name).fingerprint)
    assert len(prints) == 3


def voc_xml(*boxes: tuple[str, float, float, float, float], filename: str = "a.jpg", extra: str = "") -> str:
    objects = "".join(
        f"<object><name>{name}</name>{extra}<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax>"
        f"<ymax>{y2}</ymax></bndbox></object>"
        for name, x1, y1, x2, y2 in boxes
    )
    size = f"<size><width>{SIZE[0]}</width><height>{SIZE[1]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{filename}</filename>{size}{objects}</annotation>"


@pytest.fixture
def voc_folder(tmp_path: Path) -> Path:
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for stem, box in (("a", ("dog", 5, 6, 14, 13)), ("b", ("cat", 1, 1, 40, 30))):
        (tmp_path / "Annotations" / f"{stem}.xml").write_text(voc_xml(box, filename="wrong.jpg"))
        save_picture(tmp_path / "JPEGImages" / f"{stem}.jpg")
    (tmp_path / "ImageSets/Main/train.txt").write_text("a\n")
    return tmp_path


def test_voc_corners_count_from_one_and_labels_are_those_of_all_splits(voc_folder: Path) -> None:
    dataset = data.read(voc_folder, split="train")
    assert dataset.labels == ("cat", "dog")
    assert [record.file.name for record in dataset.records] == ["a.jpg"]
    np.testing.assert_array_equal(dataset.records[0].objects.boxes, [[4, 5, 14, 13]])
    assert len(data.read(voc_folder).records) == 2
    with pytest.raises(DataError, match=r"cannot read the split 'tset'; there are: train"):
        data.read(voc_folder, split="tset")


def test_difficult_objects_of_voc_are_crowds(voc_folder: Path) -> None:
    (voc_folder / "Annotations/a.xml").write_text(
        voc_xml(("dog", 5, 6, 14, 13), extra="<difficult>1</difficult>", filename="a.jpg")
    )
    assert data.read(voc_folder, split="train").records[0].objects.is_crowd.tolist() == [True]


ENTITIES = '<!DOCTYPE a [<!ENTITY b "bbbb"><!ENTITY c "&b;&b;&b;&b;">]><annotation>&c;</annotation>'


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        (ENTITIES, "unreadable annotation", "declares a document type"),
        ("<annotation><object>", "unreadable annotation", "not valid XML"),
        ("", "unreadable annotation", "not valid XML"),
        (voc_xml(("dog", 9, 9, 9, 9)), "no area", "0 x 0"),
        (voc_xml(("", 9, 9, 12, 12)), "unknown category", "no name"),
        (voc_xml(("dog", 9, 9, float("nan"), 12)), "bad box", "finite"),
        ("<annotation><object><name>dog</name></object></annotation>", "bad box", "finite"),
    ],
)
def test_bad_xml_is_listed_with_its_name(voc_folder: Path, text: str, kind: str, expected: str) -> None:
    (voc_folder / "Annotations/c.xml").write_text(text)
    save_picture(voc_folder / "JPEGImages/c.jpg")
    dataset = data.read(voc_folder)
    found = only_problem(dataset)
    assert found[0] == kind and found[1].startswith("c.xml") and expected in found[2]
    if kind != "unreadable annotation":
        assert len(dataset.records[2].objects.boxes) == 0


def test_voc_split_that_names_no_file_is_listed(voc_folder: Path) -> None:
    (voc_folder / "ImageSets/Main/train.txt").write_text("a  1\nz -1\n\n")
    assert only_problem(data.read(voc_folder, split="train"))[:2] == ("missing file", "train.txt: z")


@pytest.fixture
def yolo_folder(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        save_picture(tmp_path / "images/train" / f"{name}.jpg")
    (tmp_path / "labels/train").mkdir(parents=True)
    (tmp_path / "labels/train/a.txt").write_text("1 0.5 0.5 0.25 0.2\n0 0.1 0.1 0.6 0.1 0.6 0.5 0.1 0.5\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\nnames: {0: cup, 1: box}\n")
    return tmp_path


def test_yolo_boxes_and_polygons_are_parts_of_the_sides(yolo_folder: Path) -> None:
    (yolo_folder / "labels/train/b.txt").write_text("0 0.1 0.1 0.6 0.1 0.6 0.5 0.1 0.5\n")
    dataset = data.read(yolo_folder)
    assert dataset.labels == ("cup", "box")
    first, second = dataset.records
    np.testing.assert_allclose(first.objects.boxes, [[15, 12, 25, 18], [4, 3, 24, 15]], atol=1e-5)
    assert first.objects.labels.tolist() == [1, 0]
    assert first.objects.masks is None  # the first of its objects has no polygon
    assert second.objects.masks is not None
    assert masks.decode(second.objects.masks[0]).sum() == 20 * 12
    assert only_problem(dataset)[0] == "missing mask"


def test_yolo_boxes_are_read_as_supervision_reads_them(yolo_folder: Path) -> None:
    import supervision as sv

    labels = yolo_folder / "labels/train"
    generator = np.random.default_rng(0)
    for file in labels.glob("*.txt"):
        centres, sides = generator.uniform(0.3, 0.7, (6, 2)), generator.uniform(0.05, 0.5, (6, 2))
        rows = zip(generator.integers(0, 2, 6), centres, sides, strict=True)
        file.write_text("".join(f"{label} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for label, (x, y), (w, h) in rows))
    dataset = data.read(yolo_folder, split="train")
    theirs = sv.DetectionDataset.from_yolo(
        str(yolo_folder / "images/train"), str(labels), str(yolo_folder / "data.yaml")
    )
    found = {Path(path).name: detections for path, detections in theirs.annotations.items()}
    assert len(dataset.records) > 0
    for record in dataset.records:
        expected = found[record.file.name]
        np.testing.assert_allclose(record.objects.boxes, expected.xyxy, atol=1e-3)
        np.testing.assert_array_equal(record.objects.labels, expected.class_id)


def test_picture_of_yolo_without_a_text_file_has_no_objects(yolo_folder: Path) -> None:
    (yolo_folder / "labels/train/a.txt").write_text("1 0.5 0.5 0.25 0.2\n")
    dataset = data.read(yolo_folder / "data.yaml", split="train")
    assert [len(record.objects.boxes) for record in dataset.records] == [1, 0]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("0 0.5 0.5 0.25", "bad record"),
        ("0 0.5 x 0.25 0.2", "bad record"),
        ("nan 0.5 0.5 0.25 0.2", "bad record"),
        ("2 0.5 0.5 0.25 0.2", "unknown category"),
        ("-1 0.5 0.5 0.25 0.2", "unknown category"),
        ("0 1.9 0.5 0.25 0.2", "box outside"),
        ("0 0.5 0.5 0 0.2", "no area"),
        ("0 nan 0.5 0.25 0.2", "bad box"),
        ("0 0.1 0.1 0.6 0.1 0.6 0.5 0.1", "bad record"),
        ("1 0.5 0.5 0.25 0.2", "duplicate box"),
    ],
)
def test_bad_line_of_yolo_is_listed_with_its_number(yolo_folder: Path, line: str, kind: str) -> None:
    (yolo_folder / "labels/train/a.txt").write_text(f"1 0.5 0.5 0.25 0.2\n\n{line}\n")
    dataset = data.read(yolo_folder)
    assert only_problem(dataset)[:2] == (kind, "a.txt: line 3")
    assert len(dataset.records[0].objects.boxes) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: [", "not valid YAML"),
        ("train: images/train", "the key 'names' is missing"),
        ("names: []\ntrain: images/train", "expected a list of names"),
        ("names: {0: a, 2: b}\ntrain: images/train", "the numbers must be 0 to 1"),
        ("names: [a, a]\ntrain: images/train", "a name is there twice"),
        ("names: [a]", "say which split to read; it has: none"),
        ("names: [a]\ntrain: x\nval: y", "say which split to read; it has: train, val"),
        ("names: [a]\ntrain: x", "train: there is no"),
        (f"names: [a]\ntrain: {'x' * 300}", "train: there is no"),
        ("names: [a]\ntrain: /dev/zero", "train: there is no"),
        ('names: ["\\ud800"]\ntrain: images/train', "half of a character"),
        ("names: [a]\n" + "#" * (4 << 20), "larger than 4 MiB"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nnames: [*b, *b]\ntrain: y", "expected a list of names"),
        ("names: [a]\ntrain: {x: y}", "expected a folder"),
        ("names: [a]\nkpt_shape: [17, 3]\ntrain: images/train", "convert the data set to COCO"),
    ],
)
def test_bad_description_of_yolo_stops_with_one_error(yolo_folder: Path, text: str, expected: str) -> None:
    (yolo_folder / "data.yaml").write_text(text)
    with pytest.raises(DataError, match="data") as caught:
        data.read(yolo_folder / "data.yaml")
    assert expected in str(caught.value)


def test_lines_that_name_no_picture_are_listed_and_the_others_read(yolo_folder: Path) -> None:
    (yolo_folder / "data.yaml").write_text("train: list.txt\nnames: [cup, box]\n")
    (yolo_folder / "list.txt").write_text(f"/\n..\n{'x' * 300}.jpg\na\0.jpg\nimages/train/a.jpg\n")
    dataset = data.read(yolo_folder)
    assert [record.file.name for record in dataset.records] == ["a.jpg"]
    assert [problem.kind for problem in dataset.problems][:-1] == ["missing file"] * 4  # the last is a box without mask


def test_pictures_whose_names_are_no_utf8_are_read_and_named(yolo_folder: Path) -> None:
    for name, changed in ((b"a", b"\xe4"), (b"b", b"\xf6")):
        os.rename(*(os.fsencode(yolo_folder) + b"/images/train/%s.jpg" % one for one in (name, changed)))
    (yolo_folder / os.fsdecode(b"images/train/\xf6.jpg")).write_text("no picture")
    dataset = data.read(yolo_folder / "data.yaml")
    assert [os.fsencode(record.file.name) for record in dataset.records] == [b"\xe4.jpg"]
    assert dataset.problems[0].place.encode() == rb"\udcf6.jpg"


def make_panoptic(folder: Path) -> Path:
    """Write the shapes of tests.train_data as COCO's panoptic files."""
    shapes = make_shapes(folder / "images", 3)
    (folder / "panoptic").mkdir()
    images, annotations = [], []
    for record in shapes.records:
        assert record.segments_file is not None
        name = record.segments_file.name
        os.replace(record.segments_file, folder / "panoptic" / name)
        images.append({"id": record.image_id, "file_name": record.file.name, "width": 96, "height": 64})
        infos = [
            {"id": one.id, "category_id": 10 + one.label if one.is_thing else 20 + one.label, "iscrowd": 0}
            for one in record.segments
        ]
        annotations.append({"image_id": record.image_id, "file_name": name, "segments_info": infos})
    categories = [{"id": 10 + number, "name": name, "isthing": 1} for number, name in enumerate(shapes.labels)]
    categories += [{"id": 21, "name": "sky", "isthing": 0}, {"id": 22, "name": "ground", "isthing": 0}]
    file = folder / "panoptic.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return file


def test_panoptic_segments_give_things_their_boxes_and_masks(tmp_path: Path) -> None:
    dataset = data.read(make_panoptic(tmp_path / "p"), images=tmp_path / "p/images")
    expected = make_shapes(tmp_path / "s", 3)
    assert dataset.labels == expected.labels and dataset.stuff_labels == ("things", "sky", "ground")
    assert not dataset.problems
    for record, shapes in zip(dataset.records, expected.records, strict=True):
        assert record.segments == shapes.segments
        assert record.objects.masks is not None and shapes.objects.masks is not None
        for mask, other in zip(record.objects.masks, shapes.objects.masks, strict=True):
            np.testing.assert_array_equal(masks.decode(mask), masks.decode(other))
        assert record.objects.labels.tolist() == shapes.objects.labels.tolist()


def test_bad_segments_are_listed(tmp_path: Path) -> None:
    file = make_panoptic(tmp_path / "p")
    content = json.loads(file.read_text())
    content["annotations"][0]["segments_info"][0]["id"] = 200
    content["annotations"][1]["segments_info"][0]["category_id"] = 99
    (file.with_suffix("") / content["annotations"][2]["file_name"]).unlink()
    file.write_text(json.dumps(content))
    dataset = data.read(file)
    kinds = Counter(problem.kind for problem in dataset.problems)
    # Each unnamed segment is met twice: as an entry, and as pixels that no entry names.
    assert kinds == {"bad segment": 4, "missing file": 1}
    assert len(dataset.records) == 2


def test_blood_cells_are_read_as_supervision_reads_them_but_for_two_empty_boxes(shared: Path) -> None:
    import supervision as sv

    folder = shared / "data/bccd/BCCD"
    dataset = data.read(shared / "data/bccd")
    assert dataset.labels == ("Platelets", "RBC", "WBC")
    assert len(dataset.records) == 364
    places = [problem.place for problem in dataset.problems]
    assert places == ["BloodImage_00338.xml: object 13", "BloodImage_00343.xml: object 4"]
    theirs = sv.DetectionDataset.from_pascal_voc(str(folder / "JPEGImages"), str(folder / "Annotations"))
    found = {Path(path).name: detections for path, detections in theirs.annotations.items()}
    num_compared = 0
    for record in dataset.records:
        if record.file.name in ("BloodImage_00338.jpg", "BloodImage_00343.jpg"):
            continue
        expected = found[record.file.name]
        assert expected.class_id is not None
        corners = np.clip(expected.xyxy, 0, (640, 480, 640, 480))
        np.testing.assert_allclose(record.objects.boxes, corners)
        names = [theirs.classes[label] for label in expected.class_id]
        assert [dataset.labels[label] for label in record.objects.labels] == names
        num_compared += len(names)
    assert num_compared > 4800
    assert len(data.read(shared / "data/bccd", split="test").records) == 72


def test_persons_have_masks_where_they_say_so(shared: Path) -> None:
    dataset = data.read(shared / "data/persons", split="train")
    assert (len(dataset.records), len(dataset.keypoint_names), dataset.labels) == (503, 17, ("person",))
    assert sum(record.objects.masks is not None for record in dataset.records) == 212
    assert not dataset.problems


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from((0, 1, 7, 10**400)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(("id", "size", "counts")), inner),
    max_leaves=6,
)
FUZZ = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Return every (container, key) of a tree of lists and dicts."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in items for place in ((tree, key), *places(value))]


@given(choices=st.lists(st.tuples(st.integers(0, 10**6), ANYTHING), min_size=1, max_size=3), panoptic=st.booleans())
@FUZZ
def test_any_value_anywhere_in_json_is_a_problem_or_one_error(
    tmp_path: Path, choices: list[tuple[int, object]], panoptic: bool
) -> None:
    person = {"id": 7, "name": "box", "keypoints": ["nose", "tail"], "isthing": 1}
    content: dict[str, Any] = coco(categories=[person])
    content["annotations"] = [
        annotation(segmentation=[[4, 5, 14, 5, 14, 13]], keypoints=[5, 6, 2, 7, 8, 0]),
        annotation(2, segmentation={"size": [30, 40], "counts": [600, 600]}),
    ]
    if panoptic:
        infos = [{"id": 1, "category_id": 7, "iscrowd": 0}]
        content["annotations"] = [{"image_id": 1, "file_name": "a.png", "segments_info": infos}]
    save_picture(tmp_path / "a.jpg")
    save_picture(tmp_path / "x" / "a.png")
    for number, value in choices:
        found = places(content)
        container, key = found[number % len(found)]
        container[key] = value
    (tmp_path / "x.json").write_text(json.dumps(content))
    try:
        dataset = data.read(tmp_path / "x.json")
    except DataError as err:
        assert "x.json" in str(err)
    else:
        for record in dataset.records:
            assert np.isfinite(record.objects.boxes).all()


@given(line=st.text(st.sampled_from("0123456789 .-einfxa\t"), max_size=40))
@FUZZ
def test_any_line_of_yolo_is_read_or_listed(tmp_path: Path, line: str) -> None:
    if not (tmp_path / "data.yaml").exists():
        save_picture(tmp_path / "a.jpg")
        (tmp_path / "data.yaml").write_text("names: [a, b]\ntrain: .\n")
    (tmp_path / "a.txt").write_text(line)
    dataset = data.read(tmp_path)
    assert len(dataset.records[0].objects.boxes) + len(dataset.problems) >= bool(line.strip())


@given(place=st.integers(0, 10**6), inserted=st.binary(max_size=6), num_removed=st.integers(0, 6))
@FUZZ
def test_any_damage_of_xml_is_read_or_listed(tmp_path: Path, place: int, inserted: bytes, num_removed: int) -> None:
    text = voc_xml(("dog", 5, 6, 14, 13)).encode()
    place %= len(text)
    if not (tmp_path / "a.jpg").exists():
        save_picture(tmp_path / "a.jpg")
        save_picture(tmp_path / "b.jpg")
        (tmp_path / "b.xml").write_text(voc_xml(("dog", 5, 6, 14, 13), filename="b.jpg"))
    (tmp_path / "a.xml").write_bytes(text[:place] + inserted + text[place + num_removed :])
    dataset = data.read(tmp_path)
    assert "b.jpg" in [record.file.name for record in dataset.records]


def test_page_on_data_names_every_kind_of_problem() -> None:
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text("utf-8")
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    named = {kind.strip() for row in rows for kind in row.split(",")}
    assert set(get_args(Kind)) <= named
