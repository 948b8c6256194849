"""`streamd eval`. Heavy imports stand inside the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console


def evaluate(
    model: Annotated[str, typer.Argument(help="An artifact (.pt), a checkpoint (.pth) or a known name.")],
    data: Annotated[Path, typer.Argument(help="A COCO JSON file, or a folder in COCO's, VOC's or YOLO's layout.")],
    images: Annotated[
        Path | None, typer.Option(help="Where the pictures are, if not where the format has them.")
    ] = None,
    data_format: Annotated[
        Literal["auto", "coco", "panoptic", "voc", "yolo"], typer.Option("--format", help="auto looks at the files.")
    ] = "auto",
    split: Annotated[str | None, typer.Option(help="train, val, test ..., where one folder holds several.")] = None,
    through: Annotated[
        Literal["artifact", "eager", "daemon"],
        typer.Option(
            help="artifact: the daemon's model, runner and post-processing; eager: the network instead of its "
            "artifact; daemon: the whole pipeline, read back from its messages."
        ),
    ] = "artifact",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "fp16", "bf16"], typer.Option(help="auto: fp16 on a GPU, fp32 on a CPU.")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, max=256, help="Pictures of one batch.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="So many pictures, taken evenly from all.")] = None,
    score_threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Objects with lower scores do not count.")
    ] = 0.001,
    max_detections: Annotated[int, typer.Option(min=11, max=1000, help="Objects of a picture that count.")] = 100,
    backend: Annotated[
        Literal["pycocotools", "faster-coco-eval"], typer.Option(help="What computes AP; the figures are the same.")
    ] = "pycocotools",
    json_line: Annotated[bool, typer.Option("--json", help="Print the scores as one line of JSON.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write scores.json, predictions.json (COCO's results), precision over recall, the confusion "
            "matrix and a sheet of the best and the worst pictures into this folder."
        ),
    ] = None,
) -> None:
    """Measure a model on a data set: COCO's AP, panoptic quality, mean IoU, speed and memory.

    Labels of the model and of the data set are matched by name.

    Example: streamd eval gate.pt annotations/val.json --out gate-val
    """
    import msgspec

    from streamd import logs
    from streamd.datasets import data as sets
    from streamd.evaluation.evaluate import Options, evaluate_file
    from streamd.models import weights

    logs.set_up("error")
    dataset = sets.read(data, images=images, format=data_format, split=split)
    errors = Console(stderr=True)
    if dataset.problems:
        left_out = (
            f"{len(dataset.problems)} records of {data} are wrong and left out; `streamd data check {data}` lists them"
        )
        errors.print(left_out, markup=False, highlight=False, soft_wrap=True)
    options = Options(
        batch_size=batch_size,
        limit=limit,
        score_threshold=score_threshold,
        max_detections=max_detections,
        backend=backend,
    )
    evaluation = evaluate_file(
        weights.resolve(model), dataset, options, through=through, device=device, precision=precision, console=errors
    )
    if json_line:
        sys.stdout.write(msgspec.json.encode(evaluation.scores).decode() + "\n")
    else:
        Console().print(evaluation.scores.table(), highlight=False)
    if out is not None:
        written = ", ".join(path.name for path in evaluation.write(out))
        errors.print(f"{out}: {written}", markup=False, highlight=False, soft_wrap=True)
