"""Measure a model on a data set, through exactly the code that the daemon runs."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console

from streamd import __version__
from streamd.datasets.records import DataSet, Record
from streamd.decode import Decoders
from streamd.draw import to_rgb
from streamd.errors import ConfigError, DataError, OutputError
from streamd.evaluation import panoptic_quality, plots, sheet
from streamd.evaluation.coco_metrics import COCO_SIGMAS, UNIFORM_SIGMA, Curves, Kind, as_results, measure
from streamd.evaluation.matching import Match, confusion_matrix, match
from streamd.evaluation.predictions import LabelMap, Prediction, convert, match_labels
from streamd.evaluation.routes import EagerModel, Seen, Spent, daemon_model, load_eager, read, see, see_as_daemon
from streamd.evaluation.scores import ApScores, Backend, Route, Scores, Speed
from streamd.infer import Model, Precision, Runnable, find_device
from streamd.models import artifact
from streamd.models.spec import ModelSpec, NmsRule

__all__ = ["EagerModel", "Evaluation", "Options", "Scores", "evaluate", "evaluate_file"]

_PRECISIONS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How is measured; the defaults are COCO's."""

    batch_size: int = 8
    limit: int | None = None  # pictures, taken evenly from the whole data set; None: all
    score_threshold: float = 0.001  # curves want the unsure objects too
    max_detections: int = 100  # of a picture
    backend: Backend = "pycocotools"


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Scores, and what they were made of."""

    scores: Scores
    dataset: DataSet
    predictions: tuple[Prediction, ...]
    curves: Mapping[str, Curves]  # by kind
    shown_from: float  # the score threshold of the confusion matrix and the sheet: the model's own

    def results(self) -> list[dict[str, Any]]:
        """Return the objects in COCO's results format; category ids count the data set's labels from 1."""
        results = []
        for prediction in self.predictions:
            kind: Kind = "keypoints" if prediction.keypoints is not None else "boxes"
            for row, one in enumerate(as_results(prediction, prediction.record.image_id, kind)):
                if prediction.masks is not None:
                    rle = prediction.masks[row]
                    one["segmentation"] = {"size": rle["size"], "counts": rle["counts"].decode("ascii")}
                del one["area"], one["iscrowd"]
                results.append(one)
        return results

    def matches(self) -> list[Match]:
        """Pair predictions and objects of each picture, at the model's own score threshold."""
        return [match(prediction, self.shown_from) for prediction in self.predictions]

    def write(self, folder: Path) -> list[Path]:
        """Write scores.json, predictions.json and the pictures, and return their paths. Raises OutputError.

        The results and the pictures are about objects; a semantic model has neither.
        """
        scores, predictions = folder / "scores.json", folder / "predictions.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scores.write_bytes(msgspec.json.format(msgspec.json.encode(self.scores), indent=2) + b"\n")
            predictions.write_bytes(msgspec.json.encode(self.results()))
        except OSError as err:
            raise OutputError(f"{folder}: cannot write the evaluation: {err.strerror or err}") from err
        written = [scores, predictions]
        if self.curves:
            written.append(folder / "precision_recall.png")
            plots.precision_recall(self.curves, written[-1])
            matches = self.matches()
            written.append(folder / "confusion.png")
            plots.confusion(confusion_matrix(matches, self.dataset), self.dataset.labels, self.shown_from, written[-1])
            if chosen := sheet.choose(matches):
                written.append(folder / "predictions.png")
                sheet.draw(chosen, self.dataset, _picture, written[-1])
        return written


def _picture(one: Match) -> np.ndarray:
    decoders = Decoders(torch.device("cpu"))
    try:
        return to_rgb(read(one.prediction.record, decoders).picture)
    finally:
        decoders.close()


def evaluate(
    model: Runnable, dataset: DataSet, options: Options = Options(), console: Console | None = None
) -> Evaluation:
    """Measure a model that is in memory: an `infer.Model`, or a network as an `EagerModel`.

    Raises DataError for a picture that cannot be read, ConfigError where model and data have nothing in common.
    """
    rule = _rule(model.spec, options)
    records = choose(dataset, options.limit)
    spent = Spent()
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(model.device)
    route: Route = "artifact" if isinstance(model, Model) else "eager"
    seen = see(model, records, rule, options.batch_size, spent)
    work = _Work(model.spec, dataset, records, options, route, str(model.device), _PRECISIONS[model.dtype])
    return _evaluate(seen, work, spent, console)


def evaluate_file(
    path: Path,
    dataset: DataSet,
    options: Options = Options(),
    *,
    through: Route = "artifact",
    device: str = "auto",
    precision: Precision = "auto",
    console: Console | None = None,
) -> Evaluation:
    """Measure an artifact along one of the three routes. Raises ModelError too."""
    if through == "artifact":
        return evaluate(Model(path, device, precision), dataset, options, console)
    chosen = find_device(device)
    if through == "eager":
        if precision not in ("auto", "fp32"):
            raise ConfigError(f"--precision {precision}: the eager network runs in fp32; use auto or fp32")
        return evaluate(load_eager(path, chosen), dataset, options, console)
    spec = artifact.read_spec(path)
    records = choose(dataset, options.limit)
    spent = Spent()
    config = daemon_model(path, _rule(spec, options), options.batch_size, str(chosen), precision)
    of_auto = "fp32" if chosen.type == "cpu" else "fp16"
    work = _Work(spec, dataset, records, options, "daemon", str(chosen), of_auto if precision == "auto" else precision)
    return _evaluate(see_as_daemon(config, "model", records, spent), work, spent, console)


def choose(dataset: DataSet, limit: int | None) -> Sequence[Record]:
    """Take so many records evenly from the whole data set. Raises DataError where there is none."""
    if not dataset.records:
        raise DataError(f"{dataset.name}: holds no picture to evaluate on")
    if limit is None or limit >= len(dataset.records):
        return dataset.records
    places = np.linspace(0, len(dataset.records) - 1, limit).round().astype(int)
    return [dataset.records[place] for place in places]


@dataclass(frozen=True, slots=True, eq=False)
class _Work:
    """What is measured, and how."""

    spec: ModelSpec
    dataset: DataSet
    records: Sequence[Record]
    options: Options
    through: Route
    device: str
    precision: str


def _evaluate(seen: Iterable[Seen], work: _Work, spent: Spent, console: Console | None) -> Evaluation:
    names = match_labels(work.spec, work.dataset)
    predictions = []
    with console.status("") if console else nullcontext() as status:
        for record, message in seen:
            predictions.append(convert(message, record, names))
            if status is not None:
                status.update(f"{work.spec.name}: {len(predictions)} of {len(work.records)} pictures")
        predictions.sort(key=lambda one: one.record.image_id)  # the daemon's come in any order
        if status is not None:
            status.update("comparing")
        measured = _measure(predictions, work, has_points=names.points is not None)
    notes = (*names.notes, *_notes(measured, work))
    scores = _scores(predictions, replace(names, notes=notes), work, spent, measured)
    curves: dict[str, Curves] = {kind: of_kind for kind, (_, of_kind) in measured.items()}
    return Evaluation(scores, work.dataset, tuple(predictions), curves, work.spec.nms.score_threshold)


def _measure(
    predictions: Sequence[Prediction], work: _Work, *, has_points: bool
) -> dict[Kind, tuple[ApScores, Curves]]:
    """Measure each kind that the model gives and the data set has."""
    kinds: list[Kind] = [] if work.spec.task == "semantic" else ["boxes"]
    kinds += ["masks"] if work.spec.masks else []
    kinds += ["keypoints"] if has_points else []
    backend, max_detections = work.options.backend, work.options.max_detections
    of_kinds = {kind: measure(predictions, work.dataset, kind, backend, max_detections) for kind in kinds}
    return {kind: one for kind, one in of_kinds.items() if one is not None}


def _notes(measured: Mapping[Kind, tuple[ApScores, Curves]], work: _Work) -> Iterator[str]:
    if work.spec.masks and "masks" not in measured:
        yield "masks are not measured: the data set has none"
    for kind, (scores, _) in measured.items():
        if scores.num_images < len(work.records):
            yield f"{kind} are measured on the {scores.num_images} pictures that are annotated with them"
    num_points = len(work.dataset.keypoint_names)
    if "keypoints" in measured and num_points != len(COCO_SIGMAS):
        yield f"object keypoint similarity takes {UNIFORM_SIGMA} for each of the {num_points} points"
    if work.options.limit is not None and len(work.records) < len(work.dataset.records):
        yield f"{len(work.records)} of {len(work.dataset.records)} pictures, taken evenly"


def _scores(
    predictions: Sequence[Prediction],
    names: LabelMap,
    work: _Work,
    spent: Spent,
    measured: Mapping[Kind, tuple[ApScores, Curves]],
) -> Scores:
    spec, options, notes = work.spec, work.options, names.notes
    ap: dict[str, ApScores] = {kind: scores for kind, (scores, _) in measured.items()}
    segments = spec.task in ("panoptic", "semantic")
    panoptic = panoptic_quality.panoptic(predictions, work.dataset) if spec.task == "panoptic" else None
    semantic = (
        panoptic_quality.semantic(predictions, work.dataset, things_are_one=names.things_are_one)
        if spec.task == "semantic"
        else None
    )
    if segments and panoptic is None and semantic is None:
        notes = (*notes, "segments are not measured: the data set has no panoptic annotations")
    return Scores(
        model=spec.name,
        task=spec.task,
        data=work.dataset.name,
        data_fingerprint=work.dataset.fingerprint,
        through=work.through,
        num_images=len(predictions),
        boxes=ap.get("boxes"),
        masks=ap.get("masks"),
        keypoints=ap.get("keypoints"),
        panoptic=panoptic,
        semantic=semantic,
        speed=_speed(spent, work),
        score_threshold=options.score_threshold,
        backend=options.backend,
        device=work.device,
        precision=work.precision,
        versions=_versions(options.backend),
        notes=notes,
    )


def _speed(spent: Spent, work: _Work) -> Speed:
    num_images = max(1, spent.num_images)
    on_gpu = work.device.startswith("cuda")
    return Speed(
        images_per_s=spent.num_images / spent.seconds if spent.seconds else 0.0,
        decode_ms=spent.decode_ms / num_images,
        infer_ms=spent.infer_ms / num_images,
        post_ms=spent.post_ms / num_images,
        batch_size=work.options.batch_size,
        num_threads=torch.get_num_threads(),
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MIB,  # Linux counts KiB
        peak_cuda_mib=torch.cuda.max_memory_allocated(work.device) / _MIB if on_gpu else None,
    )


def _versions(backend: Backend) -> dict[str, str]:
    installed = {name: metadata.version(name) for name in ("torch", backend)}
    return {"streamd": __version__, "python": platform.python_version(), **installed}


def _rule(spec: ModelSpec, options: Options) -> NmsRule:
    """Take the model's own suppression with the thresholds of an evaluation."""
    return msgspec.structs.replace(
        spec.nms, score_threshold=options.score_threshold, max_detections=options.max_detections
    )
