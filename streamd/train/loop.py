"""`streamd train`: one run, read from top to bottom.

    recipe, data, network -> [ batch -> losses -> gradients -> step -> average ] -> evaluate -> artifact

What is random in a step (the order of pictures, their augmentation, the sampling of proposals) is a function of the
seed and the step, so the state of a run is its weights, its optimiser and a few counts: a run that was killed goes on
from its last checkpoint to the same result. torchrun starts several processes; each takes its part of every batch.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from streamd.datasets import data
from streamd.datasets.records import DataSet
from streamd.errors import ConfigError, DataError
from streamd.evaluation.evaluate import evaluate
from streamd.evaluation.routes import EagerModel
from streamd.models.spec import ModelSpec
from streamd.train import checkpoint, finish, losses, networks
from streamd.train.checkpoint import Progress
from streamd.train.loader import Loader
from streamd.train.optimizer import Average, lr_part, make_optimizer, restore, set_lr
from streamd.train.processes import Processes, StopSignal, join
from streamd.train.recipe import Recipe, SetRecipe
from streamd.train.run_folder import Log, RunFolder
from streamd.train.screen import Screen
from streamd.train.targets import TrainBatch

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NUM_RECALIBRATION_BATCHES = 16
_SEED_STRIDE = 1_000_003  # between the seeds of two steps


@dataclass(slots=True, eq=False)
class Run:
    """What a run changes as it goes."""

    network: nn.Module
    spec: ModelSpec
    frozen_norms: Sequence[nn.Module]  # whose statistics stay as they are
    average: Average
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    progress: Progress

    def state(self) -> dict[str, Any]:
        """Return everything that a later process needs to go on."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
        }

    def load(self, state: dict[str, Any], path: Path) -> None:
        """Go on from a state. Raises DataError if it is another run's."""
        try:
            self.network.load_state_dict(state["network"])
            self.average.network.load_state_dict(state["average"])
            restore(self.optimizer, state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**state["progress"])
        except (KeyError, RuntimeError, ValueError, TypeError) as err:
            raise DataError(f"{path}: is the state of another run: {err}") from err


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """What a run has around it in this process."""

    recipe: Recipe
    loader: Loader
    val: DataSet
    folder: RunFolder
    group: Processes
    stop: StopSignal
    screen: Screen

    @property
    def steps_per_epoch(self) -> int:
        return len(self.loader) // self.recipe.accumulate


def train(recipe: Recipe, out: Path, console: Console, *, resume: bool = False, publish: str | None = None) -> int:
    """Do the run of a recipe in the folder `out`; return the exit code: 0, or 128 + the signal that stopped it.

    `resume` goes on from the folder's last checkpoint where there is one. `publish` is the name under which the daemon
    finds the artifact. Raises ConfigError, DataError, ModelError and OutputError.
    """
    folder = RunFolder(out)
    with join(recipe.device) as group, StopSignal() as stop:
        screen = Screen(console, quiet=not group.is_first)
        goes_on = _goes_on(folder, recipe, group, resume=resume or group.was_restarted)
        sets = {"train": _read(recipe.data.train), "val": _read(recipe.data.val)}
        screen.show_data(sets)
        torch.manual_seed(recipe.seed)  # for layers that begin anew
        start = networks.start(recipe.model, sets["train"])
        losses.check(start.network, start.spec, sets["train"])
        with closing(make_loader(recipe, sets["train"], start.spec, group)) as loader:
            session = Session(recipe, loader, sets["val"], folder, group, stop, screen)
            run = begin(recipe, start, loader, group.device, goes_on=goes_on)
            if goes_on:
                run.load(checkpoint.load(folder.last), folder.last)
            screen.show_start(start, run.progress, recipe, session.steps_per_epoch, group)
            if group.is_first:
                folder.describe(recipe, sets, group.count)
            if not learn(run, session):
                assert stop.number is not None
                screen.show_stop(folder, run.progress)
                return 128 + stop.number
        if group.is_first:
            finish.finish(run.network, run.spec, recipe, sets["val"], folder, console, publish)
        group.wait()
    return 0


def make_loader(recipe: Recipe, dataset: DataSet, spec: ModelSpec, group: Processes) -> Loader:
    """Build what gives this process its part of every batch. Raises ConfigError."""
    num_parts = group.count * recipe.accumulate
    if recipe.batch_size % num_parts:
        raise ConfigError(
            f"batch_size is {recipe.batch_size}, which {group.count} process(es) x accumulate {recipe.accumulate} "
            "cannot share evenly"
        )
    loader = Loader(
        dataset,
        spec,
        recipe.augment,
        batch_size=recipe.batch_size // num_parts,
        num_epochs=recipe.epochs,
        num_workers=recipe.data.workers,
        cache=recipe.data.cache,
        seed=recipe.seed,
        rank=group.rank,
        world_size=group.count,
    )
    if len(loader) < recipe.accumulate:
        raise ConfigError(
            f"batch_size is {recipe.batch_size}, and {dataset.name} has {len(dataset.records)} pictures: not one step"
        )
    return loader


def begin(recipe: Recipe, start: networks.Start, loader: Loader, device: torch.device, *, goes_on: bool = False) -> Run:
    """Make what a run changes, as it is before the first step."""
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    network = start.network.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    if recipe.model.norms == "recalibrate" and not goes_on:
        batches = itertools.islice(loader.batches(0), _NUM_RECALIBRATION_BATCHES)
        # Through the losses, since images of several sizes fit no `forward` that was made for one.
        networks.recalibrate(network, lambda batch: losses.compute(network, batch.to(device)), batches)
    frozen = networks.freeze(network, recipe.model, start.fresh)
    optimizer = make_optimizer(network, recipe.optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "fp16")
    return Run(network, start.spec, frozen, Average(network, recipe.ema), optimizer, scaler, Progress())


def learn(run: Run, session: Session) -> bool:
    """Run all epochs that are left; return whether they are done, or a signal came first."""
    recipe, group, progress = session.recipe, session.group, run.progress
    module = wrap(run, recipe, group)
    with closing(Log(session.folder, progress.step)) if group.is_first else nullcontext() as log:
        for epoch in range(progress.epoch, recipe.epochs):
            if not _learn_epoch(run, module, session, log):
                return False
            progress.epoch, progress.batch = epoch + 1, 0
            if (epoch + 1) % recipe.evaluate_every == 0 or epoch + 1 == recipe.epochs:
                _measure(run, session, log)
            _keep(run, session)
    return True


def _learn_epoch(run: Run, module: nn.Module, session: Session, log: Log | None) -> bool:
    """Run what is left of an epoch; return False if a signal came first, with the state kept."""
    recipe, group, progress, num_steps = session.recipe, session.group, run.progress, session.steps_per_epoch
    kept_at = time.monotonic()
    batches = session.loader.batches(progress.epoch, progress.batch)
    whole_steps = itertools.islice(batches, num_steps * recipe.accumulate - progress.batch)
    with session.screen.epoch(progress.epoch, recipe.epochs, num_steps, progress.batch // recipe.accumulate) as show:
        for parts in _grouped(whole_steps, recipe.accumulate):
            values = step(run, module, parts, recipe, group, num_steps)
            progress.step += 1
            progress.batch += recipe.accumulate
            if log:
                log.write(progress.step, {"epoch": progress.step / num_steps, **values})
            show(values)
            is_stopped = group.any_of(session.stop.number is not None)
            if is_stopped or time.monotonic() - kept_at > recipe.keep_every_s:
                _keep(run, session)
                kept_at = time.monotonic()
            if is_stopped:
                return False
    return True


def wrap(run: Run, recipe: Recipe, group: Processes) -> nn.Module:
    """Return the module that gives the losses of a batch, in the form in which it is trained."""
    network = run.network
    if recipe.sync_batch_norm:
        if group.device.type != "cuda" or group.count == 1:
            raise ConfigError("sync_batch_norm needs several GPUs; leave it out, or start by torchrun")
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
    network.train()
    for norm in run.frozen_norms:
        norm.eval()
    module: nn.Module = losses.Training(network, recipe.losses)
    if recipe.compile:
        module.compile(dynamic=False)
    if group.count > 1:
        ids = [group.device.index] if group.device.type == "cuda" else None
        module = DistributedDataParallel(module, device_ids=ids)
    return module


def step(
    run: Run, module: nn.Module, parts: Sequence[TrainBatch], recipe: Recipe, group: Processes, steps_per_epoch: int
) -> dict[str, float]:
    """Do one step of the optimiser on this process's `parts` of a batch; return what it was made of."""
    index, chosen = run.progress.step, recipe.optimizer
    num_warmup = round(chosen.warmup_epochs * steps_per_epoch)
    lr = chosen.lr * lr_part(index, recipe.epochs * steps_per_epoch, num_warmup, chosen.final_lr)
    set_lr(run.optimizer, lr)
    torch.manual_seed(recipe.seed + _SEED_STRIDE * (index + 1))
    started = time.perf_counter()
    sums: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        batch = part.to(group.device)
        # One for each image of all processes, so that an image's samples do not depend on who trains on it.
        seeds = torch.randint(2**62, (len(batch.targets) * group.count,)).tolist()[group.rank :: group.count]
        images = batch.images
        if recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        is_last = number == len(parts) - 1
        with nullcontext() if is_last or group.count == 1 else module.no_sync():  # type: ignore[operator]
            with torch.autocast(group.device.type, _DTYPES[recipe.precision], enabled=recipe.precision != "fp32"):
                terms: dict[str, Tensor] = module(images, batch.sizes, batch.targets, seeds)
            total = torch.stack(list(terms.values())).sum() / len(parts)
            run.scaler.scale(total).backward()
        for name, term in terms.items():
            share = term.detach().float() / len(parts)
            sums[name] = sums[name] + share if name in sums else share
    run.scaler.unscale_(run.optimizer)
    parameters = [parameter for group_ in run.optimizer.param_groups for parameter in group_["params"]]
    norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    if chosen.clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, chosen.clip_norm, norm)
    means = group.mean_of(torch.stack([*sums.values(), norm.float()]))
    _need_finite(means, list(sums), run.scaler.is_enabled(), index)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.average.update(run.network, index)
    *each, gradient = means.tolist()
    per_s = recipe.batch_size / (time.perf_counter() - started)
    parts_of_loss = {f"loss/{name}": value for name, value in zip(sums, each, strict=True)}
    return {"loss": sum(each), **parts_of_loss, "lr": lr, "gradient_norm": gradient, "images_per_s": per_s}


def _need_finite(means: Tensor, names: Sequence[str], is_scaled: bool, index: int) -> None:
    """Raise DataError if a loss is no number; a scaled gradient may overflow, and its step is then left out."""
    checked = means[:-1] if is_scaled else means
    if bool(torch.isfinite(checked).all()):
        return
    wrong = [name for name, value in zip([*names, "gradient_norm"], means.tolist(), strict=True) if value - value != 0]
    raise DataError(
        f"step {index + 1}: {', '.join(wrong)} is no finite number. The last checkpoint is whole: "
        "go on from it with a lower optimizer.lr or a smaller clip_norm, or look at the data (`streamd data check`)"
    )


def _measure(run: Run, session: Session, log: Log | None) -> None:
    """Evaluate the averaged weights through the daemon's code, and keep them if they are the best so far."""
    if log:
        progress = run.progress
        scores = evaluate(EagerModel(run.average.network, run.spec, session.group.device), session.val).scores
        _, value = scores.headline()
        numbers = {f"val/{name}": number for name, number in scores.numbers().items()}
        log.write(progress.step, {"epoch": progress.epoch, **numbers})
        if progress.best_epoch < 0 or (value is not None and value > progress.best):
            progress.best, progress.best_epoch = float("-inf") if value is None else value, progress.epoch
            content = {"network": run.average.network.state_dict(), "epoch": progress.epoch}
            checkpoint.save(session.folder.best, content)
        session.screen.show_scores(scores, progress)
    session.group.wait()


def _keep(run: Run, session: Session) -> None:
    if session.group.is_first:
        checkpoint.save(session.folder.last, run.state())
    session.group.wait()


def _grouped(batches: Iterator[TrainBatch], size: int) -> Iterator[list[TrainBatch]]:
    while parts := list(itertools.islice(batches, size)):
        yield parts


def _goes_on(folder: RunFolder, recipe: Recipe, group: Processes, *, resume: bool) -> bool:
    """Look into the folder once, and tell every process whether there is a state to go on from."""
    return group.any_of(folder.find_state(recipe, resume=resume) if group.is_first else False)


def _read(recipe: SetRecipe) -> DataSet:
    images = Path(recipe.images) if recipe.images else None
    return data.read(Path(recipe.path), images=images, format=recipe.format, split=recipe.split)
