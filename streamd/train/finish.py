"""The end of a run: the artifact of its best weights, measured as the daemon will run it, with pictures."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import msgspec
from rich.console import Console
from torch import nn

from streamd.datasets.records import DataSet
from streamd.errors import OutputError
from streamd.evaluation import plots
from streamd.evaluation.evaluate import evaluate_file
from streamd.models import artifact, weights
from streamd.models.spec import ModelSpec
from streamd.replacing import replacing
from streamd.train import checkpoint
from streamd.train.recipe import Recipe
from streamd.train.run_folder import RunFolder


def finish(
    network: nn.Module,
    spec: ModelSpec,
    recipe: Recipe,
    val: DataSet,
    folder: RunFolder,
    console: Console,
    publish: str | None,
) -> Path:
    """Export the best weights, evaluate the artifact and draw the run's pictures; return the artifact.

    Raises ModelError and OutputError.
    """
    best = checkpoint.load(folder.best)
    network.load_state_dict(best["network"])
    path = folder.path / f"{recipe.name}.pt"
    with folder.best.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    spec = msgspec.structs.replace(spec, name=recipe.name, weights_sha256=sha256, licence=recipe.licence)
    artifact.export(network, spec, path)
    evaluation = evaluate_file(path, val)
    # The spec of a model says what it reaches, and the network is the same.
    artifact.export(network, msgspec.structs.replace(spec, metrics=evaluation.scores.numbers()), path)
    evaluation.write(folder.path)
    plots.curves(folder.metrics, folder.path / "curves.png")
    console.print(evaluation.scores.table())
    console.print(f"{path}: {spec.task}, {len(spec.labels)} labels, of epoch {best['epoch']}", highlight=False)
    if publish:
        target = publish_artifact(path, publish)
        console.print(f"published as {publish}: {target}", highlight=False)
    return path


def publish_artifact(path: Path, name: str) -> Path:
    """Put an artifact where a configuration finds it as `path: NAME`; one that was there is replaced in one step.

    Raises OutputError.
    """
    target = weights.model_directories()[0] / f"{name}.pt"
    try:
        with replacing(target) as new:
            shutil.copyfile(path, new)
    except OSError as err:
        raise OutputError(f"{target}: cannot be published: {err}") from err
    return target
