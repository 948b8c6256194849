"""Time the way from frames to detections on a GPU: each stage alone, then all together.

    python -m benchmarks.gpu_pipeline [--device cpu] [--small]

Frames are synthetic and lie on the device already; the networks have random weights, which take as long as trained
ones. Prints a JSON line for each row.
"""

from __future__ import annotations

import argparse
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks.gpu_kernels import SMALL as SMALL_SIZES
from benchmarks.gpu_kernels import Sizes, random_nv12
from benchmarks.gpu_rows import Row, say
from streamd.infer import Model
from streamd.messages import Frame
from streamd.models import artifact
from streamd.models.spec import MaskRule, ModelSpec, NmsRule
from streamd.models.yolox import YOLOX, yolox_nano, yolox_s
from streamd.runner import Runner, Running, assemble
from tests.fakes import make_frame

NUM_OBJECTS = 20  # in each image, which is what the threshold is chosen for


@dataclass(frozen=True, slots=True)
class Case:
    """How large the measured pipeline is."""

    network: Callable[..., YOLOX]
    input_size: tuple[int, int]
    batch: int
    num_batches: int
    frames: Sizes


FULL = Case(yolox_s, (640, 640), 8, 300, Sizes(0, 0, 0, 0, num_frames=8, frame=(1920, 1080), network_input=640))
SMALL = Case(yolox_nano, (64, 64), 2, 3, SMALL_SIZES)


def make_model(case: Case, device: str, folder: Path, num_prototypes: int) -> Model:
    """Export a network with random weights and load it as the daemon would."""
    torch.manual_seed(0)
    spec = ModelSpec(
        name="random",
        task="segment" if num_prototypes else "detect",
        labels=tuple(f"label {index}" for index in range(80)),
        input_size=case.input_size,
        colour="bgr",
        masks=MaskRule() if num_prototypes else None,
    )
    network = case.network(80, num_prototypes, input_size=case.input_size)
    path = folder / f"random-{num_prototypes}.pt"
    artifact.export(network, spec, path)
    return Model(path, device)


def synthetic_frames(case: Case, device: torch.device) -> list[Frame]:
    width, height = case.frames.frame
    pictures = random_nv12(case.frames, device)[: case.batch]
    return [
        replace(make_frame(f"camera {index}"), picture=picture, width=width, height=height)
        for index, picture in enumerate(pictures)
    ]


def threshold_for(model: Model, frames: Sequence[Frame], num_objects: int) -> float:
    """Find the score that so many candidates of an image reach: a random network has its own idea of what is high."""
    images = torch.zeros(len(frames), 3, *model.spec.input_size, dtype=model.dtype, device=model.device)
    assemble(frames, model.spec, images)
    sizes = torch.tensor([model.spec.input_size] * len(frames), dtype=torch.float32, device=model.device)
    best = model.run(images, sizes).scores.float().amax(-1)
    return float(best.topk(num_objects, dim=-1).values[:, -1].median())


def measure_through(runner: Runner, frames: Sequence[Frame], num_batches: int) -> float:
    """Return frames/s of the whole way, begun by one thread and finished by another, as a lane does it."""
    begun: queue.SimpleQueue[Running] = queue.SimpleQueue()

    def begin() -> None:
        for _ in range(num_batches):
            begun.put(runner.begin(frames))

    runner.finish(runner.begin(frames))
    thread = threading.Thread(target=begin)
    began = time.perf_counter()
    thread.start()
    for _ in range(num_batches):
        runner.finish(begun.get())
    passed_s = time.perf_counter() - began
    thread.join()
    return num_batches * len(frames) / passed_s


def measure_network(model: Model, case: Case) -> float:
    """Return images/s of the network alone, with nothing before and after it."""
    return model.images_per_s(1, 1, case.batch)


def measure_letterbox(model: Model, frames: Sequence[Frame], num_batches: int) -> float:
    images = torch.zeros(len(frames), 3, *model.spec.input_size, dtype=model.dtype, device=model.device)
    assemble(frames, model.spec, images)
    _wait(model.device)
    began = time.perf_counter()
    for _ in range(num_batches):
        assemble(frames, model.spec, images)
    _wait(model.device)
    return num_batches * len(frames) / (time.perf_counter() - began)


def time_pipeline(case: Case, device: str, folder: Path) -> Iterator[Row]:
    speeds = {}
    for kind, num_prototypes in (("detector", 0), ("segmenter", 32)):
        model = make_model(case, device, folder, num_prototypes)
        frames = synthetic_frames(case, model.device)
        rule = NmsRule(score_threshold=threshold_for(model, frames, NUM_OBJECTS))
        runner = Runner(model, rule, case.batch)
        runner.capture()
        network, letterbox = measure_network(model, case), measure_letterbox(model, frames, case.num_batches)
        speeds[kind] = measure_through(runner, frames, case.num_batches)
        detail = f"{case.network.__name__}, batch {case.batch}, {model.dtype}"
        yield Row(f"{kind}: letterbox alone", letterbox, "frames/s", note=detail)
        yield Row(f"{kind}: network alone", network, "frames/s", note=detail)
        yield Row(f"{kind}: frames on the device to detections on the host", speeds[kind], "frames/s", note=detail)
        if kind == "detector":
            slowest = min(network, letterbox)
            yield Row("end to end against the slowest stage alone", 100 * speeds[kind] / slowest, "%", 90)
    slow_down = speeds["detector"] / speeds["segmenter"]
    yield Row("detector to segmenter, slow-down end to end", slow_down, "x", 1.5, at_least=False)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            for row in time_pipeline(SMALL if options.small else FULL, options.device, Path(folder)):
                say(row)
        except Exception as err:
            say(Row("pipeline", None, "", note=f"{type(err).__name__}: {err}"[:300]))


if __name__ == "__main__":
    main()
