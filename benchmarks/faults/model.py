"""Models and GPUs: rows 43 to 47."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from benchmarks.faults.bench import Bench
from benchmarks.faults.row import Absent, Missed, Outcome, Row, expect
from benchmarks.faults.second import second_config
from benchmarks.measure import ROOT
from streamd.control_messages import ReloadRequest
from streamd.errors import ConfigError
from streamd.models import artifact
from streamd.models.spec import MaskRule, ModelSpec
from tests.hostile import rewritten
from tests.rtsp_faults import Camera

EXIT_CONFIG = 78
START_S = 120.0
INPUT = (64, 96)  # height, width
NUM_CANDIDATES = 10_000
MAX_DETECTIONS = 50


def on_a_gpu(bench: Bench) -> Outcome:
    """nothing here"""
    raise Absent("needs an NVIDIA GPU")


def bad_model(bench: Bench) -> Outcome:
    """A model file is cut in half, has one class fewer than it says, or is text; at a reload, and at start."""
    for file in _refused_by_a_reload(bench):
        _refuses_to_start(bench, file)
    return Outcome(note="the old model stays; at start exit 78 and one error that names the file")


def bad_model_at_a_reload(bench: Bench) -> Outcome:
    """A model file is cut in half, has one class fewer than it says, or is text; at a reload."""
    _refused_by_a_reload(bench)
    return Outcome(note="the old model stays")


def _refused_by_a_reload(bench: Bench) -> list[Path]:
    """Try bad files one after the other; return them."""
    good = Path(bench.config["models"]["tiny"]["path"])
    bad = {
        "truncated.pt": lambda path: path.write_bytes(good.read_bytes()[: good.stat().st_size // 2]),
        "classes.pt": lambda path: rewritten(good, path, _with_another_label),
        "text.pt": lambda path: path.write_text("this is no model\n"),
    }
    files = [bench.made(name, make) for name, make in bad.items()]
    sha256 = bench.listener.results("witness0", time.time() - 5)[-1].message.model.sha256
    for file in files:
        offset = bench.log_size()
        with _changed(bench, file):
            try:
                bench.ask(ReloadRequest())
            except ConfigError as err:
                expect(str(file) in str(err), f"the refusal does not name the file: {err}")
            else:
                raise Missed(f"{file.name} was accepted by a reload")
        expect("refused" in bench.log_since(offset), f"{file.name}: the log does not say that it was refused")
    bench.ask(ReloadRequest())
    after = bench.listener.results("witness0", time.time() - 1)[-1].message.model.sha256
    expect(after == sha256, "the old model did not stay")
    return files


class Absurd(nn.Module):
    """Say of every picture: boxes that are not finite, of no area, of the whole picture, and 10,000 of them."""

    boxes: Tensor
    scores: Tensor
    zero: Tensor

    def __init__(self, score: float) -> None:
        super().__init__()
        height, width = INPUT
        boxes = torch.rand(NUM_CANDIDATES, 2) * torch.tensor([width, height])
        boxes = torch.cat((boxes, boxes + 5.0), dim=1)
        boxes[0::10] = torch.tensor([0.0, 0.0, width, height])
        boxes[1::10, 2:] = boxes[1::10, :2]
        self.register_buffer("boxes", boxes)
        self.register_buffer("scores", torch.full((NUM_CANDIDATES, 1), score))
        self.register_buffer("zero", torch.zeros(NUM_CANDIDATES, 1))
        self.zero[2::10] = 1.0

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        number = images.shape[0]
        # 0/0 and 1/0 are made when it runs: an artifact with such weights is refused.
        senseless = self.boxes / (1.0 - self.zero)
        prototypes = torch.ones_like(images[:, :1, ::4, ::4])
        coefficients = torch.full_like(self.scores, 9.0)
        return {
            "boxes": senseless.expand(number, -1, -1),
            "scores": self.scores.expand(number, -1, -1),
            "prototypes": prototypes,
            "coefficients": coefficients.expand(number, -1, -1),
        }


def absurd_outputs(bench: Bench) -> Outcome:
    """A model says nothing of any picture; another 10,000 boxes: infinite, NaN, of no area, full-frame masks."""
    url = bench.camera(Camera(bench.clip))
    notes = []
    for name, score in (("nothing", 0.0), ("absurd", 0.9)):
        file = bench.made(f"{name}.pt", lambda path, score=score: _write_absurd(path, score))  # type: ignore[misc]
        tree = yaml.safe_load(bench.daemon.config_path.read_text())
        tree["models"]["odd"] = {**tree["models"]["tiny"], "path": str(file), "max_detections": MAX_DETECTIONS}
        for stream in tree["streams"].values():
            stream["model"] = "tiny"
        tree["streams"]["victim"] = {"url": url, "model": "odd", "fps": 2}
        with _rewritten(bench, yaml.safe_dump(tree)):
            since = time.time()
            bench.ask(ReloadRequest())
            heard = bench.listener.wait_for(lambda message: message.stream == "victim", since, 20.0)
            expect(heard, f"{name}: nothing is published")
            time.sleep(3.0)
            messages = [one.message for one in bench.listener.results("victim", since)]
        bench.ask(ReloadRequest())
        num = max(len(message.objects) for message in messages)
        boxes = [found.box for message in messages for found in message.objects]
        expect(num == 0 if score == 0 else 0 < num <= MAX_DETECTIONS, f"{name}: {num} objects in a frame")
        senseless = [box for box in boxes if not (0 <= box[0] < box[2] <= 320 and 0 <= box[1] < box[3] <= 240)]
        expect(not senseless, f"{name}: boxes without area or outside of the picture: {senseless[:3]}")
        for found in messages[-1].objects[:3]:
            expect(found.mask and found.mask.decode().any(), f"{name}: a mask is empty or missing")
        notes.append(f"{name}: at most {num} objects a frame")
    return Outcome(note="; ".join(notes))


def _write_absurd(path: Path, score: float) -> None:
    spec = ModelSpec(name="absurd", task="segment", labels=("a",), input_size=INPUT, colour="bgr", masks=MaskRule())
    try:
        artifact.export(Absurd(score), spec, path)
    except Exception as err:
        raise Missed(f"the model cannot be written: {err}") from err


def _with_another_label(name: str, content: bytes) -> bytes:
    if not name.endswith("/extra/streamd.json"):
        return content
    return content.replace(b'["a","b","c"]', b'["a","b","c","d"]')


@contextmanager
def _rewritten(bench: Bench, text: str) -> Iterator[None]:
    """Put another text into the daemon's file for the length of the block; the caller reloads."""
    path = bench.daemon.config_path
    before = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)


@contextmanager
def _changed(bench: Bench, model: Path) -> Iterator[None]:
    tree = yaml.safe_load(bench.daemon.config_path.read_text())
    tree["models"]["tiny"]["path"] = str(model)
    with _rewritten(bench, yaml.safe_dump(tree)):
        yield


def _refuses_to_start(bench: Bench, model: Path) -> None:
    config = second_config(bench, {"cam": {"url": str(bench.clip)}})
    config["models"]["tiny"]["path"] = str(model)
    path = bench.folder / f"{model.stem}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "streamd", "run", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=START_S)
    expect(done.returncode == EXIT_CONFIG, f"{model.name}: it started, or ended with {done.returncode}")
    said = (done.stdout + done.stderr).strip()
    expect(model.name in said and "Traceback" not in said, f"{model.name}: not one clear error: {said[-300:]}")


ROWS = (
    Row(43, "NVDEC sessions exhausted", on_a_gpu),
    Row(44, "CUDA out of memory", on_a_gpu),
    Row(45, "illegal address, Xid, GPU lost", on_a_gpu),
    Row(
        46,
        "bad model file, at start and at a reload",
        bad_model,
        brief=bad_model_at_a_reload,
        in_ci=True,
        stand_in=None,
    ),
    Row(47, "0 detections; senseless boxes; 10,000 boxes; full-frame masks", absurd_outputs),
)
