"""Describe a running daemon to who asks on the control socket."""

from __future__ import annotations

import os
from collections.abc import Iterable

from streamd import __version__
from streamd.announce import Announcer, status_message
from streamd.config import Config
from streamd.control_messages import DaemonState, ModelEntry, PublisherEntry, SpoolEntry, StreamEntry
from streamd.pipeline import Pipeline
from streamd.publish import Carrier
from streamd.publish.stored import StoredPublisher
from streamd.publishers import Publishers
from streamd.redact import redact


def describe(
    config: Config, pipeline: Pipeline, announcer: Announcer, publishers: Publishers, uptime_s: float
) -> DaemonState:
    """Gather what the parts of the daemon say of themselves; from any thread."""
    return DaemonState(
        version=__version__,
        pid=os.getpid(),
        uptime_s=round(uptime_s, 1),
        streams=tuple(_streams(config, pipeline, announcer)),
        models=tuple(_models(pipeline)),
        publishers=tuple(map(_publisher, publishers.all)),
    )


def _streams(config: Config, pipeline: Pipeline, announcer: Announcer) -> Iterable[StreamEntry]:
    for status in pipeline.statuses():
        if status.stream in config.streams:  # a change may be under way
            yield StreamEntry(
                status=status_message(status),
                model=config.model_of(status.stream),
                published=announcer.num_published(status.stream),
            )


def _publisher(publisher: Carrier) -> PublisherEntry:
    return PublisherEntry(
        name=publisher.name,
        healthy=publisher.healthy,
        sent=publisher.num_sent,
        dropped=publisher.num_dropped,
        queued=publisher.num_queued,
        spool=_spool(publisher) if isinstance(publisher, StoredPublisher) else None,
    )


def _spool(publisher: StoredPublisher) -> SpoolEntry:
    spool = publisher.spool
    return SpoolEntry(entries=spool.num_entries, bytes=spool.num_bytes, accepted=publisher.num_accepted)


def _models(pipeline: Pipeline) -> Iterable[ModelEntry]:
    lanes = pipeline.lanes
    for model in pipeline.models():
        of_model = [lane for lane in lanes if lane.name == model.model]
        if of_model:  # a change may be under way
            yield ModelEntry(
                name=model.model,
                network=of_model[0].spec.name,
                sha256=model.sha256,
                devices=tuple(str(lane.model.device) for lane in of_model),
                previous=model.previous,
                on_probation=model.on_probation,
                last_event=redact(model.last_event),
            )
