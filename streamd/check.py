"""`streamd check`: do what the daemon does, up to the models or to the first frame of each stream."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from rich.console import Console

from streamd.config import Config
from streamd.errors import SourceError
from streamd.pipeline import Pipeline

_MAX_AT_ONCE = 16


def check(config: Config, console: Console, *, connect: bool = True) -> int:
    """Print one line for each model and, where asked to `connect`, stream; return 1 if a stream gives no frame.

    Raises ModelError or ConfigError, as `run` would.
    """
    pipeline = Pipeline(config, deliver=lambda result: None)
    for lane in pipeline.lanes:
        spec = lane.spec
        console.print(
            f"ok    model {lane.name}: {spec.name}, {spec.task}, {len(spec.labels)} labels, on {lane.model.device}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
    if not connect:
        return 0
    with ThreadPoolExecutor(max_workers=min(_MAX_AT_ONCE, len(config.streams))) as pool:
        findings = pool.map(lambda name: _check_stream(name, pipeline), config.streams)
        exit_code = 0
        for found, line in findings:
            console.print(line, soft_wrap=True, highlight=False, markup=False)
            exit_code = exit_code if found else 1
    return exit_code


def _check_stream(name: str, pipeline: Pipeline) -> tuple[bool, str]:
    try:
        frame, decoder = pipeline.first_frame(name)
    except SourceError as err:
        return False, f"FAIL  stream {name}: {err.state}: {err}"
    return True, f"ok    stream {name}: {frame.width}x{frame.height}, decoder {decoder}"
