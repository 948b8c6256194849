"""What a new version of a model must pass before it takes over from the one at work.

It must fit who reads the messages, and work on the streams' own frames. They are the next ones that come: the model at
work sees them anyway and goes on, and nothing has to be kept for a swap that may never be asked for. Each is let go
as soon as the new version has seen it, so that no more than a few of a decoder's pictures are held.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from streamd.agreement import Agreement, compare
from streamd.config import GateConfig, ModelConfig
from streamd.device_errors import is_device_lost
from streamd.errors import ModelError, StreamdError
from streamd.infer import Model
from streamd.lane import Lane
from streamd.messages import Frame, Result
from streamd.models import artifact
from streamd.models.spec import ModelSpec
from streamd.runner import Runner

_MAX_HELD = 4  # frames that wait for the new version at once


class Sampler:
    """Pass on the next frames of each stream with what was seen in them; it never makes anybody wait."""

    def __init__(self, streams: Collection[str], frames_each: int) -> None:
        self._num_wanted = dict.fromkeys(streams, frames_each)
        self._lock = threading.Lock()
        self._results: queue.Queue[Result] = queue.Queue(_MAX_HELD)

    def __call__(self, result: Result) -> None:
        """Take a result, unless too many are waiting; from any thread."""
        stream = result.frame.stream
        with self._lock:
            if self._num_wanted.get(stream, 0) and not self._results.full():
                self._num_wanted[stream] -= 1
                self._results.put_nowait(result)

    def results(self, within_s: float) -> Iterator[Result]:
        """Yield what was wanted as it comes, or what came in time."""
        deadline = time.monotonic() + within_s
        while any(self._num_wanted.values()) or not self._results.empty():
            try:
                yield self._results.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                return


def judge(old: Sequence[Lane], new: Sequence[Lane], config: ModelConfig, running: Collection[str]) -> str:
    """Let a new version pass, and say in a few words by what. Raises ModelError with the numbers where it does not.

    `old` and `new` are warm; `config` is the new one; `running` names the model's streams that give frames.
    """
    gate = config.gate
    assert gate is not None, "the caller has looked"
    name = new[0].name
    try:
        check_fits(old[0].spec, new[0].spec, config.labels)
        said = [_on_frames(old, new, gate, running)] if gate.frames else []
        if gate.data is not None:
            said.append(_on_data(new[0].model, gate))
    except StreamdError as err:
        raise ModelError(f"model {name}: the new version is refused by its gate: {err}") from err
    return f"model {name}: {'; '.join(said)}" if said else ""


def check_fits(old: ModelSpec, new: ModelSpec, wanted: Sequence[str] | None) -> None:
    """Raise ModelError where who reads the messages of one version would misread or miss something of the other.

    A label that is published keeps its name and its number, and what comes with an object still comes. More labels
    behind those, more kinds of output, another network, input size or thresholds are no matter.
    """
    for kind, before, after in (
        ("labels", old.labels, new.labels),
        ("labels of segments", old.semantic_labels, new.semantic_labels),
    ):
        for number, label in enumerate(before):
            if (wanted is None or label in wanted) and (number >= len(after) or after[number] != label):
                now = f"has the number {after.index(label)}" if label in after else "is not there"
                raise ModelError(
                    f"its {kind} differ: '{label}' had the number {number} (label_id in the messages) and {now}"
                )
    if missing := [kind for kind in _outputs(old) if kind not in _outputs(new)]:
        raise ModelError(f"it gives no {', '.join(missing)}, which the version at work gives")
    if old.keypoints and new.keypoints and old.keypoints.names != new.keypoints.names:
        raise ModelError(
            f"its keypoints are {', '.join(new.keypoints.names)}, those at work {', '.join(old.keypoints.names)}"
        )
    if old.densepose and new.densepose and old.densepose.num_parts != new.densepose.num_parts:
        raise ModelError(f"its densepose has {new.densepose.num_parts} parts, that at work {old.densepose.num_parts}")


def _outputs(spec: ModelSpec) -> list[str]:
    there = {
        "objects": spec.task != "semantic",
        "masks": spec.masks is not None,
        "keypoints": spec.keypoints is not None,
        "densepose": spec.densepose is not None,
        "segments": bool(spec.semantic_labels),
    }
    return [name for name, is_there in there.items() if is_there]


def _on_frames(old: Sequence[Lane], new: Sequence[Lane], gate: GateConfig, running: Collection[str]) -> str:
    """Give both versions the same frames. Raises ModelError where the new one fails, or sees too little of the same."""
    runners = {lane.model.device: lane.trial_runner() for lane in new}
    found, streams = Agreement(), set()
    sampler = Sampler(running, gate.frames)
    for lane in old:
        lane.tap = sampler
    try:
        for result in sampler.results(gate.within_s):
            device = result.frame.picture.planes[0].device
            runner = runners.get(device) or next(iter(runners.values()))
            found += _see(runner, result, old[0].spec, new[0].spec)
            streams.add(result.frame.stream)
    finally:
        for lane in old:
            lane.tap = None
    if not found.num_frames:
        nothing = f"no frame came within {gate.within_s:g} s" if running else "none of its streams gives frames now"
        if gate.agreement is not None:
            raise ModelError(f"{nothing}, so that its agreement cannot be measured")
        return f"not tried on frames: {nothing}"
    said = (
        f"agreement {found.value:.3f} with the version at work on {found.num_frames} frames of {len(streams)} streams "
        f"({found.num_second} objects, {found.num_first} by the version at work, {found.num_pairs} of them the same)"
    )
    if gate.agreement is not None and found.value < gate.agreement:
        raise ModelError(f"{said}: less than the {gate.agreement:g} wanted")
    return said


def _see(runner: Runner, result: Result, old: ModelSpec, new: ModelSpec) -> Agreement:
    frame = result.frame
    try:
        running = runner.begin([frame])
        runner.wait(running)
        num_senseless = runner.num_senseless(running)
        (seen,) = runner.finish(running)
    except Exception as err:
        if is_device_lost(err):
            raise
        raise ModelError(f"it fails on {_described(frame)}: {artifact.last_line(err)}") from err
    if num_senseless:
        raise ModelError(f"it gives nothing but NaN and infinity on {_described(frame)}")
    return compare(result.detections, old, seen, new)


def _described(frame: Frame) -> str:
    return f"frame {frame.seq} of the stream {frame.stream}"


def _on_data(model: Model, gate: GateConfig) -> str:
    """Measure the new version on a labelled set. Raises ModelError where it is not good enough."""
    # Imported late: the daemon needs neither pandas nor matplotlib without it.
    from streamd.datasets import data as sets
    from streamd.evaluation.evaluate import Options, evaluate

    assert gate.data is not None and gate.min_ap is not None
    scores = evaluate(model, sets.read(Path(gate.data)), Options(limit=gate.pictures)).scores
    kind, value = scores.headline()
    if value is None:
        raise ModelError(f"{gate.data}: holds nothing to measure its {kind} on")
    said = f"{kind} {value:.3f} on {scores.num_images} pictures of {gate.data}"
    if value < gate.min_ap:
        raise ModelError(f"{said}: less than the {gate.min_ap:g} wanted")
    return said
