"""How good and how fast a model is: what `streamd eval` prints and writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from streamd.models.spec import Task

Route = Literal["eager", "artifact", "daemon"]
Backend = Literal["pycocotools", "faster-coco-eval"]

_MAX_CLASSES = 20  # rows of the table of classes; scores.json has them all
_HEADLINES = {  # what a model of a task is judged by, as far as the data set has it
    "detect": ("boxes",),
    "segment": ("masks", "boxes"),
    "keypoints": ("keypoints", "boxes"),
    "panoptic": ("panoptic", "masks", "boxes"),
    "semantic": ("semantic",),
    "densepose": ("boxes",),
}


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    pass


class ClassAp(_Record, frozen=True, kw_only=True):
    """Average precision of one label."""

    ap: float | None
    ap50: float | None
    num_objects: int
    best_f1: float | None  # the highest on the curve at IoU 0.5
    best_score: float | None  # the score threshold that reaches it


class ApScores(_Record, frozen=True, kw_only=True):
    """COCO's twelve figures, in 0..1; None where the data set has nothing to measure them on."""

    ap: float | None  # mean over IoU (of keypoints: OKS) 0.50 to 0.95
    ap50: float | None
    ap75: float | None
    ap_small: float | None  # objects under 32 x 32 pixels; not measured for keypoints
    ap_medium: float | None
    ap_large: float | None  # from 96 x 96 pixels on
    ar: float | None  # recall with `max_detections` a picture, mean over the same IoU
    num_images: int
    num_objects: int  # without crowds
    max_detections: int  # per picture
    per_class: dict[str, ClassAp]


class ClassPq(_Record, frozen=True, kw_only=True):
    """Panoptic quality of one class, or the mean of several: pq = sq * rq for one class."""

    pq: float
    sq: float  # mean IoU of the segments that were found
    rq: float  # F1 of finding them
    num_classes: int = 1


class PanopticScores(_Record, frozen=True, kw_only=True):
    """Panoptic quality (arXiv:1801.00868), in 0..1."""

    all: ClassPq | None
    things: ClassPq | None
    stuff: ClassPq | None
    num_images: int
    per_class: dict[str, ClassPq]


class SemanticScores(_Record, frozen=True, kw_only=True):
    """How pixels are classified, in 0..1."""

    mean_iou: float | None
    pixel_accuracy: float | None
    num_images: int
    per_class: dict[str, float]  # IoU


class Speed(_Record, frozen=True, kw_only=True):
    """What it cost: milliseconds of each stage for one image, the batch's time shared among its images."""

    images_per_s: float  # wall clock over all pictures, reading included, loading the model not
    decode_ms: float
    infer_ms: float  # letterbox, network, suppression, masks
    post_ms: float  # what is then left for the host
    batch_size: int  # images of a batch, at most
    num_threads: int  # of torch on the CPU
    peak_rss_mib: float  # of the process since its start
    peak_cuda_mib: float | None


class Scores(_Record, frozen=True, kw_only=True):
    """What one model reaches on one data set."""

    model: str
    task: Task
    data: str
    data_fingerprint: str
    through: Route
    num_images: int
    boxes: ApScores | None = None
    masks: ApScores | None = None
    keypoints: ApScores | None = None
    panoptic: PanopticScores | None = None
    semantic: SemanticScores | None = None
    speed: Speed
    score_threshold: float
    backend: Backend
    device: str
    precision: str
    versions: dict[str, str]
    notes: tuple[str, ...] = ()  # what a reader must know to compare: labels left out, pictures without masks, ...

    def headline(self) -> tuple[str, float | None]:
        """Return the name and the value of what this task is judged by; None where nothing could be measured."""
        for kind in _HEADLINES[self.task]:
            measured = getattr(self, kind)
            if measured is not None:
                return _name(kind), _value(measured)
        return _name(_HEADLINES[self.task][0]), None

    def numbers(self) -> dict[str, float]:
        """Return the main figures by name, for a model's spec and a run's log: boxes_ap, masks_ap50, pq, ..."""
        found: dict[str, float | None] = {}
        for kind in ("boxes", "masks", "keypoints"):
            measured = getattr(self, kind)
            if measured is not None:
                found |= {f"{kind}_ap": measured.ap, f"{kind}_ap50": measured.ap50}
        if self.panoptic:
            found["pq"] = _value(self.panoptic)
        if self.semantic:
            found["mean_iou"] = self.semantic.mean_iou
        return {name: round(value, 4) for name, value in found.items() if value is not None}

    def table(self) -> RenderableType:
        """Show the figures to people, in percent."""
        parts: list[RenderableType] = [Text(f"{self.model} on {self.data}, {self.num_images} pictures", style="bold")]
        kinds = {kind: getattr(self, kind) for kind in ("boxes", "masks", "keypoints")}
        measured = {kind: scores for kind, scores in kinds.items() if scores is not None}
        if measured:
            parts += [_ap_table(measured), _class_table(measured)]
        if self.panoptic:
            parts.append(_pq_table(self.panoptic))
        if self.semantic:
            parts.append(_iou_table(self.semantic))
        parts.append(Text("\n".join(self._remarks()), style="dim"))
        return Group(*parts)

    def _remarks(self) -> Iterator[str]:
        speed = self.speed
        path = {
            "eager": "the eager network in the daemon's own runner and post-processing",
            "artifact": "the daemon's own model, runner and post-processing",
            "daemon": "the daemon's whole pipeline, read back from its messages",
        }[self.through]
        yield f"through {path}; scores from {self.score_threshold:g} on; {self.backend}"
        yield (
            f"{speed.images_per_s:.1f} images/s on {self.device} in {self.precision}, batches of {speed.batch_size}, "
            f"{speed.num_threads} thread(s); ms an image: decode {speed.decode_ms:.1f}, infer {speed.infer_ms:.1f}, "
            f"post {speed.post_ms:.1f}"
        )
        cuda = "" if speed.peak_cuda_mib is None else f", of the GPU {speed.peak_cuda_mib:.0f} MiB"
        yield f"peak memory {speed.peak_rss_mib:.0f} MiB{cuda}; " + ", ".join(
            f"{name} {version}" for name, version in self.versions.items()
        )
        yield from self.notes


def _name(kind: str) -> str:
    return {"panoptic": "PQ", "semantic": "mIoU"}.get(kind, f"AP of {kind}")


def _value(measured: ApScores | PanopticScores | SemanticScores) -> float | None:
    if isinstance(measured, ApScores):
        return measured.ap
    if isinstance(measured, PanopticScores):
        return measured.all.pq if measured.all else None
    return measured.mean_iou


def percent(value: float | None) -> str:
    """Write a share as percent with one digit, as papers do."""
    return "-" if value is None else f"{value * 100:.1f}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def _ap_table(measured: dict[str, ApScores]) -> Table:
    table = _table("", "AP", "AP50", "AP75", "small", "medium", "large", "AR", "pictures", "objects")
    for kind, scores in measured.items():
        values = (scores.ap, scores.ap50, scores.ap75, scores.ap_small, scores.ap_medium, scores.ap_large, scores.ar)
        table.add_row(kind, *map(percent, values), str(scores.num_images), str(scores.num_objects))
    return table


def _class_table(measured: dict[str, ApScores]) -> RenderableType:
    """List the labels with the most objects."""
    first = next(iter(measured.values()))
    names = sorted(first.per_class, key=lambda name: -first.per_class[name].num_objects)
    columns = [f"{title} {kind}" for kind in measured for title in ("AP", "AP50")]
    table = _table("class", "objects", *columns, "best F1 at score")
    for name in names[:_MAX_CLASSES]:
        of_kinds = [scores.per_class[name] for scores in measured.values()]
        best = first.per_class[name]
        at = "-" if best.best_f1 is None else f"{best.best_f1:.2f} at {best.best_score:.2f}"
        figures = [percent(value) for one in of_kinds for value in (one.ap, one.ap50)]
        table.add_row(name, str(best.num_objects), *figures, at)
    if len(names) > _MAX_CLASSES:
        table.add_row(f"and {len(names) - _MAX_CLASSES} more")
    return table


def _pq_table(scores: PanopticScores) -> Table:
    table = _table("", "PQ", "SQ", "RQ", "classes")
    for name in ("all", "things", "stuff"):
        mean = getattr(scores, name)
        if mean is not None:
            table.add_row(name, percent(mean.pq), percent(mean.sq), percent(mean.rq), str(mean.num_classes))
    for name, one in list(scores.per_class.items())[:_MAX_CLASSES]:
        table.add_row(name, percent(one.pq), percent(one.sq), percent(one.rq))
    return table


def _iou_table(scores: SemanticScores) -> Table:
    table = _table("class", "IoU")
    table.add_row("mean", percent(scores.mean_iou))
    table.add_row("pixels that are right", percent(scores.pixel_accuracy))
    for name, iou in list(scores.per_class.items())[:_MAX_CLASSES]:
        table.add_row(name, percent(iou))
    return table
