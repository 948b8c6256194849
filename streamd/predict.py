"""`streamd predict`: pictures and videos through exactly the daemon's path, into wire messages and drawn pictures."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import SecretStr
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from streamd import wire
from streamd.announce import Announcer
from streamd.config import Config, ModelConfig, StreamConfig
from streamd.draw import VideoWriter, annotate, load_library, save_jpeg, save_png, to_rgb
from streamd.errors import OutputError
from streamd.files import PICTURES, Unique, as_name, expand
from streamd.messages import Result, Status, StreamState
from streamd.pipeline import Pipeline
from streamd.wire import DetectionsMessage

EXIT_OK = 0
EXIT_SOME_FAILED = 1
EXIT_USAGE = 2

_MAX_OPEN = 8  # files read at once: enough to fill a batch with pictures
_MAX_WAITING = 16  # results that wait to be written; more hold the model back, and so the memory bounded
_MAX_LABELS = 8  # in a cell of the table
_NOT_OVER = frozenset((StreamState.CONNECTING, StreamState.WAITING_KEYFRAME, StreamState.RUNNING))
_DEADLINE_S = 5.0  # for the threads to end


@dataclass(slots=True, eq=False)
class Job:
    """One file and what has become of it."""

    path: Path
    stream: str
    target: Path | None  # the drawn picture or video
    num_frames: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    failure: str | None = None
    num_expected: int | None = None  # frames that were handed to the model, once the file came to its end
    started_s: float = 0.0  # monotonic
    seconds: float = 0.0
    video: VideoWriter | None = None

    @property
    def is_complete(self) -> bool:
        return self.num_frames == self.num_expected


def predict(
    model: str,
    files: Sequence[Path],
    *,
    json_lines: bool = False,
    out: Path | None = None,
    score_threshold: float | None = None,
    console: Console | None = None,
) -> int:
    """Run `model` on every frame of the files and of the files in the folders named; return the exit code.

    The console gets the wire messages as lines of JSON, file after file, or a table. A file that fails is one line
    on stderr and does not stop the others. Raises ModelError, ConfigError or OutputError.
    """
    console = console or Console()
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    paths, refused = expand(files)
    jobs = make_jobs(paths, out)
    if clash := _overwritten(jobs):
        errors.print(f"{clash}: would be overwritten by its own drawn picture; choose another --out")
        return EXIT_USAGE
    if out is not None:
        _make_folder(out)
    for sentence in refused:
        errors.print(sentence)
    if jobs:
        _process(model, jobs, score_threshold, _InFileOrder(jobs, console) if json_lines else None, errors)
    if jobs and not json_lines:
        console.print(_summary(jobs))
    return EXIT_SOME_FAILED if refused or any(job.failure for job in jobs) else EXIT_OK


def make_jobs(paths: Sequence[Path], out: Path | None) -> list[Job]:
    """Give each file a stream's name and, with `out`, a target; no two are alike."""
    streams, targets = Unique(), Unique()
    jobs = []
    for path in paths:
        suffix = path.suffix.lower()
        drawn_suffix = ".mp4" if suffix not in PICTURES else ".jpg" if suffix in (".jpg", ".jpeg") else ".png"
        target = out / targets.name(path.stem, drawn_suffix) if out is not None else None
        jobs.append(Job(path, streams.name(as_name(path.name)), target))
    return jobs


def _overwritten(jobs: Sequence[Job]) -> Path | None:
    inputs = {job.path.resolve() for job in jobs}
    return next((job.target for job in jobs if job.target is not None and job.target.resolve() in inputs), None)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise OutputError(f"{out}: cannot make the folder for the drawn pictures: {err.strerror}") from err


def _process(
    model: str, jobs: Sequence[Job], score_threshold: float | None, lines: _InFileOrder | None, errors: Console
) -> None:
    """Take every job to its end, a few at a time, with one loaded model."""
    results = _Results()
    config = _config(model, jobs, score_threshold)
    with errors.status("loading the model"):
        if any(job.target for job in jobs):
            load_library()
        pipeline = Pipeline(config, results.put, results.put_status, results.put_crash, retry=False)
        announcer = Announcer("json", [])
        announcer.know(pipeline.specs)
        pipeline.warm_up()
    torch.set_num_threads(1)  # of this thread, which draws: more would fight with the model's for the cores
    waiting = deque(jobs)
    running: dict[str, Job] = {}
    with errors.status("") as progress, _closing_all(pipeline, results, jobs):
        while waiting or running:
            while waiting and len(running) < _MAX_OPEN:
                job = waiting.popleft()
                running[job.stream] = job
                job.started_s = time.monotonic()
                pipeline.start([job.stream])
            stream, event = results.get()
            job = running[stream]
            if isinstance(event, Result):
                message = announcer.message(event)
                if lines:
                    lines.add(job, message)
                _take(job, event, message)
            else:
                job.num_expected = event.frames - event.dropped
                job.failure = None if event.state == StreamState.ENDED else event.reason
            if job.is_complete:
                del running[stream]
                _finish(job, errors)
                if lines:
                    lines.end(job)
            progress.update(f"{len(jobs) - len(waiting) - len(running)} of {len(jobs)} files")


def _take(job: Job, result: Result, message: DetectionsMessage) -> None:
    """Count a frame and draw it."""
    job.num_frames += 1
    job.objects.update(found.label for found in message.objects)
    if job.target is None:
        return
    if job.target.suffix == ".mp4":
        job.video = job.video or VideoWriter(job.target)
        job.video.write(annotate(to_rgb(result.frame.picture), message), message.pts)
    elif job.num_frames == 1:
        save = save_jpeg if job.target.suffix == ".jpg" else save_png
        save(annotate(to_rgb(result.frame.picture), message), job.target)


def _finish(job: Job, errors: Console) -> None:
    job.seconds = time.monotonic() - job.started_s
    if job.video:
        job.video.close()
    if job.failure:
        where = f"after {job.num_frames} frames: " if job.num_frames else ""
        errors.print(f"{job.path}: {where}{job.failure}; check that it is a picture or video, and complete")


@contextmanager
def _closing_all(pipeline: Pipeline, results: _Results, jobs: Sequence[Job]) -> Iterator[None]:
    """Stop every thread and finish every video, however the block ends."""
    try:
        yield
    finally:
        results.close()
        pipeline.close_intake()
        pipeline.drain(_DEADLINE_S)
        pipeline.join_sources(_DEADLINE_S)
        for job in jobs:
            if job.video:
                job.video.close()


def _config(model: str, jobs: Sequence[Job], score_threshold: float | None) -> Config:
    only_picture = len(jobs) == 1 and jobs[0].path.suffix.lower() in PICTURES
    name = Path(model).stem if Path(model).suffix in (".pt", ".pth") else model
    return Config(
        models={
            as_name(name): ModelConfig(
                path=model,
                score_threshold=score_threshold,
                max_batch=1 if only_picture else "auto",  # for one picture, measuring would take longest
                workers=1 if only_picture else "auto",
            )
        },
        streams={
            job.stream: StreamConfig(
                url=SecretStr(f"file://{job.path.absolute()}"),
                pace="fast",
                corrupt_frames="publish",
                max_latency_ms=60_000,  # nobody waits for a single frame
                open_timeout_s=60,  # a slow disk is no failure
                read_timeout_s=60,
                stall_timeout_s=60,
            )
            for job in jobs
        },
    )


class _Results:
    """Carry results and the ends of streams from the pipeline's threads to one that may be slow."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[str, Result | Status] | Exception] = queue.Queue(_MAX_WAITING)
        self._closed = threading.Event()

    def put(self, result: Result) -> None:
        self._put((result.frame.stream, result))

    def put_status(self, status: Status) -> None:
        if status.state not in _NOT_OVER:
            self._put((status.stream, status))

    def put_crash(self, err: Exception) -> None:
        self._put(err)

    def get(self) -> tuple[str, Result | Status]:
        """Wait for the next; raise what a thread of the pipeline died of."""
        event = self._queue.get()
        if isinstance(event, Exception):
            raise event
        return event

    def close(self) -> None:
        """Let nobody wait for room any more; what comes from now on is lost."""
        self._closed.set()

    def _put(self, event: tuple[str, Result | Status] | Exception) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(event, timeout=0.1)
            except queue.Full:
                continue


class _InFileOrder:
    """Write each file's messages as lines of JSON, after those of the files before it."""

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        self._write: Callable[[str], object] = console.file.write  # console.print would wrap the lines
        self._flush = console.file.flush
        self._held: dict[str, list[str]] = {job.stream: [] for job in jobs}  # of the files that are not over
        self._over: set[str] = set()

    def add(self, job: Job, message: DetectionsMessage) -> None:
        self._held[job.stream].append(wire.encode(message).decode() + "\n")
        self._write_first()

    def end(self, job: Job) -> None:
        self._over.add(job.stream)
        self._write_first()

    def _write_first(self) -> None:
        while self._held:
            first = next(iter(self._held))
            for line in self._held[first]:
                self._write(line)
            self._flush()
            self._held[first].clear()
            if first not in self._over:
                return
            del self._held[first]


def _summary(jobs: Sequence[Job]) -> RenderableType:
    num_frames = sum(job.num_frames for job in jobs)
    started_s = min(job.started_s for job in jobs)
    seconds = max(job.started_s + job.seconds for job in jobs) - started_s
    several = len(jobs) > 1
    table = Table(box=None, pad_edge=False, header_style="bold", show_footer=several)
    table.add_column("file", f"{len(jobs)} files", overflow="fold", max_width=32)
    table.add_column("frames", str(num_frames), justify="right")
    table.add_column("objects", _counts(sum((job.objects for job in jobs), Counter())), ratio=1)
    table.add_column("ms/frame", _ms(seconds, num_frames), justify="right")
    for job in jobs:
        objects = "failed" if job.failure and not job.num_frames else _counts(job.objects)
        table.add_row(job.stream, str(job.num_frames), objects, _ms(job.seconds, job.num_frames))
    drawn = [str(job.target.parent) for job in jobs if job.target]
    notes = [f"ms/frame is wall-clock time; up to {_MAX_OPEN} files run side by side"] if several else []
    notes += [f"drawn into {drawn[0]}"] if drawn else []
    return Group(table, *(Text(note, style="dim") for note in notes))


def _counts(objects: Counter[str]) -> str:
    shown = [f"{label} {count}" for label, count in objects.most_common(_MAX_LABELS)]
    rest = len(objects) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "") or "none"


def _ms(seconds: float, num_frames: int) -> str:
    return f"{seconds * 1e3 / num_frames:.1f}" if num_frames else "-"
