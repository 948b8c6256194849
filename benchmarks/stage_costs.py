"""Run the daemon with a stopwatch of CPU time at each stage: what of a frame's cost is not decode and not the model?

    python -m benchmarks.stage_costs CONFIG OUT

Writes a line of JSON into OUT each second: what each stage has used since the start. The millisecond fields of the
messages are wall time, which on a busy machine counts what other threads did in between.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from benchmarks.measure import thread_cpu_s, thread_name
from streamd import daemon, model_file, runner
from streamd.announce import Announcer
from streamd.config_file import load
from streamd.decode import choose
from streamd.decode.software import SoftwareDecoder
from streamd.infer import Model
from streamd.messages import Batch, Detections, Frame, Packet, RawOutput, Result
from streamd.postprocess import Found, Postprocessor
from streamd.runner import assemble

STAGES = ("decode", "letterbox", "forward", "post-process", "encode")
INTERVAL_S = 1.0


class Stopwatch:
    """Add up the CPU time of each stage, over all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._used_ns = dict.fromkeys(STAGES, 0)
        self._worker_ids: set[int] = set()
        self.num_frames = 0

    def add(self, stage: str, began_ns: int) -> None:
        """Charge a stage with what this thread has used since `began_ns` of its own CPU clock."""
        used_ns = time.thread_time_ns() - began_ns
        with self._lock:
            self._used_ns[stage] += used_ns
            if stage == "forward":
                self._worker_ids.add(threading.get_native_id())

    def snapshot(self) -> dict[str, Any]:
        """Say what has been used so far, in CPU seconds."""
        with self._lock:
            used_s = {stage: used_ns / 1e9 for stage, used_ns in self._used_ns.items()}
            workers = set(self._worker_ids)
        used_s["forward"] += _helpers_s(workers)
        return {"at": time.time(), "frames": self.num_frames, "process_s": time.process_time(), "stages_s": used_s}


def _helpers_s(worker_ids: Collection[int]) -> float:
    """Add up what the threads have used that OpenMP started for the workers: they inherit their names."""
    tasks = [task for task in Path("/proc/self/task").iterdir() if thread_name(task).startswith("infer")]
    return sum(thread_cpu_s(task) for task in tasks if int(task.name) not in worker_ids)


WATCH = Stopwatch()


class TimedDecoder(SoftwareDecoder):
    def decode(self, packet: Packet) -> Iterator[Frame]:
        frames = super().decode(packet)
        while True:
            began_ns = time.thread_time_ns()
            frame = next(frames, None)
            WATCH.add("decode", began_ns)
            if frame is None:
                return
            yield frame


def timed_assemble(*arguments: Any) -> Batch:
    began_ns = time.thread_time_ns()
    batch = assemble(*arguments)
    WATCH.add("letterbox", began_ns)
    return batch


class TimedModel(Model):
    def run(self, *arguments: Any) -> RawOutput:
        began_ns = time.thread_time_ns()
        raw = super().run(*arguments)
        WATCH.add("forward", began_ns)
        return raw


class TimedAnnouncer(Announcer):
    def result(self, result: Result) -> None:
        began_ns = time.thread_time_ns()
        super().result(result)
        WATCH.add("encode", began_ns)
        WATCH.num_frames += 1


class TimedPostprocessor(Postprocessor):
    def reduce(self, *arguments: Any) -> Found:
        began_ns = time.thread_time_ns()
        found = super().reduce(*arguments)
        WATCH.add("post-process", began_ns)
        return found

    def describe(self, *arguments: Any) -> list[Detections]:
        began_ns = time.thread_time_ns()
        detections = super().describe(*arguments)
        WATCH.add("post-process", began_ns)
        return detections


def replace_stages() -> None:
    """Put the timed stages where the pipeline and the daemon look the real ones up."""
    replacements = [
        (choose, "SoftwareDecoder", TimedDecoder),
        (runner, "assemble", timed_assemble),
        (model_file, "Model", TimedModel),
        (runner, "Postprocessor", TimedPostprocessor),
        (daemon, "Announcer", TimedAnnouncer),
    ]
    for module, name, timed in replacements:
        assert hasattr(module, name), f"{module.__name__} no longer has {name}: change benchmarks/stage_costs.py"
        setattr(module, name, timed)


def report(out: Path, stop: threading.Event) -> None:
    with out.open("w") as file:
        while not stop.wait(INTERVAL_S):
            print(json.dumps(WATCH.snapshot()), file=file, flush=True)


def main() -> None:
    replace_stages()
    stop = threading.Event()
    reporter = threading.Thread(target=report, args=(Path(sys.argv[2]), stop), name="report")
    reporter.start()
    try:
        code = daemon.Daemon(load(Path(sys.argv[1]))).run()
    finally:
        stop.set()
        reporter.join()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
