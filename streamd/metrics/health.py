"""Tell a daemon that is at work, or idle, from one that is stuck."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from streamd.metrics.readings import LaneMeter

STUCK_AFTER_S = 30.0  # a batch takes seconds on the slowest CPU, a send ends by its own time-out


class Sending(Protocol):
    """The part of a publisher that shows whether it is stuck."""

    @property
    def name(self) -> str: ...

    @property
    def sending_for_s(self) -> float: ...


def stuck_loops(
    meters: Iterable[LaneMeter], publishers: Iterable[Sending], after_s: float = STUCK_AFTER_S
) -> Iterator[str]:
    """Name each loop whose present piece of work has held it for longer than `after_s`, or that lets work wait as long.

    A loop that waits for work is well. A camera or a Redis that is away is not the process's illness: both have series
    of their own.
    """
    for meter in meters:
        if meter.busy_for_s > after_s:
            yield f"model {meter.model} on {meter.device}: one batch for {meter.busy_for_s:.0f} s"
        elif (waiting_s := meter.neglected_for_s()) > after_s:
            yield f"model {meter.model} on {meter.device}: frames wait, and none was taken for {waiting_s:.0f} s"
    for publisher in publishers:
        if publisher.sending_for_s > after_s:
            yield f"{publisher.name}: one send for {publisher.sending_for_s:.0f} s"
