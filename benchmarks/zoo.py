"""Time a Mask R-CNN of the zoo beside torchvision's module with the same weights, in one run on one machine.

    python -m benchmarks.zoo [--device cuda] [--quick] [--repeat 7] [--out benchmarks/results/NAME]

Both take pictures whose shorter side has 800 pixels already, and give boxes and masks on the host's side of the API:
streamd run lengths, by the daemon's own runner; torchvision what its module returns, under inference_mode, and under
autocast to float16 on a GPU, where streamd's artifact is float16, too. Each has a process of its own. Repetitions
alternate, medians are told. The weights are random, but give activations and numbers of objects as a trained network
has them: see `make_theirs`.
Prints a JSON line for each row; `--out` writes NAME.json and NAME.md as well.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from benchmarks.gpu_rows import Row, say
from benchmarks.measure import Machine, describe_machine
from benchmarks.sides import OURS, THEIRS, Side, serve
from streamd.allocator import keep_freed_memory
from streamd.cpu_runner import make_runner
from streamd.infer import Model
from streamd.messages import Detections, Frame, Picture
from streamd.models import artifact
from streamd.models.importers import torchvision as importer
from streamd.runner import Runner
from tests.fakes import make_frame

NAME = "maskrcnn_resnet50_fpn"
LOGIT_SPREAD = 2.0  # standard deviation of the classes' logits
LOAD_S = 2.0
PACKAGES = ("torch", "torchvision", "numpy")


def small_maskrcnn(**options: int | float) -> MaskRCNN:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d)
    return MaskRCNN(backbone, num_classes=11, rpn_post_nms_top_n_test=50, **options)


def full_maskrcnn(**options: int | float) -> MaskRCNN:
    theirs: MaskRCNN = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **options)
    return theirs


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured."""

    build: Callable[..., MaskRCNN]
    size: tuple[int, int]  # height, width of the pictures; the input is padded to multiples of 32
    batch: int
    repeats: int
    num_objects: int  # in each picture, which is what the score threshold is chosen for


FULL = Case(full_maskrcnn, (800, 1333), batch=8, repeats=7, num_objects=20)
QUICK = Case(small_maskrcnn, (64, 96), batch=2, repeats=1, num_objects=5)


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of each repetition."""

    ours_one: list[float] = field(default_factory=list)
    theirs_one: list[float] = field(default_factory=list)
    ours_batch: list[float] = field(default_factory=list)
    theirs_batch: list[float] = field(default_factory=list)  # as many calls as there are pictures


def make_pictures(case: Case) -> list[Tensor]:
    """Draw smooth blobs and edges, uint8 [3, H, W]: white noise would excite nothing beyond the first layers."""
    generator = torch.Generator().manual_seed(0)
    pictures = []
    for _ in range(case.batch):
        blobs = sum(
            torch.nn.functional.interpolate(torch.rand(1, 3, cells, cells, generator=generator), case.size)
            for cells in (3, 8, 20, 60)
        )
        pictures.append((torch.as_tensor(blobs)[0] * 64).byte())
    return pictures


def make_theirs(case: Case, pictures: Sequence[Tensor]) -> MaskRCNN:
    """Build torchvision's network with random weights that find about `num_objects` in each picture.

    As they are drawn, activations grow from block to block, and all classes are as likely. So the batch norms take the
    statistics of the pictures, the classes' logits are spread out, and the score threshold is that of the last object.
    """
    torch.manual_seed(0)
    theirs = case.build(min_size=case.size[0], max_size=case.size[1], box_score_thresh=0.0)
    images = [as_theirs(picture) for picture in pictures[:2]]
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.inference_mode():
        theirs.backbone.train()(theirs.transform(images)[0].tensors)
        theirs.eval()
        heads = theirs.roi_heads
        mask_pool, heads.mask_roi_pool = heads.mask_roi_pool, None  # a hundred masks take long, and say nothing
        spreads: list[float] = []
        classes = heads.box_predictor.cls_score
        hook = classes.register_forward_hook(lambda module, inputs, output: spreads.append(float(output.std())))
        theirs(images)
        hook.remove()
        classes.weight.mul_(LOGIT_SPREAD / spreads[0])
        scores = [found["scores"][: case.num_objects] for found in theirs(images)]
        heads.mask_roi_pool = mask_pool
    heads.score_thresh = statistics.median(float(score[-1]) for score in scores)
    return theirs


def as_theirs(picture: Tensor) -> Tensor:
    return picture.float() / 255


class Runs(Protocol):
    """A side, in this process or another."""

    def run(self, number: int) -> list[int]:
        """Take the first pictures through, and return how many objects were found in each."""
        ...


class Theirs:
    """torchvision's module, called as its users do."""

    def __init__(self, network: MaskRCNN, pictures: Sequence[Tensor], device: torch.device) -> None:
        self.network = network.to(device).eval()
        self.images = [as_theirs(picture).to(device) for picture in pictures]
        self.device = device

    def run(self, number: int) -> list[int]:
        """Call once for each picture; 0 is one call for all of them."""
        if number == 0:
            return self._call(self.images)
        return [count for image in self.images[:number] for count in self._call([image])]

    def _call(self, images: list[Tensor]) -> list[int]:
        is_gpu = self.device.type == "cuda"
        with torch.inference_mode(), torch.autocast(self.device.type, torch.float16, enabled=is_gpu):
            found = self.network(images)
        if is_gpu:
            torch.cuda.synchronize(self.device)
        return [len(each["scores"]) for each in found]


class Ours:
    """The artifact in the daemon's runner."""

    def __init__(self, path: Path, pictures: Sequence[Tensor], device: torch.device) -> None:
        model = Model(path, str(device))
        self.frames = [_frame(picture.to(device)) for picture in pictures]
        self.runner = make_runner(model, model.spec.nms, len(pictures))
        if isinstance(self.runner, Runner):
            self.runner.capture()

    def run(self, number: int) -> list[int]:
        """Take the first pictures through as one batch; 0 is all of them."""
        return [len(found) for found in self._detect(number or len(self.frames))]

    def _detect(self, num_images: int) -> list[Detections]:
        return self.runner.finish(self.runner.begin(self.frames[:num_images]))


def _frame(picture: Tensor) -> Frame:
    plane = picture.permute(1, 2, 0).contiguous()
    _, height, width = picture.shape
    whole = Picture((plane,), "rgb", "bt709", full_range=True, rotation=0)
    return replace(make_frame("camera"), picture=whole, width=width, height=height)


def write_models(case: Case, folder: Path) -> float:
    """Write both sides' weights into a folder, and return the score threshold."""
    theirs = make_theirs(case, make_pictures(case))
    network, spec = importer.convert(theirs, NAME)
    artifact.export(network, spec, folder / "ours.pt")
    torch.save(theirs.state_dict(), folder / "theirs.pth")
    return float(theirs.roi_heads.score_thresh)


def read_theirs(case: Case, folder: Path, score_threshold: float) -> MaskRCNN:
    theirs = case.build(min_size=case.size[0], max_size=case.size[1], box_score_thresh=score_threshold)
    theirs.load_state_dict(torch.load(folder / "theirs.pth", weights_only=True))
    return theirs


def measure(case: Case, ours: Runs, theirs: Runs) -> Times:
    """Alternate between both, after one call of each that counts for nothing."""
    times = Times()
    steps: list[tuple[list[float], Callable[[], object]]] = [
        (times.ours_one, lambda: ours.run(1)),
        (times.theirs_one, lambda: theirs.run(1)),
        (times.ours_batch, lambda: ours.run(case.batch)),
        (times.theirs_batch, lambda: theirs.run(case.batch)),
    ]
    for _, run in steps:
        run()
    for _ in range(case.repeats):
        for seconds, run in steps:
            began = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - began)
    return times


def compare(case: Case, device: torch.device, folder: Path, options: Sequence[str]) -> Iterator[Row]:
    """Give everything that is measured; `options` are those of this command that choose the case and the device."""
    threshold = write_models(case, folder)
    arguments = [*options, "--folder", str(folder), "--threshold", repr(threshold)]
    began = time.perf_counter()
    artifact.read_state(folder / "ours.pt")
    load_s = time.perf_counter() - began
    with (
        Side(OURS, "benchmarks.zoo", arguments) as ours,
        Side(THEIRS, "benchmarks.zoo", arguments) as theirs,
    ):
        counts = f"objects kept: ours {ours.run(0)}, torchvision's {theirs.run(0)}"
        peaks = {side.name: side.peak_mib for side in (ours, theirs)}
        times = measure(case, ours, theirs)
    kind = "fp16" if device.type == "cuda" else "fp32"
    what = f"Mask R-CNN, {case.size[0]}x{case.size[1]}, {kind}"
    yield from time_rows(what, case, times, device, counts)
    yield Row(f"{what}: load of the artifact", load_s, "s", LOAD_S, at_least=False)
    for side, peak in peaks.items():
        yield Row(f"{what}: peak memory at batch {case.batch}, {side}", peak, "MiB", note=_MEMORY[device.type])


_MEMORY = {
    "cpu": "of a process that has called it once, with its libraries",
    "cuda": "torch.cuda.max_memory_allocated",
}


def time_rows(what: str, case: Case, times: Times, device: torch.device, counts: str) -> Iterator[Row]:
    batch = case.batch
    parts = (
        (1, times.ours_one, times.theirs_one, 1.0),
        (batch, times.ours_batch, times.theirs_batch, 3.0 if device.type == "cuda" else 1.3),
    )
    for number, ours, theirs, to_reach in parts:
        ours_ms, theirs_ms = (statistics.median(seconds) / number * 1e3 for seconds in (ours, theirs))
        yield Row(f"{what}: an image of batch {number}, ours", ours_ms, "ms", note=_spread(ours, number))
        calls = "one call" if number == 1 else f"{number} calls"
        yield Row(f"{what}: an image, torchvision's, {calls}", theirs_ms, "ms", note=_spread(theirs, number))
        yield Row(f"{what}: batch {number} against torchvision's {calls}", theirs_ms / ours_ms, "x", to_reach)
    yield Row(f"{what}: threads", float(torch.get_num_threads()), "", note=counts)


def _spread(seconds: Sequence[float], number: int) -> str:
    least, most = (value / number * 1e3 for value in (min(seconds), max(seconds)))
    return f"{least:.4g} to {most:.4g} ms in {len(seconds)} repetitions"


def serve_side(name: str, case: Case, device: torch.device, folder: Path, threshold: float) -> None:
    """Be the process of a side."""
    pictures = make_pictures(case)
    side: Runs
    if name == OURS:
        keep_freed_memory()  # as the daemon does
        side = Ours(folder / "ours.pt", pictures, device)
    else:
        side = Theirs(read_theirs(case, folder, threshold), pictures, device)
    serve(side.run, device)


def write(out: Path, machine: Machine, rows: Sequence[Row], device: torch.device) -> None:
    """Write OUT.json with everything and OUT.md for people."""
    out.parent.mkdir(parents=True, exist_ok=True)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = [{**asdict(row), "verdict": row.verdict} for row in rows]
    content = {"machine": {**asdict(machine), "gpu": gpu}, "rows": found}
    out.with_name(out.name + ".json").write_text(json.dumps(content, indent=1) + "\n")
    out.with_name(out.name + ".md").write_text("\n".join(_markdown(machine, gpu, rows)) + "\n")


def _markdown(machine: Machine, gpu: str, rows: Sequence[Row]) -> Iterator[str]:
    packages = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    hardware = f"{gpu}, {machine.cpu}" if gpu else machine.cpu
    yield from (f"# {machine.command}", "", f"{machine.date}, revision {machine.revision}.", "")
    yield f"{hardware}, {machine.cores} cores, Linux {machine.kernel}, Python {machine.python}; {packages}."
    yield from ("", "| what | median | to reach | |", "|---|---|---|---|")
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.4g} {row.unit}".strip()
        bound = "" if row.to_reach is None else f"{'>=' if row.at_least else '<='} {row.to_reach:g} {row.unit}"
        yield f"| {row.what} | {value} | {bound} | {'; '.join(part for part in (row.verdict, row.note) if part)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="a small network, to see that all of it runs")
    parser.add_argument("--repeat", type=int, help="repetitions of each measurement")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    parser.add_argument("--side", choices=(OURS, THEIRS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--threshold", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device(options.device)
    case = QUICK if options.quick else FULL
    case = replace(case, repeats=options.repeat or case.repeats)
    if options.side:
        serve_side(options.side, case, device, options.folder, options.threshold)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = ["--device", options.device, *(["--quick"] if options.quick else [])]
        for row in compare(case, device, Path(folder), chosen):
            rows.append(row)
            say(row)
    if options.out:
        write(options.out, describe_machine(sys.argv[1:], "benchmarks.zoo", PACKAGES), rows, device)


if __name__ == "__main__":
    main()
