"""Run many 1080p30 H.264 streams from packets to results in one process, as the daemon does.

    python -m benchmarks.gpu_streams [--streams 50,120] [--decoder nvdec] [--seconds 20]

The clip is made here: a drawing that moves, with B-frames off and a key frame a second. Each stream is that file at the
pace of a camera, over and over. Prints JSON lines.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import av
import numpy as np
import torch
from pydantic import SecretStr

from benchmarks.gpu_rows import Row, say
from benchmarks.measure import percentile
from streamd.allocator import keep_freed_memory
from streamd.config import Config, ModelConfig, StreamConfig
from streamd.decode.choose import Wanted
from streamd.messages import Result
from streamd.models import artifact
from streamd.models.spec import ModelSpec
from streamd.models.yolox import yolox_nano
from streamd.pipeline import Pipeline

FPS, CLIP_S = 30, 10
LATENCY_STREAMS, MANY_STREAMS = 50, 120
SETTLE_S = 5.0


@dataclass(slots=True)
class Observed:
    """What came out while the window was open."""

    begins_at: float
    lock: threading.Lock = field(default_factory=threading.Lock)
    total_ms: list[float] = field(default_factory=list)
    frames: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, tuple[int, int]] = field(default_factory=dict)  # at the first and at the last frame

    def add(self, result: Result) -> None:
        if time.monotonic() < self.begins_at:
            return
        stream = result.frame.stream
        with self.lock:
            self.total_ms.append(result.times.total)
            self.frames[stream] = self.frames.get(stream, 0) + 1
            first, _ = self.dropped.get(stream, (result.dropped, 0))
            self.dropped[stream] = (first, result.dropped)

    @property
    def num_dropped(self) -> int:
        return sum(last - first for first, last in self.dropped.values())


def write_clip(path: Path, size: tuple[int, int]) -> None:
    """Encode noise that drifts over a gradient: neither a still picture nor one that nothing can compress."""
    width, height = size
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 255, (-(-height // 8), -(-width // 8)), dtype=np.uint8)
    noise = np.kron(blocks, np.ones((8, 8), np.uint8))[:height, :width]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "bf": "0", "g": str(FPS)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        for index in range(FPS * CLIP_S):
            luma = np.roll(noise, index * 4, axis=1)
            chroma = np.full((height // 2, width), 128, np.uint8)
            frame = av.VideoFrame.from_ndarray(np.vstack((luma, chroma)), format="nv12")
            container.mux(stream.encode(frame.reformat(format="yuv420p")))
        container.mux(stream.encode())


def write_model(path: Path) -> None:
    torch.manual_seed(0)
    labels = tuple(f"label {index}" for index in range(80))
    spec = ModelSpec(name="yolox_nano", task="detect", labels=labels, input_size=(416, 416), colour="bgr")
    artifact.export(yolox_nano(), spec, path)


def run(
    clip: Path, model: Path, num_streams: int, decoder: Wanted, seconds: float
) -> tuple[Observed, float, list[str]]:
    """Return what came out, the CPU seconds that the process took meanwhile, and the decoders that were used."""
    config = Config(
        models={"nano": ModelConfig(path=str(model))},
        streams={
            f"camera{index}": StreamConfig(url=SecretStr(str(clip)), loop=True, decoder=decoder, max_latency_ms=100)
            for index in range(num_streams)
        },
    )
    observed = Observed(float("inf"))
    keep_freed_memory()  # as the daemon does
    pipeline = Pipeline(config, deliver=observed.add)
    pipeline.warm_up()
    pipeline.start()
    try:
        time.sleep(SETTLE_S)
        observed.begins_at, cpu_before_s = time.monotonic(), _cpu_s()
        time.sleep(seconds)
        cpu_s = _cpu_s() - cpu_before_s
        decoders = sorted({status.decoder for status in pipeline.statuses()})
    finally:
        pipeline.close_intake()
        pipeline.drain(5)
        pipeline.join_sources(5)
    return observed, cpu_s, decoders


def rows(counts: Sequence[int], decoder: Wanted, seconds: float, folder: Path, size: tuple[int, int]) -> Iterator[Row]:
    clip, model = folder / "clip.mp4", folder / "nano.pt"
    write_clip(clip, size)
    write_model(model)
    for count in counts:
        observed, cpu_s, decoders = run(clip, model, count, decoder, seconds)
        num_frames = sum(observed.frames.values())
        case = f"{count} streams of {size[0]}x{size[1]} at {FPS} frames/s"
        note = f"decoder {'; '.join(decoders)}; {observed.num_dropped} frames dropped"
        slowest = min(observed.frames.values(), default=0) / seconds
        yield Row(f"{case}: frames/s of the slowest", slowest, "frames/s", 0.98 * FPS, note=note)
        in_latency = count == LATENCY_STREAMS
        yield Row(
            f"{case}: packet to result, p95",
            percentile(observed.total_ms, 0.95),
            "ms",
            100 if in_latency else None,
            at_least=False,
        )
        cpu_ms = cpu_s * 1e3 / max(1, num_frames)
        yield Row(f"{case}: host CPU per frame", cpu_ms, "ms", 1 if in_latency else None, at_least=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", default=f"{LATENCY_STREAMS},{MANY_STREAMS}")
    parser.add_argument("--decoder", default="nvdec", choices=get_args(Wanted))
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--size", default="1920x1080")
    options = parser.parse_args()
    width, height = map(int, options.size.split("x"))
    counts = [int(count) for count in options.streams.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for row in rows(counts, options.decoder, options.seconds, Path(folder), (width, height)):
                say(row)
        except Exception as err:
            say(Row("streams", None, "", note=f"{type(err).__name__}: {err}"[:300]))


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
