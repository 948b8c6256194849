"""A row of the catalogue of faults, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from benchmarks.faults.bench import Bench


# The camera that stands, healthy, in the place of a row's stream until the row begins: 320x240 or 768x576, 10 frames/s.
StandIn = Literal["small", "large"]


class Missed(Exception):
    """What must happen did not: the row fails. The message says what was seen instead."""


class Absent(Exception):
    """The machine lacks what a row needs; the message says what."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a row that did not fail has to tell."""

    recovered_s: float | None = None  # from the fault's end to the next result; None where there is nothing to recover
    note: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One fault. What is done about it is in the docstring of `run`, which raises Missed or Absent."""

    number: int
    fault: str
    run: Callable[[Bench], Outcome]
    brief: Callable[[Bench], Outcome] | None = None  # a shorter form of it for the tests and the soak
    in_ci: bool = False  # the representative third that the tests run
    in_soak: bool = False  # short, and leaves everything as it was
    stand_in: StandIn | None = "small"  # None where it adds no stream

    def shortened(self) -> Row:
        """Give the row in its shorter form, where it has one."""
        return replace(self, run=self.brief or self.run)

    @property
    def done(self) -> str:
        """Say what is done, in one line."""
        return " ".join((self.run.__doc__ or "").split())


def expect(holds: object, otherwise: str) -> None:
    """Raise Missed with `otherwise` unless it holds."""
    if not holds:
        raise Missed(otherwise)


def wait_until(holds: Callable[[], bool], within_s: float, otherwise: str) -> None:
    """Wait for something that is asked again and again. Raises Missed with `otherwise`."""
    deadline = time.monotonic() + within_s
    while not holds():
        expect(time.monotonic() < deadline, f"{otherwise} within {within_s:g} s")
        time.sleep(0.2)
