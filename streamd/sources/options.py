"""What a source is told, and how FFmpeg is told the same."""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass, field
from urllib.parse import quote, unquote, urlsplit

_RTSP_OPTIONS = {
    "allowed_media_types": "video",  # audio and metadata tracks are neither received nor parsed
    "probesize": "32",  # stop probing at once: the SDP names the codec, and the decoder reads the rest in band
    "analyzeduration": "0",
    "fflags": "+noparse+nofillin",  # give the pieces as they come; see access_units.py
    "max_streams": "16",  # a description may name any number
}
_UDP_BUFFER_BYTES = 1 << 20  # a key frame comes in one burst, while the thread may decode the one before
_CA_FILES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem")
_HOST = re.compile(r"(\[[0-9a-fA-F:.%]+\]|[^/?#:@]+)(:\d+)?([/?#]|$)")


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """What to open, and how long to wait for it."""

    url: str = field(repr=False)  # may hold a password
    transport: str = "tcp"  # rtsp and rtsps: "tcp" or "udp"
    open_timeout_s: float = 5.0
    read_timeout_s: float = 5.0
    tls_verify: bool = True  # rtsps and https
    ca_file: str | None = None  # who signs the camera's certificate; None: whom the system trusts

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme if "://" in self.url else "file"

    @property
    def is_file(self) -> bool:
        return self.scheme == "file"

    @property
    def is_network(self) -> bool:
        return self.scheme not in ("file", "v4l2")

    @property
    def is_rtsp(self) -> bool:
        return self.scheme in ("rtsp", "rtsps")


def arguments(options: SourceOptions, transport: str) -> tuple[str, str | None, dict[str, str]]:
    """Map a URL of ours to PyAV's (file, format, options)."""
    url = options.url
    match options.scheme:
        case "rtsp" | "rtsps":
            rtsp = {**_RTSP_OPTIONS, **_tls(options), "rtsp_transport": transport}
            if transport == "udp":
                rtsp["buffer_size"] = str(_UDP_BUFFER_BYTES)
            return with_encoded_login(url), None, rtsp
        case "v4l2":
            return url.removeprefix("v4l2://"), "video4linux2", {}
        case "file":
            return url.removeprefix("file://"), None, {}
        case _:
            return with_encoded_login(url), None, _tls(options)


def _tls(options: SourceOptions) -> dict[str, str]:
    """Verify the camera's certificate, its name included, which FFmpeg leaves out unless told."""
    if options.scheme not in ("rtsps", "https"):
        return {}
    if not options.tls_verify:
        return {"tls_verify": "0"}
    ca_file = options.ca_file or _system_ca_file()
    return {"tls_verify": "1", **({"ca_file": ca_file} if ca_file else {})}


def _system_ca_file() -> str | None:
    """Name the authorities that this machine trusts; FFmpeg's own TLS library looks where it was built."""
    known = ssl.get_default_verify_paths().cafile
    return next((path for path in (known, *_CA_FILES) if path and os.path.isfile(path)), None)


def with_encoded_login(url: str) -> str:
    """Percent-encode user and password, which people write as they are.

    A password with an @ that is followed by what looks like a host is beyond guessing; written with %40 it works.
    """
    scheme, _, rest = url.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        login = authority.rpartition("@")[0]
    else:
        # A / ? or # in the password: it goes on to the last @ that a host follows.
        ends = [found.start() for found in re.finditer("@", rest) if _HOST.match(rest, found.end())]
        if not ends or _HOST.match(rest):
            return url
        login = rest[: ends[-1]]
    user, colon, password = login.partition(":")
    encoded = quote(unquote(user), safe="") + colon + quote(unquote(password), safe="")
    return f"{scheme}://{encoded}@{rest[len(login) + 1 :]}"


def with_login_of(url: str, target: str) -> str | None:
    """Put the user and password of a URL into another one of the same host; None where they do not belong there."""
    own, other = urlsplit(with_encoded_login(url)), urlsplit(target)
    login, at, _ = own.netloc.rpartition("@")
    if not at or "@" in other.netloc or own.hostname != other.hostname:
        return None
    return f"{other.scheme}://{login}@{target.partition('://')[2]}"
