"""Where the exporter listens."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from streamd.addresses import is_loopback

_TCP = re.compile(r"tcp://(?:\[(?P<v6>[0-9a-fA-F:.%]+)\]|(?P<host>[^\[\]:/]+)):(?P<port>\d{1,5})")
_MAX_PATH_BYTES = 107  # Linux: sun_path, less its zero


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A TCP address, or the path of a Unix socket."""

    host: str = ""  # empty for a Unix socket
    port: int = 0  # 0 is any that is free
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Read tcp://ADDRESS:PORT or unix:///PATH. Raises ValueError that says what is wrong.

        A host name would be looked up at every start, and could name another machine by then: only `localhost` is one.
        """
        path = text.removeprefix("unix://")
        if path != text:
            if not path.startswith("/") or len(path.encode()) > _MAX_PATH_BYTES:
                raise ValueError(f"the path of a Unix socket begins with / and has at most {_MAX_PATH_BYTES} bytes")
            return cls(path=path)
        match = _TCP.fullmatch(text)
        if match is None or int(match["port"]) > 65535:
            raise ValueError("must read like tcp://127.0.0.1:9464, tcp://[::1]:9464 or unix:///run/streamd/metrics")
        host = "127.0.0.1" if match["host"] == "localhost" else match["v6"] or match["host"]
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError(f"'{host}' is no IP address; host names other than localhost are not taken") from None
        return cls(host=host, port=int(match["port"]))

    @property
    def is_local(self) -> bool:
        """Tell whether only this machine reaches it."""
        return bool(self.path) or is_loopback(self.host)

    def __str__(self) -> str:
        if self.path:
            return f"unix://{self.path}"
        return f"tcp://[{self.host}]:{self.port}" if ":" in self.host else f"tcp://{self.host}:{self.port}"


DEFAULT = Endpoint(host="127.0.0.1", port=9464)  # the port that OpenTelemetry gives an application's exporter
