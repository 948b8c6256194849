"""Which addresses only this machine can reach."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine alone. A name other than `localhost` may be any machine."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_local_zeromq(address: str) -> bool:
    """Tell whether only this machine reaches what ZeroMQ binds: a path, or a loopback address."""
    host, _, _ = address.removeprefix("tcp://").rpartition(":")
    return not address.startswith("tcp://") or is_loopback(host.removeprefix("[").removesuffix("]"))
