"""How well a model finds people on data that it never saw: persons/val and the reference video.

    python -m benchmarks.person MODEL [--out benchmarks/results/person]

- ../shared/data/persons/val: COCO's figures for boxes, and for masks on the pictures that have them
- ../shared/videos/vtest.avi: AP50 on every 20th frame, by the ground truth of PETS09-S2L1, as tests/test_accuracy.py

All of it runs in the daemon's own decoders, runner and post-processing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from streamd.config import StreamConfig
from streamd.connection import connector
from streamd.cpu_runner import make_runner
from streamd.datasets import data
from streamd.decode import Decoders
from streamd.evaluation.evaluate import Options, evaluate
from streamd.evaluation.scores import Scores
from streamd.infer import Model
from streamd.messages import Frame
from streamd.models import weights
from tests.test_accuracy import EVERY, average_precision_50, load_ground_truth

SHARED = Path(__file__).parents[2] / "shared"
LABEL = "person"
SCORE_THRESHOLD = 0.001
BATCH_SIZE = 8


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, in percent as in papers."""

    what: str
    value: float | None  # None: not measured
    to_reach: float | None
    num_images: int

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The row of a table."""
        value, to_reach = ("-" if one is None else f"{one * 100:.1f}" for one in (self.value, self.to_reach))
        return self.what, value, to_reach, str(self.num_images)


def rows_of(scores: Scores) -> Iterator[Row]:
    """Take the figures of people out of an evaluation on persons/val."""
    for kind, measured, to_reach in (("boxes", scores.boxes, 0.60), ("masks", scores.masks, 0.45)):
        if measured is None:
            yield Row(f"persons/val {kind} AP50", None, to_reach, 0)
            continue
        yield Row(f"persons/val {kind} AP50", measured.per_class[LABEL].ap50, to_reach, measured.num_images)
        yield Row(f"persons/val {kind} AP", measured.per_class[LABEL].ap, None, measured.num_images)


def video_ap50(model: Model, video: Path, truth_file: Path) -> Row:
    """Measure AP50 of people on every 20th frame of the reference video."""
    truth = load_ground_truth(truth_file)
    label = model.spec.labels.index(LABEL)
    rule = msgspec.structs.replace(model.spec.nms, score_threshold=SCORE_THRESHOLD)
    runner = make_runner(model, rule, BATCH_SIZE)
    detections: list[tuple[int, float, list[float]]] = []
    seen = set()
    for frames in batches(sampled(video, model), BATCH_SIZE):
        for frame, found in zip(frames, runner.finish(runner.begin(frames)), strict=True):
            number = frame.seq + 1  # the ground truth counts from 1
            if number not in truth:
                continue
            seen.add(number)
            of_people = found.labels == label
            scores, boxes = found.scores[of_people].tolist(), found.boxes[of_people].tolist()
            detections += [(number, score, box) for score, box in zip(scores, boxes, strict=True)]
    ap50 = average_precision_50(detections, {number: truth[number] for number in seen})
    return Row(f"{video.name} boxes AP50, every {EVERY}th frame", ap50, 0.85, len(seen))


def sampled(video: Path, model: Model) -> Iterator[Frame]:
    """Decode a video as the daemon does; yield every 20th frame."""
    decoders = Decoders(model.device)
    stream = StreamConfig(url=SecretStr(f"file://{video.absolute()}"), pace="fast", corrupt_frames="publish")
    connection = connector(video.stem, stream, decoders)(0)
    try:
        yield from (frame for frame in connection.frames() if frame is not None and frame.seq % EVERY == 0)
    finally:
        connection.close()
        decoders.close()


def batches(frames: Iterator[Frame], size: int) -> Iterator[Sequence[Frame]]:
    """Group frames."""
    batch: list[Frame] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def markdown(path: str, scores: Scores, rows: Sequence[Row]) -> str:
    """Describe a measurement for a document, with the command that makes it again."""
    versions = ", ".join(f"{name} {version}" for name, version in scores.versions.items())
    lines = [
        f"`python -m benchmarks.person {path}`",
        "",
        f"{scores.model} on {scores.device} in {scores.precision}; {versions}.",
        "",
        "| figure | value, % | to reach, % | images |",
        "|---|---|---|---|",
        *(f"| {' | '.join(row.cells)} |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="AP of people on data that the model never saw.")
    parser.add_argument("model", help="an artifact (.pt), a checkpoint (.pth) or a known name")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="write OUT.md, and OUT/ with the evaluation on persons/val")
    options = parser.parse_args()
    if not SHARED.is_dir():
        print("benchmarks.person: skipped, the folder ../shared with the data is missing", file=sys.stderr)
        return
    model = Model(weights.resolve(options.model), options.device)
    if LABEL not in model.spec.labels:
        parser.error(f"{options.model} knows no {LABEL!r}; its labels are {', '.join(model.spec.labels[:20])}")
    persons = data.read(SHARED / "data/persons/val.json", images=SHARED / "data/persons/images")
    console = Console()
    settings = Options(batch_size=BATCH_SIZE, score_threshold=SCORE_THRESHOLD)
    evaluation = evaluate(model, persons, settings, console)
    rows = [
        *rows_of(evaluation.scores),
        video_ap50(model, SHARED / "videos/vtest.avi", SHARED / "data/pets09_s2l1/gt.txt"),
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("figure")
    for title in ("value, %", "to reach, %", "images"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(*row.cells)
    console.print(table)
    if options.out:
        evaluation.write(options.out)
        options.out.with_name(options.out.name + ".md").write_text(markdown(options.model, evaluation.scores, rows))


if __name__ == "__main__":
    main()
