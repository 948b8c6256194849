"""A second daemon, for faults that a daemon does not outlive or that must be there when it starts."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.faults.bench import Bench, make_config
from benchmarks.readers import free_endpoint
from tests.daemon_process import DaemonProcess


def second_config(bench: Bench, streams: Mapping[str, Any], redis_url: str | None = None) -> dict[str, Any]:
    """Write down a daemon of the same model with a folder of its own."""
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    model = Path(bench.config["models"]["tiny"]["path"])
    config = make_config(folder, model, streams, redis_url or bench.redis.url)
    if redis_url is None:
        config["publish"]["redis"] = None
    return config


@contextmanager
def second_daemon(
    bench: Bench, config: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Iterator[DaemonProcess]:
    """Run it in a folder of its own; `config` may be that of one that has ended."""
    folder = Path(tempfile.mkdtemp(dir=bench.folder))
    process = DaemonProcess(folder, dict(config), dict(environment or {}))
    with process as daemon, daemon.read_notifications():
        yield daemon


def moved(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give a configuration other ports, for a start while the ones before are not free yet."""
    publish = {**config["publish"], "zeromq": {**config["publish"]["zeromq"], "bind": free_endpoint()}}
    return {**config, "publish": publish, "metrics": {**config["metrics"], "listen": free_endpoint()}}
