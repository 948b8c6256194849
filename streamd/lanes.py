"""Which lanes a configuration needs: loaded and warmed here, before any stream sends frames to them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from streamd.config import Config, StreamConfig
from streamd.in_order import InOrder
from streamd.lane import Lane, devices
from streamd.model_file import ModelFile

logger = logging.getLogger(__name__)

Lanes = Mapping[str, list[Lane]]  # of each model in the configuration that has streams, one for each device
Work = Mapping[str, Callable[[], None]]  # by the names of the threads that are to run it


@dataclass(frozen=True, slots=True)
class Prepared:
    """A configuration whose new models are loaded and warm, beside those at work."""

    config: Config
    lanes: Lanes  # old and new
    work: Mapping[Lane, Work]  # of the new ones
    notes: tuple[str, ...] = ()  # for the operator: what the gate has found


def load(config: Config, kept: Lanes, in_order: InOrder, *, beside: bool = False) -> Lanes:
    """Make the lanes that `kept` lacks: one for each device, but not more than the model has streams.

    `beside` others that are at work or not. Raises ModelError or ConfigError.
    """
    lanes = {}
    for name, num_streams in Counter(config.model_of(stream) for stream in config.streams).items():
        present = kept.get(name, [])
        model = present[0].config if present else config.models[name]  # a version that was rolled back is not run
        wanted = devices(model)[:num_streams]
        missing = [device for device in wanted if device not in [lane.device for lane in present]]
        lanes[name] = list(present)
        if missing:
            # Of several GPUs each has the same version, whatever the path means by now.
            file = present[0].file if present else ModelFile(model)
            lanes[name] += [Lane(name, model, device, in_order, file, beside=beside) for device in missing]
    return lanes


def warm(lane: Lane, streams: Mapping[str, StreamConfig]) -> Work:
    """Choose how to run a model for these streams, and return what its threads are to run."""
    plan = lane.plan(streams)
    logger.info("model %s: %s on %s: %s", lane.name, lane.spec.name, lane.model.device, plan)
    return lane.threads(plan)


def warm_new(config: Config, lanes: Lanes, present: Collection[Lane]) -> Mapping[Lane, Work]:
    """Warm the lanes that are not yet at work, each for its share of the model's streams."""
    work = {}
    for name, group in lanes.items():
        streams = config.streams_of(name)
        for index, lane in enumerate(group):
            if lane not in present:
                served = streams[index :: len(group)] or streams
                work[lane] = warm(lane, {stream: config.streams[stream] for stream in served})
    return work


def flat(lanes: Lanes) -> list[Lane]:
    """List the lanes of all models."""
    return [lane for group in lanes.values() for lane in group]
