"""From one version of a model to the next, and back."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from streamd.config import ModelConfig
from streamd.errors import ConfigError
from streamd.lane import Fallback, Lane
from streamd.metrics.readings import ModelReading
from streamd.model_file import ModelFile

logger = logging.getLogger(__name__)

OUTCOMES = ("live", "refused", "rolled_back")

OnFailure = Callable[[Lane, Exception], None]  # in a worker's thread; must not block


@dataclass(frozen=True, slots=True, eq=False)
class Previous:
    """The version that a model had before."""

    config: ModelConfig
    file: ModelFile
    sha256: str
    lanes: tuple[Lane, ...]  # warm, while they stand by; empty once the probation is over
    until_s: float  # of the probation, monotonic


class Swaps:
    """Remember of each model the version before. Changed by one thread at a time; any may read."""

    def __init__(self, on_failure: OnFailure, clock: Callable[[], float] = time.monotonic) -> None:
        """`on_failure` hears of a lane that has given up, and whose streams are to go back."""
        self._on_failure = on_failure
        self._clock = clock
        self._previous: dict[str, Previous] = {}
        self._outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._last_events: dict[str, str] = {}

    @property
    def standing_by(self) -> list[Lane]:
        """The lanes of versions before that are still in memory."""
        return [lane for previous in self._previous.copy().values() for lane in previous.lanes]

    def previous(self, model: str) -> Previous:
        """Return the version before. Raises ConfigError where there is none."""
        if model not in self._previous:
            raise ConfigError(f"model {model}: there is no version to go back to: it was not replaced, or went back")
        return self._previous[model]

    def went_live(self, old: Sequence[Lane], new: Sequence[Lane], probation_s: float) -> None:
        """Begin the probation of a version that has taken over; the old lanes stand by."""
        name = new[0].name
        before = self._previous.pop(name, None)
        if any(lane.has_given_up for lane in old) and before is not None:
            keep = replace(before, until_s=self._clock() + probation_s)  # what failed is no help
        else:
            stand_by = tuple(old) if probation_s else ()
            keep = Previous(
                old[0].config, old[0].file, old[0].spec.weights_sha256, stand_by, self._clock() + probation_s
            )
            for lane in old:
                lane.rely_on(None)
        self._previous[name] = keep
        for lane in new:
            helper = next((one for one in keep.lanes if one.model.device == lane.model.device), None)
            if helper is not None:
                lane.rely_on(Fallback(helper, self._on_failure))
        self.note(name, "live", f"{_version(new[0])} took over from {_version(old[0])}")

    def went_back(self, model: str, why: str) -> None:
        """Note that the version before is at work again."""
        previous = self._previous.pop(model)
        self.note(model, "rolled_back", f"rolled back to {_short(previous.sha256)}: {why}")

    def note(self, model: str, outcome: str, event: str) -> None:
        """Count what became of a new version, and say it."""
        self._outcomes[model][outcome] += 1
        self._last_events[model] = event
        level = {"live": logging.INFO, "refused": logging.DEBUG, "rolled_back": logging.ERROR}[outcome]
        logger.log(level, "model %s: %s", model, event)  # who asked tells of a refusal

    def settle(self, at_work: Iterable[Lane]) -> None:
        """End the probations that are over: their new version has had its time, and a batch that went well."""
        for name, previous in self._previous.copy().items():
            lanes = [lane for lane in at_work if lane.name == name]
            tried = not lanes or any(lane.meter.has_done_any and not lane.has_given_up for lane in lanes)
            if previous.lanes and tried and self._clock() >= previous.until_s:
                for lane in lanes:
                    lane.rely_on(None)
                self._previous[name] = replace(previous, lanes=())
                logger.info("model %s: the probation of %s is over", name, _version(lanes[0]) if lanes else "no lane")

    def forget_all_but(self, models: Iterable[str]) -> None:
        """Let go of models that are no longer there."""
        kept = {*models}
        self._previous = {name: previous for name, previous in self._previous.items() if name in kept}

    def reading(self, model: str, sha256: str) -> ModelReading:
        """Say how a model is whose version at work is this."""
        previous = self._previous.get(model)
        return ModelReading(
            model=model,
            sha256=sha256,
            previous=previous.sha256 if previous else None,
            on_probation=bool(previous and previous.lanes),
            num_outcomes={outcome: self._outcomes[model][outcome] for outcome in OUTCOMES},
            last_event=self._last_events.get(model, ""),
        )


def _version(lane: Lane) -> str:
    return f"{lane.spec.name} {_short(lane.spec.weights_sha256)} ({lane.file.path})"


def _short(sha256: str) -> str:
    return sha256[:12] or "without a sha256"
