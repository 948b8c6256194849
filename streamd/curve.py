"""Keys of ZeroMQ's CURVE: how they are written, and what a subscriber needs of them.

A key is 40 characters of Z85, alone in its file. Each side has a pair: the secret key stays with its owner, the public
one goes to the other side.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from streamd.errors import SubscribeError
from streamd.redact import register_secret

PUBLIC_SUFFIX = ".public"
SECRET_SUFFIX = ".secret"
FORM = "must be a key as `streamd keys` makes them: 40 characters"

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_LENGTH, _GROUP = 40, 5  # five characters are a number of 32 bits
_MAX_FILE_BYTES = 1024


def is_key(text: str) -> bool:
    """Tell a key, of either kind, from other text."""
    if len(text) != _LENGTH or not set(text) <= set(_ALPHABET):
        return False
    groups = (text[start : start + _GROUP] for start in range(0, _LENGTH, _GROUP))
    return all(_number(group) < 2**32 for group in groups)


def _number(group: str) -> int:
    return functools.reduce(lambda value, digit: value * len(_ALPHABET) + _ALPHABET.index(digit), group, 0)


def read_key(path: Path) -> str:
    """Read a key file. Raises OSError, and ValueError where it holds something else."""
    with path.open("rb") as file:
        text = file.read(_MAX_FILE_BYTES).decode("ascii", "replace").strip()
    if not is_key(text):
        raise ValueError(FORM)
    return text


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """What a subscriber needs for a daemon that wants keys."""

    server: str  # the daemon's public key
    secret: str = field(repr=False)  # the subscriber's own

    def __post_init__(self) -> None:
        register_secret(self.secret)
        for whose, key in (("the daemon's public key", self.server), ("the own secret key", self.secret)):
            if not is_key(key):
                raise SubscribeError(f"{whose} {FORM}")

    @classmethod
    def read(cls, server: Path | str, secret: Path | str) -> ClientKeys:
        """Read both from their files, as `streamd keys` has made them. Raises SubscribeError."""
        return cls(_read(Path(server)), _read(Path(secret)))


def _read(path: Path) -> str:
    try:
        return read_key(path)
    except OSError as err:
        raise SubscribeError(f"cannot read the key {path}: {err.strerror}") from err
    except ValueError as err:
        raise SubscribeError(f"{path}: {err}") from err
