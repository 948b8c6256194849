"""Say what went wrong in the operator's terms; the library's own text repeats the URL with its password."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence

import av.error

from streamd.errors import SourceError
from streamd.room import NO_FILES
from streamd.sources.options import SourceOptions

Said = Sequence[tuple[str, str]]  # what FFmpeg's log says: who, what

_REFUSED = re.compile(r"method ([A-Z_]+) failed: (\d+)")
_REDIRECTED = re.compile(r"Redirecting to (\S+)")
_NO_SESSION = ("454", "455", "459")  # what a camera says to PLAY when nothing was set up
_MEANINGS = {
    "453": "not enough bandwidth, or too many viewers",
    "454": "session not found",
    "461": "unsupported transport",
    "503": "busy or starting",
}


def open_error(err: Exception, options: SourceOptions, waited_s: float, said: Said) -> SourceError:
    """Translate what opening raised."""
    if getattr(err, "errno", None) in (errno.EMFILE, errno.ENFILE):
        return SourceError(NO_FILES)
    if isinstance(err, av.error.HTTPUnauthorizedError):
        return SourceError("the camera refuses the user name or password (401)", "unauthorized", permanent=True)
    if isinstance(err, av.error.HTTPForbiddenError):
        return SourceError("the camera allows this user no access to the path (403)", "unauthorized", permanent=True)
    if isinstance(err, av.error.HTTPNotFoundError):
        return SourceError("the camera has no such path (404); check the end of the URL", "not_found", permanent=True)
    if options.is_file or options.scheme == "v4l2":
        return _file_error(err)
    if waited_s >= options.open_timeout_s * 0.99 or is_timeout(err):
        return SourceError(f"no answer within {options.open_timeout_s:g} s", "unreachable")
    if tls := [what for who, what in said if who == "tls"]:
        return _tls_error(tls[-1])
    refused = refusal(said)
    if refused and refused[0] == "PLAY" and refused[1] in _NO_SESSION:
        return SourceError("its description (SDP) names no video that can be set up", "protocol_error")
    if refused or isinstance(err, av.error.HTTPClientError | av.error.HTTPServerError):
        return _rejected(refused)
    if isinstance(err, av.error.ConnectionRefusedError):
        return SourceError("the connection was refused; is the camera's port right?", "unreachable")
    if isinstance(err, EOFError) or any("End of file" in what for _, what in said):
        return SourceError("closed the connection before it sent anything", "unreachable")
    if isinstance(err, av.error.InvalidDataError | av.error.MemoryError | MemoryError):
        return SourceError(f"answered with something that is not {_protocol(options)}", "protocol_error")
    if isinstance(err, OSError):
        return SourceError(f"cannot be reached: {reason(err)} (does its name resolve?)", "unreachable")
    return SourceError(f"cannot be opened: {reason(err)}", "failed")


def refusal(said: Said) -> tuple[str, str] | None:
    """Return the last RTSP method that was refused, and the camera's status code."""
    for _, what in reversed(said):
        if found := _REFUSED.search(what):
            return found[1], found[2]
    return None


def redirection(said: Said) -> str | None:
    """Return where the camera sent us last."""
    for _, what in reversed(said):
        if found := _REDIRECTED.search(what):
            return found[1]
    return None


def _rejected(refused: tuple[str, str] | None) -> SourceError:
    if refused is None:
        return SourceError("the camera refuses to serve this", "rejected")
    method, code = refused
    meaning = f" {_MEANINGS[code]}" if code in _MEANINGS else ""
    return SourceError(f"the camera refuses {method}: {code}{meaning}", "rejected")


def _tls_error(what: str) -> SourceError:
    if "does not match hostname" in what:
        return SourceError("its certificate is for another name; see tls_verify", "tls_error", permanent=True)
    if "failed verification" in what:
        return SourceError("its certificate is not trusted; see ca_file", "tls_error", permanent=True)
    return SourceError(f"TLS failed: {what}", "tls_error")


def _protocol(options: SourceOptions) -> str:
    return "RTSP" if options.is_rtsp else "video"


def _file_error(err: Exception) -> SourceError:
    if isinstance(err, FileNotFoundError):
        return SourceError("there is no such file or device", "not_found", permanent=True)
    if isinstance(err, PermissionError):
        return SourceError("no permission to read the file or device", "failed", permanent=True)
    if isinstance(err, av.error.InvalidDataError):
        return SourceError("not a video or picture that FFmpeg can read", "failed", permanent=True)
    if isinstance(err, EOFError):
        return SourceError("the file ends before its first frame", "failed", permanent=True)
    return SourceError(f"cannot be opened: {reason(err)}", "failed", permanent=True)


def is_timeout(err: Exception) -> bool:
    return isinstance(err, av.error.ExitError | TimeoutError)


def reason(err: Exception) -> str:
    return getattr(err, "strerror", None) or type(err).__name__
