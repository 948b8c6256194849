"""Time a training step of Mask R-CNN beside torchvision's reference loop with the same weights, in one run.

    python -m benchmarks.training [--device cuda] [--quick] [--repeat 5] [--out benchmarks/results/NAME]

Both read the same PNG files in the training process, resize by the network's own rule, and do one step of SGD: streamd
by `streamd train`'s own loader and step (with its averaged weights), torchvision's as its reference scripts do, without
augmentation on either side. On a GPU both run under AMP. Each has a process of its own. Steps alternate, medians are
told. The weights are random.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils import data as torch_data
from torchvision.models.detection import MaskRCNN
from torchvision.transforms.functional import pil_to_tensor

from benchmarks.gpu_rows import Row, say
from benchmarks.measure import describe_machine
from benchmarks.sides import OURS, THEIRS, Side, serve
from benchmarks.zoo import full_maskrcnn, small_maskrcnn, write
from streamd.allocator import keep_freed_memory
from streamd.datasets import data
from streamd.datasets.masks import decode
from streamd.datasets.records import DataSet
from streamd.models.importers import torchvision as importer
from streamd.train.loop import begin, make_loader, step, wrap
from streamd.train.networks import Start
from streamd.train.processes import Processes
from streamd.train.recipe import Recipe
from tests.coco_folder import write_coco

NUM_WARM_UPS = 2
DATA, WEIGHTS = "shapes", "theirs.pth"  # in the folder that both sides read
PACKAGES = ("torch", "torchvision", "numpy", "pycocotools", "pillow")


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured."""

    build: Callable[..., MaskRCNN]
    size: tuple[int, int]  # height, width of the pictures, which are not scaled
    batch: int
    to_reach: float


SMALL_IMAGES = Case(full_maskrcnn, (320, 480), batch=2, to_reach=1.0)  # what two cores do in seconds
FULL = Case(full_maskrcnn, (800, 1333), batch=8, to_reach=1.3)
QUICK = Case(small_maskrcnn, (64, 96), batch=2, to_reach=1.0)


class Pictures(torch_data.Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """The data set as torchvision's reference scripts give it to its networks."""

    def __init__(self, dataset: DataSet) -> None:
        self._records = dataset.records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        record = self._records[index]
        objects = record.objects
        assert objects.masks is not None
        image = pil_to_tensor(Image.open(record.file).convert("RGB")).float() / 255
        masks = np.stack([decode(rle) for rle in objects.masks])
        return image, {
            "boxes": torch.from_numpy(objects.boxes),
            "labels": torch.from_numpy(objects.labels) + 1,
            "masks": torch.from_numpy(masks),
        }


def prepare_ours(
    case: Case, theirs: MaskRCNN, dataset: DataSet, recipe: Recipe, device: torch.device
) -> Callable[[], object]:
    """Return what does one step of `streamd train`."""
    network, spec = importer.convert(theirs, "maskrcnn")
    group = Processes(0, 1, device, was_restarted=False)
    loader = make_loader(recipe, dataset, spec, group)
    run = begin(recipe, Start(network, spec, 0, ()), loader, device)
    module = wrap(run, recipe, group)
    batches = chain.from_iterable(loader.batches(epoch) for epoch in range(10**6))

    def do() -> None:
        step(run, module, [next(batches)], recipe, group, len(loader))
        run.progress.step += 1
        _wait(device)

    return do


def prepare_theirs(
    case: Case, theirs: MaskRCNN, dataset: DataSet, recipe: Recipe, device: torch.device
) -> Callable[[], object]:
    """Return what does one step as torchvision's references/detection/engine.py does."""
    network = theirs.to(device).train()
    loader = torch_data.DataLoader(
        Pictures(dataset),
        case.batch,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda rows: tuple(zip(*rows, strict=True)),
    )
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    chosen = recipe.optimizer
    optimizer = torch.optim.SGD(parameters, chosen.lr, chosen.momentum, weight_decay=chosen.weight_decay)
    is_gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=is_gpu)
    batches = chain.from_iterable(repeat(loader))

    def do() -> None:
        images, targets = next(batches)
        images = [image.to(device) for image in images]
        targets = [{name: tensor.to(device) for name, tensor in target.items()} for target in targets]
        with torch.autocast(device.type, torch.float16, enabled=is_gpu):
            losses = sum(network(images, targets).values())
        optimizer.zero_grad()
        scaler.scale(losses).backward()
        scaler.step(optimizer)
        scaler.update()
        _wait(device)

    return do


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(case: Case, device: torch.device, folder: Path, repeats: int, options: Sequence[str]) -> Iterator[Row]:
    """Give everything that is measured; `options` are those of this command that choose the case and the device."""
    write_coco(folder / DATA, 4 * case.batch, size=case.size)
    torch.manual_seed(0)
    torch.save(build(case).state_dict(), folder / WEIGHTS)
    arguments = [*options, "--folder", str(folder)]
    seconds: dict[str, list[float]] = {OURS: [], THEIRS: []}
    with (
        Side(OURS, "benchmarks.training", arguments) as ours,
        Side(THEIRS, "benchmarks.training", arguments) as theirs,
    ):
        for number in range(NUM_WARM_UPS + repeats):
            for side in (ours, theirs):
                began = time.perf_counter()
                side.run(case.batch)
                if number >= NUM_WARM_UPS:
                    seconds[side.name].append(time.perf_counter() - began)
        peaks = {side.name: side.peak_mib for side in (ours, theirs)}
    height, width = case.size
    kind = "AMP fp16" if device.type == "cuda" else "fp32"
    what = f"training Mask R-CNN, {height}x{width}, batch {case.batch}, {kind}"
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    for name, median in medians.items():
        least, most = (case.batch / one for one in (max(seconds[name]), min(seconds[name])))
        note = f"{least:.3g} to {most:.3g} in {repeats} steps; peak memory {peaks[name]:.0f} MiB"
        yield Row(f"{what}: {name}", case.batch / median, "images/s", note=note)
    ratio = medians[THEIRS] / medians[OURS]
    yield Row(
        f"{what}: against torchvision's loop", ratio, "x", case.to_reach, note=f"{torch.get_num_threads()} threads"
    )


def build(case: Case) -> MaskRCNN:
    """Build torchvision's network, with random weights, for pictures that are not scaled."""
    height, width = case.size
    return case.build(min_size=height, max_size=width)


def serve_side(name: str, case: Case, device: torch.device, folder: Path) -> None:
    """Be the process of a side: one step for each number that is read."""
    if name == OURS:
        keep_freed_memory()  # as `streamd train` does
    theirs = build(case)
    theirs.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
    path = folder / DATA
    dataset, recipe = data.read(path), make_recipe(case, path, device)
    prepare = prepare_ours if name == OURS else prepare_theirs
    do = prepare(case, theirs, dataset, recipe, device)

    def run(number: int) -> list[int]:
        do()
        return []

    serve(run, device)


def make_recipe(case: Case, path: Path, device: torch.device) -> Recipe:
    """Return a recipe without augmentation, as `streamd train` would read it."""
    plain = {"flip": 0.0, "hue": 0.0, "saturation": 0.0, "value": 0.0}
    return Recipe.model_validate(
        {
            "name": "benchmark",
            "model": {"start": "maskrcnn_resnet50_fpn"},
            "data": {"train": {"path": str(path)}, "val": {"path": str(path)}, "workers": 0},
            "augment": plain,
            "optimizer": {"lr": 1e-4},
            "epochs": 100_000,
            "batch_size": case.batch,
            "precision": "fp16" if device.type == "cuda" else "fp32",
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="a small network, to see that all of it runs")
    parser.add_argument("--repeat", type=int, default=5, help="steps that are timed")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--side", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
    case = QUICK if options.quick else FULL if device.type == "cuda" else SMALL_IMAGES
    if options.side:
        serve_side(options.side, case, device, options.folder)
        return
    chosen = ["--device", options.device, *(["--quick"] if options.quick else [])]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for row in compare(case, device, Path(folder), options.repeat, chosen):
            rows.append(row)
            say(row)
    if options.out:
        write(options.out, describe_machine(sys.argv[1:], "benchmarks.training", PACKAGES), rows, device)


if __name__ == "__main__":
    main()
