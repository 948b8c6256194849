"""A model is measured through the daemon's own code, by COCO's rules, and along each route the figures are the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from rich.console import Console

from streamd.datasets import data
from streamd.datasets.masks import decode
from streamd.datasets.records import DataSet, Objects, Record
from streamd.errors import ConfigError, DataError, ModelError
from streamd.evaluation.coco_metrics import Kind, as_results, measure
from streamd.evaluation.evaluate import EagerModel, Evaluation, Options, choose, evaluate, evaluate_file
from streamd.evaluation.matching import confusion_matrix, match
from streamd.evaluation.predictions import Prediction, match_labels
from streamd.evaluation.scores import Backend, Route, Scores
from streamd.infer import Model
from streamd.models import artifact
from streamd.models.spec import ModelSpec, Task
from tests.train_data import (
    ColourClassifier,
    ColourHeads,
    ColourSegmenter,
    classifier_spec,
    heads_spec,
    make_shapes,
    segmenter_spec,
)

KINDS: tuple[Kind, ...] = ("boxes", "masks", "keypoints")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_pictures=12)


@pytest.fixture(scope="module")
def varied(shapes: DataSet) -> DataSet:
    """Make crowds of some objects, and leave the points of others unmarked."""
    records = []
    for record in shapes.records:
        objects = record.objects
        assert objects.keypoints is not None
        is_crowd, keypoints = objects.is_crowd.copy(), objects.keypoints.copy()
        is_crowd[0] = record.image_id % 3 == 0
        keypoints[1] *= record.image_id % 4 > 0
        records.append(replace(record, objects=replace(objects, is_crowd=is_crowd, keypoints=keypoints)))
    return replace(shapes, records=tuple(records))


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "colours.pt"
    artifact.export(ColourSegmenter(), segmenter_spec(), path)
    return path


@pytest.fixture(scope="module")
def evaluation(shapes: DataSet, colours: Path) -> Evaluation:
    return evaluate(Model(colours, "cpu"), shapes)


def truth_as_prediction(record: Record, *, score: float = 0.9) -> Prediction:
    objects = record.objects
    return Prediction(
        record=record,
        boxes=objects.boxes.astype(np.float64),
        scores=np.full(len(objects.boxes), score),
        labels=objects.labels,
        masks=objects.masks,
        keypoints=None if objects.keypoints is None else objects.keypoints.astype(np.float64),
    )


def noisy(record: Record, random: np.random.Generator) -> Prediction:
    """Shift, drop, mislabel and invent objects."""
    exact = truth_as_prediction(record)
    num = len(exact.boxes)
    assert exact.keypoints is not None
    labels = np.where(random.random(num) < 0.2, 1 - exact.labels, exact.labels)
    order = np.argsort(-(scores := random.random(num)))
    return replace(
        exact,
        boxes=(exact.boxes + random.normal(0, 1.5, (num, 4)))[order],
        scores=scores[order],
        labels=labels[order],
        masks=tuple(exact.masks[row] for row in order) if exact.masks else None,
        keypoints=(exact.keypoints + random.normal(0, 0.7, exact.keypoints.shape))[order],
    )


def as_coco(dataset: DataSet) -> dict[str, Any]:
    """Write a data set as an annotation file does, in other words than the code under test."""
    annotations: list[dict[str, Any]] = []
    for record in dataset.records:
        objects = record.objects
        assert objects.masks is not None and objects.keypoints is not None
        columns = (objects.boxes.tolist(), objects.labels.tolist(), objects.is_crowd.tolist())
        for box, label, is_crowd, mask, points in zip(*columns, objects.masks, objects.keypoints, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": record.image_id,
                    "category_id": label + 1,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": float(decode(mask).sum()),
                    "iscrowd": int(is_crowd),
                    "segmentation": mask,
                    "keypoints": points.flatten().tolist(),
                    "num_keypoints": int((points[:, 2] > 0).sum()),
                }
            )
    return {
        "images": [{"id": one.image_id, "width": one.width, "height": one.height} for one in dataset.records],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(dataset.labels)],
        "annotations": annotations,
    }


def reference_figures(dataset: DataSet, results: list[dict[str, Any]], iou_type: str) -> np.ndarray:
    """Let pycocotools read the results in its own way and sum them up."""
    truth = COCO()
    truth.dataset = as_coco(dataset)
    truth.createIndex()
    comparison = COCOeval(truth, truth.loadRes(results), iou_type)
    if iou_type == "keypoints":
        comparison.params.kpt_oks_sigmas = np.full(len(dataset.keypoint_names), 0.068)
    comparison.evaluate()
    comparison.accumulate()
    comparison.summarize()
    stats: np.ndarray = comparison.stats
    return stats


def test_predictions_that_are_the_truth_reach_one(shapes: DataSet) -> None:
    predictions = [truth_as_prediction(record) for record in shapes.records]
    for kind in KINDS:
        measured = measure(predictions, shapes, kind, "pycocotools", 100)
        assert measured is not None
        scores, curves = measured
        assert scores.ap == scores.ap50 == scores.ar == pytest.approx(1.0)
        assert scores.num_objects == sum(len(record.objects.boxes) for record in shapes.records)
        assert scores.per_class["disc"].best_f1 == pytest.approx(1.0)
        assert scores.per_class["disc"].best_score == pytest.approx(0.9)
        assert curves.precision.shape == (2, 101)


@pytest.mark.parametrize(("kind", "iou_type"), [("boxes", "bbox"), ("masks", "segm"), ("keypoints", "keypoints")])
def test_figures_are_those_that_pycocotools_sums_up(varied: DataSet, kind: Kind, iou_type: str) -> None:
    random = np.random.default_rng(1)
    predictions = [noisy(record, random) for record in varied.records]
    measured = measure(predictions, varied, kind, "pycocotools", 100)
    assert measured is not None
    scores = measured[0]
    results = [one for record in predictions for one in as_results(record, record.record.image_id, kind)]
    for one in results:
        if kind != "boxes":
            del one["bbox"]
        del one["area"], one["iscrowd"]
    stats = reference_figures(varied, results, iou_type)
    assert 0.1 < stats[0] < 0.95
    expected = [scores.ap, scores.ap50, scores.ap75]
    np.testing.assert_allclose(stats[:3], np.array(expected, dtype=float), atol=1e-12)
    assert scores.ar == pytest.approx(stats[5] if kind == "keypoints" else stats[8], abs=1e-12)
    if kind == "boxes":
        assert scores.ap_small == pytest.approx(stats[3], abs=1e-12)
        assert scores.ap_large is None
        assert stats[5] == -1


@pytest.mark.parametrize("backend", ["pycocotools", "faster-coco-eval"])
def test_no_more_objects_of_a_picture_count_than_max_detections(shapes: DataSet, backend: Backend) -> None:
    if backend == "faster-coco-eval":
        pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    corners = np.stack(np.meshgrid(np.arange(12) * 8, np.arange(10) * 6), axis=-1).reshape(-1, 2)
    boxes = np.concatenate((corners, corners + 5), axis=1).astype(np.float32)
    record = replace(
        shapes.records[0], objects=Objects(boxes, np.zeros(len(boxes), np.int64), np.zeros(len(boxes), bool))
    )
    for limit, recall in ((100, 100 / 120), (300, 1.0)):
        measured = measure([truth_as_prediction(record)], shapes, "boxes", backend, limit)
        assert measured is not None and measured[0].ar == pytest.approx(recall)
        assert measured[0].max_detections == limit


@pytest.mark.parametrize("kind", KINDS)
def test_faster_coco_eval_gives_the_same_figures(varied: DataSet, kind: Kind) -> None:
    pytest.importorskip("faster_coco_eval", reason="faster-coco-eval is not installed")
    random = np.random.default_rng(2)
    predictions = [noisy(record, random) for record in varied.records]
    backends: tuple[Backend, ...] = ("pycocotools", "faster-coco-eval")
    one, other = (measure(predictions, varied, kind, backend, 100) for backend in backends)
    assert one is not None and other is not None
    left, right = (msgspec.to_builtins(scores) for scores, _ in (one, other))
    assert flat(left) == pytest.approx(flat(right), abs=1e-6)
    np.testing.assert_allclose(one[1].precision, other[1].precision, atol=1e-6)


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Name the numbers of a tree by their places; what is None counts as -1."""
    numbers: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            numbers |= flat(value, f"{prefix}{name}.")
        else:
            numbers[f"{prefix}{name}"] = -1.0 if value is None else float(value)
    return numbers


def test_all_three_routes_give_the_same_figures(shapes: DataSet, colours: Path, evaluation: Evaluation) -> None:
    eager = evaluate(EagerModel(ColourSegmenter(), segmenter_spec(), CPU), shapes)
    daemon = evaluate_file(colours, shapes, through="daemon", device="cpu")
    assert evaluation.scores.boxes is not None and evaluation.scores.masks is not None
    assert 0.2 < (evaluation.scores.boxes.ap or 0) < 0.9
    assert 0.2 < (evaluation.scores.masks.ap or 0) < 0.9
    for other, route in ((eager, "eager"), (daemon, "daemon")):
        assert other.scores.through == route
        assert other.scores.boxes == evaluation.scores.boxes
        assert other.scores.masks == evaluation.scores.masks
        assert other.results() == evaluation.results()


@pytest.mark.parametrize("task", ["keypoints", "panoptic"])
def test_all_three_routes_give_the_same_keypoints_and_segments(task: Task, shapes: DataSet, tmp_path: Path) -> None:
    artifact.export(ColourHeads(task), heads_spec(task), tmp_path / "heads.pt")
    eager = evaluate(EagerModel(ColourHeads(task), heads_spec(task), CPU), shapes).scores
    others = [
        evaluate_file(tmp_path / "heads.pt", shapes, through=through, device="cpu").scores
        for through in ("artifact", "daemon")
    ]
    name, value = eager.headline()
    assert name == {"keypoints": "AP of keypoints", "panoptic": "PQ"}[task]
    assert 0.1 < (value or 0) < 0.95
    for other in others:
        for kind in ("boxes", "masks", "keypoints", "panoptic"):
            assert getattr(other, kind) == getattr(eager, kind)


@pytest.mark.slow
def test_the_three_routes_agree_on_a_real_detector_and_photographs(shared: Path, nano_artifact: Path) -> None:
    persons = data.read(shared / "data/persons/val.json", images=shared / "data/persons/images")
    options = Options(limit=24)
    routes: tuple[Route, ...] = ("eager", "artifact", "daemon")
    scores = [
        evaluate_file(nano_artifact, persons, options, through=route, device="cpu").scores.boxes for route in routes
    ]
    assert scores[0] is not None
    assert 0.25 < (scores[0].ap or 0) < 0.6
    for other in scores[1:]:
        assert other is not None
        assert flat(msgspec.to_builtins(other)) == pytest.approx(flat(msgspec.to_builtins(scores[0])), abs=1e-6)


def test_the_labels_of_the_model_are_found_in_the_data_set_by_name(shapes: DataSet, evaluation: Evaluation) -> None:
    spec = replace_labels(segmenter_spec(), ("car", "SQUARE"))
    names = match_labels(spec, shapes)
    assert names.labels == {1: 1}
    assert names.notes == (
        "of the model's 2 labels 1 count: square",
        "the model lacks disc, which are measured as never found",
    )
    assert match_labels(segmenter_spec(), shapes).labels == {0: 0, 1: 1}
    assert match_labels(heads_spec("keypoints"), shapes).points == (2, 1, 0)
    assert match_labels(heads_spec("panoptic"), shapes).stuff == {1: 2, 2: 3}
    assert all("label" not in note for note in evaluation.scores.notes)


def test_a_model_without_a_label_of_the_data_set_is_refused(shapes: DataSet) -> None:
    spec = replace_labels(segmenter_spec(), ("car", "bus"))
    with pytest.raises(
        ConfigError, match=r"no label in common: the model knows car, bus; the data set has disc, square"
    ):
        evaluate(EagerModel(ColourSegmenter(), spec, CPU), shapes)


def replace_labels(spec: ModelSpec, labels: tuple[str, ...]) -> ModelSpec:
    return msgspec.structs.replace(spec, labels=labels)


def test_masks_are_measured_on_the_pictures_that_have_them(shapes: DataSet) -> None:
    without = [replace(record, objects=replace(record.objects, masks=None)) for record in shapes.records[:5]]
    partly = replace(shapes, records=(*without, *shapes.records[5:]))
    scores = evaluate(EagerModel(ColourSegmenter(), segmenter_spec(), CPU), partly).scores
    assert scores.boxes is not None and scores.boxes.num_images == 12
    assert scores.masks is not None and scores.masks.num_images == 7
    assert "masks are measured on the 7 pictures that are annotated with them" in scores.notes
    nothing = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, bool))
    none = replace(shapes, records=(*without, replace(shapes.records[5], objects=nothing)))
    scores = evaluate(EagerModel(ColourSegmenter(), segmenter_spec(), CPU), none).scores
    assert scores.masks is None
    assert "masks are not measured: the data set has none" in scores.notes
    assert scores.headline()[0] == "AP of boxes"


def test_a_semantic_model_is_measured_by_mean_iou(shapes: DataSet) -> None:
    scores = evaluate(EagerModel(ColourClassifier(), classifier_spec(), CPU), shapes).scores
    assert scores.semantic is not None and scores.boxes is None
    assert list(scores.semantic.per_class) == ["disc", "square", "sky", "ground"]
    assert 0.85 < (scores.semantic.mean_iou or 0) < 1
    assert scores.headline() == ("mIoU", scores.semantic.mean_iou)


def test_a_semantic_model_may_have_one_class_for_all_objects(shapes: DataSet) -> None:
    spec = replace_labels(classifier_spec(), ("things", "disc and square", "sky", "ground"))
    scores = evaluate(EagerModel(ColourClassifier(), spec, CPU), shapes).scores
    assert scores.semantic is not None
    assert list(scores.semantic.per_class) == ["sky", "ground", "things"]
    assert 0.2 < scores.semantic.per_class["things"] < 0.8  # it finds the discs alone
    assert scores.semantic.per_class["sky"] > 0.85
    assert "of the model's 4 labels 3 count: sky, ground, things" in scores.notes


def test_an_artifact_that_cannot_be_built_again_has_no_eager_network(shapes: DataSet, colours: Path) -> None:
    with pytest.raises(ModelError, match="does not say how its network was built"):
        evaluate_file(colours, shapes, through="eager", device="cpu")
    with pytest.raises(ConfigError, match="the eager network runs in fp32"):
        evaluate_file(colours, shapes, through="eager", device="cpu", precision="bf16")


def test_a_picture_of_another_size_than_annotated_is_an_error(shapes: DataSet, colours: Path) -> None:
    wrong = replace(shapes, records=(replace(shapes.records[0], width=95),))
    for through in ("artifact", "daemon"):
        with pytest.raises(DataError, match=r"0001\.jpg: decoded upright it has 96x64 pixels.*says 95x64"):
            evaluate_file(colours, wrong, through=through, device="cpu")


def test_a_picture_that_cannot_be_decoded_is_an_error(shapes: DataSet, colours: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(shapes.records[0].file.read_bytes()[:300])
    wrong = replace(shapes, records=(replace(shapes.records[0], file=broken),))
    for through in ("artifact", "daemon"):
        with pytest.raises(DataError, match=r"broken\.jpg"):
            evaluate_file(colours, wrong, through=through, device="cpu")


def test_pictures_are_taken_evenly_from_the_whole_data_set(shapes: DataSet) -> None:
    assert [record.image_id for record in choose(shapes, 4)] == [1, 5, 8, 12]
    assert choose(shapes, None) == choose(shapes, 99) == shapes.records
    with pytest.raises(DataError, match="holds no picture"):
        choose(replace(shapes, records=()), None)


def test_a_network_can_be_trained_after_it_was_measured(shapes: DataSet) -> None:
    network = ColourSegmenter()
    evaluate(EagerModel(network, segmenter_spec(), CPU), shapes, Options(limit=1))
    network(torch.rand(1, 3, 64, 96) * 255)["scores"].sum().backward()
    assert network.sharpness.grad is not None and bool(network.sharpness.grad.any())


def test_objects_in_a_crowd_count_neither_as_wrong_nor_as_missed(shapes: DataSet) -> None:
    record = shapes.records[0]
    objects = Objects(
        boxes=np.array([(0, 0, 10, 10), (40, 0, 90, 60)], np.float32),
        labels=np.array([0, 0]),
        is_crowd=np.array([False, True]),
    )
    record = replace(record, objects=objects)
    boxes = np.array([(1, 0, 10, 10), (50, 10, 60, 20), (20, 40, 30, 50), (0, 0, 9, 9)], np.float64)
    prediction = Prediction(record, boxes, np.array([0.9, 0.8, 0.7, 0.1]), np.array([0, 0, 1, 0]))
    one = match(prediction, 0.5)
    assert (one.num_right, one.num_wrong, one.num_missed) == (1, 1, 0)
    assert one.f1 == pytest.approx(2 / 3)
    np.testing.assert_array_equal(confusion_matrix([one], shapes), [[1, 0, 0], [0, 0, 0], [0, 1, 0]])
    measured = measure([prediction], shapes, "boxes", "pycocotools", 100)
    assert measured is not None and measured[0].per_class["disc"].ap50 == pytest.approx(1.0)


def test_a_mistaken_label_stands_beside_the_diagonal(shapes: DataSet) -> None:
    exact = truth_as_prediction(shapes.records[0])
    swapped = replace(exact, labels=1 - exact.labels)
    counts = confusion_matrix([match(swapped, 0.5)], shapes)
    assert counts[:2, :2].trace() == 0
    assert counts.sum() == len(exact.boxes)


def test_an_evaluation_is_written_whole(evaluation: Evaluation, shapes: DataSet, tmp_path: Path) -> None:
    written = evaluation.write(tmp_path / "new" / "folder")
    names = ["scores.json", "predictions.json", "precision_recall.png", "confusion.png", "predictions.png"]
    assert [path.name for path in written] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[2:])
    assert msgspec.json.decode(written[0].read_bytes(), type=Scores) == evaluation.scores
    results = json.loads(written[1].read_text())
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} == set(results[0])
    stats = reference_figures(shapes, results, "segm")
    assert evaluation.scores.masks is not None
    assert stats[0] == pytest.approx(evaluation.scores.masks.ap, abs=1e-12)


def test_the_table_says_how_was_measured(evaluation: Evaluation) -> None:
    console = Console(width=150)
    with console.capture() as captured:
        console.print(evaluation.scores.table())
    text = captured.get()
    assert "colours on shapes, 12 pictures" in text
    assert "the daemon's own model, runner and post-processing" in text
    assert "ms an image: decode" in text
    assert evaluation.scores.headline() == ("AP of masks", evaluation.scores.masks and evaluation.scores.masks.ap)
    assert set(evaluation.scores.numbers()) >= {"boxes_ap", "boxes_ap50", "masks_ap", "masks_ap50"}
    assert evaluation.scores.speed.infer_ms > 0
    assert evaluation.scores.speed.decode_ms > 0
