"""What a run shows while it goes: the data, a bar for the epoch, a line for each evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from streamd.datasets.records import DataSet
from streamd.evaluation.scores import Scores
from streamd.train.checkpoint import Progress as RunProgress
from streamd.train.networks import Start
from streamd.train.processes import Processes
from streamd.train.recipe import Recipe
from streamd.train.run_folder import RunFolder

_SMOOTHING = 0.9  # of the loss beside the bar
_MAX_NAMED = 3


class Screen:
    """A terminal or a log; silent in all processes but the first."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self._console = Console(quiet=True) if quiet else console

    def show_data(self, sets: Mapping[str, DataSet]) -> None:
        """Say what there is to learn from, and what of it is wrong."""
        for name, one in sets.items():
            num_objects = sum(len(record.objects.boxes) for record in one.records)
            line = f"{name}: {len(one.records)} pictures, {num_objects} objects, {len(one.labels)} labels ({one.name})"
            self._print(line)
            for problem in one.problems[:_MAX_NAMED]:
                self._print(f"  wrong: {problem.place}: {problem.text}")
            if len(one.problems) > _MAX_NAMED:
                self._print(f"  ... {len(one.problems)} problems in all; `streamd data check` lists them")

    def show_start(
        self, start: Start, progress: RunProgress, recipe: Recipe, steps_per_epoch: int, group: Processes
    ) -> None:
        """Say what the run begins with."""
        height, width = start.spec.input_size
        num_parameters = sum(parameter.numel() for parameter in start.network.parameters())
        self._print(
            f"network: {start.spec.task}, input {width}x{height}, {num_parameters / 1e6:.1f} M parameters; "
            f"{start.num_carried} tensors from {recipe.model.start}, {len(start.fresh)} new"
        )
        going = f"going on at epoch {progress.epoch + 1}, " if progress.step else ""
        self._print(
            f"run: {going}{recipe.epochs} epochs of {steps_per_epoch} steps of {recipe.batch_size} images, "
            f"{group.count} process(es) on {group.device.type}"
        )

    @contextmanager
    def epoch(
        self, epoch: int, num_epochs: int, num_steps: int, done: int
    ) -> Iterator[Callable[[dict[str, float]], None]]:
        """Show a bar; what is yielded takes the values of each step."""
        columns = (
            TextColumn(f"epoch {epoch + 1}/{num_epochs}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}, {task.fields[speed]:.1f} images/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True, disable=not self._console.is_terminal) as bar:
            task = bar.add_task("", total=num_steps, completed=done, loss=float("nan"), speed=0.0)
            smooth: list[float] = []

            def show(values: dict[str, float]) -> None:
                mean = values["loss"] if not smooth else _SMOOTHING * smooth[0] + (1 - _SMOOTHING) * values["loss"]
                smooth[:] = [mean]
                bar.update(task, advance=1, loss=mean, speed=values["images_per_s"])

            yield show

    def show_scores(self, scores: Scores, progress: RunProgress) -> None:
        """Say how good the averaged weights are after an epoch."""
        numbers = ", ".join(f"{key} {value:.3f}" for key, value in scores.numbers().items())
        best = " (best so far)" if progress.best_epoch == progress.epoch else ""
        self._print(f"epoch {progress.epoch}: {numbers}{best}")

    def show_stop(self, folder: RunFolder, progress: RunProgress) -> None:
        """Say how a run that was interrupted goes on."""
        self._print(
            f"stopped in epoch {progress.epoch + 1}; its state is in {folder.last}. Go on with: "
            f"streamd train {folder.path / 'recipe.yaml'} --resume --out {folder.path}"
        )

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)
