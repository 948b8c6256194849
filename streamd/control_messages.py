"""What is said on the control socket: one JSON object a line, a request and then its answer."""

from __future__ import annotations

from typing import Annotated

import msgspec

from streamd import wire

_Word = Annotated[str, msgspec.Meta(max_length=64)]
_Setting = Annotated[str, msgspec.Meta(max_length=4096)] | bool | int | float | None


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class _Request(_Record, frozen=True, tag_field="command"):
    pass


class StatusRequest(_Request, frozen=True, tag="status"):
    """Describe the daemon."""


class ListRequest(_Request, frozen=True, tag="streams.list"):
    """Describe the streams alone."""


class AddRequest(_Request, frozen=True, tag="streams.add"):
    """Add a stream until the next reload."""

    name: _Word
    settings: Annotated[dict[_Word, _Setting], msgspec.Meta(max_length=64)]  # as under `streams:` in the file


class RemoveRequest(_Request, frozen=True, tag="streams.remove"):
    """Remove a stream until the next reload."""

    name: _Word


class ReloadRequest(_Request, frozen=True, tag="reload"):
    """Read the configuration file again."""


class RollbackRequest(_Request, frozen=True, tag="rollback"):
    """Take a model back to the version before."""

    model: _Word


Request = StatusRequest | ListRequest | AddRequest | RemoveRequest | ReloadRequest | RollbackRequest


class StreamEntry(_Record, frozen=True):
    """One stream."""

    status: wire.StatusMessage
    model: str
    published: int  # results since the daemon started


class ModelEntry(_Record, frozen=True):
    """One model that is at work."""

    name: str  # in the configuration
    network: str
    sha256: str  # of its weights: which version it is
    devices: tuple[str, ...]
    previous: str | None = None  # sha256 of the version that a roll-back goes to
    on_probation: bool = False  # the version before stands by in memory
    last_event: str = ""  # what last became of a new version; empty before the first


class SpoolEntry(_Record, frozen=True):
    """What a spool holds."""

    entries: int  # that wait for Redis
    bytes: int  # of these, about
    accepted: int  # written to the disk since the start


class PublisherEntry(_Record, frozen=True, omit_defaults=True):
    """One publisher."""

    name: str
    healthy: bool
    sent: int
    dropped: int
    queued: int  # messages that wait in memory
    spool: SpoolEntry | None = None  # where it has one


class DaemonState(_Record, frozen=True):
    """The daemon as it is now."""

    version: str
    pid: int
    uptime_s: float
    streams: tuple[StreamEntry, ...]
    models: tuple[ModelEntry, ...]
    publishers: tuple[PublisherEntry, ...]


class Answer(_Record, frozen=True, omit_defaults=True):
    """What became of a request: an error, or what was asked for."""

    error: str | None = None
    is_final: bool = False  # of an error: asking again does not help, since what is asked for, or a model, is wrong
    done: str | None = None  # what changed, in words
    state: DaemonState | None = None
    streams: tuple[StreamEntry, ...] | None = None


class AnswerError(Exception):
    """A line is no request or no answer; says why."""


_request_decoder = msgspec.json.Decoder(Request)
_answer_decoder = msgspec.json.Decoder(Answer)


def decode_request(line: bytes) -> Request:
    """Read a line of a client that may send anything. Raises AnswerError."""
    try:
        request: Request = _request_decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
        raise AnswerError(str(err)) from err
    return request


def decode_answer(line: bytes) -> Answer:
    """Read the daemon's line. Raises AnswerError."""
    try:
        return _answer_decoder.decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as err:
        raise AnswerError(str(err)) from err


def encode(message: Request | Answer) -> bytes:
    """Write one line."""
    return msgspec.json.encode(message) + b"\n"
