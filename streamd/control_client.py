"""Ask a running daemon over its control socket."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress
from os import environ
from pathlib import Path

from streamd.control import find_path
from streamd.control_messages import Answer, AnswerError, Request, decode_answer, encode
from streamd.errors import ConfigError, StreamdError

SYSTEM_PATH = Path("/run/streamd/control.sock")  # of a unit with RuntimeDirectory=streamd
_MAX_ANSWER_BYTES = 16 << 20


def ask(path: Path | None, request: Request, timeout_s: float, environment: Mapping[str, str] = environ) -> Answer:
    """Send a request and return the answer; without a path, the usual places are tried.

    Raises StreamdError where there is no daemon or it cannot do it now, and ConfigError where what is asked for, the
    configuration or a model is wrong, with its words.
    """
    path = path or _usual_path(environment)
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            with suppress(BrokenPipeError):  # it has refused before it read, and said why
                connection.sendall(encode(request))
            with connection.makefile("rb") as answers:
                line = answers.readline(_MAX_ANSWER_BYTES)
        answer = decode_answer(line)
    except TimeoutError as err:
        raise StreamdError(f"{path}: no answer for {timeout_s:g} s") from err
    except OSError as err:
        advice = "is the daemon running? --socket names another path, and another user needs sudo"
        raise StreamdError(f"cannot talk to a daemon on {path}: {err.strerror or err}; {advice}") from err
    except AnswerError as err:
        raise StreamdError(f"{path}: the connection ended without a whole answer: {err}") from err
    if answer.error is not None:
        raise (ConfigError if answer.is_final else StreamdError)(answer.error)
    return answer


def _usual_path(environment: Mapping[str, str]) -> Path:
    own = find_path("auto", environment)
    return own if own is not None and own.exists() else SYSTEM_PATH
