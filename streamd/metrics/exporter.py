"""The daemon's own pages: /metrics for Prometheus, /healthz and /readyz for who restarts or routes."""

from __future__ import annotations

import logging
from http import HTTPStatus
from types import TracebackType

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest

from streamd.errors import PublishError
from streamd.metrics.collector import DaemonCollector, Observed
from streamd.metrics.endpoint import DEFAULT, Endpoint
from streamd.metrics.gpu import GpuCollector
from streamd.metrics.server import Page, PageServer
from streamd.metrics.tls import TlsFiles

logger = logging.getLogger(__name__)


class Exporter:
    """Serve what is observed, from `__enter__` to `__exit__`; once."""

    def __init__(self, listen: str | None, observed: Observed, tls: TlsFiles | None = None) -> None:
        """`listen` is the configuration's `metrics.listen`."""
        self._listen = listen
        self._observed = observed
        self._tls = tls
        self._registry = CollectorRegistry()
        self._server: PageServer | None = None

    @property
    def endpoint(self) -> Endpoint | None:
        """Where the pages are; None where they are not."""
        return self._server.endpoint if self._server else None

    def __enter__(self) -> Exporter:
        """Begin to serve.

        Raises ConfigError where the files of TLS are wrong, and PublishError where the address that was asked for
        cannot be had. One that nobody asked for is worth no outage: the default's port being taken, as by a second
        daemon, is a warning.
        """
        if self._listen is None:
            return self
        try:
            endpoint = DEFAULT if self._listen == "auto" else Endpoint.parse(self._listen)
            pages = {"/metrics": self._metrics, "/healthz": self._health, "/readyz": self._readiness}
            self._server = PageServer(endpoint, pages, self._tls.context() if self._tls else None)
        except PublishError as err:
            if self._listen != "auto":
                raise
            logger.warning("%s; going on without them", err)
            return self
        for collector in (DaemonCollector(self._observed), ProcessCollector(registry=None), GpuCollector()):
            self._registry.register(collector)
        self._server.start()
        logger.info("metrics: %s", self._server.endpoint)
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, at: TracebackType | None) -> None:
        if self._server:
            self._server.close()

    def _metrics(self) -> Page:
        return Page(HTTPStatus.OK, generate_latest(self._registry), CONTENT_TYPE_LATEST)

    def _health(self) -> Page:
        return _verdict("ok", self._observed.stuck())

    def _readiness(self) -> Page:
        return _verdict("ready", [] if self._observed.ready else ["starting or stopping"])


def _verdict(good: str, problems: list[str]) -> Page:
    status = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
    return Page(status, "".join(f"{line}\n" for line in problems or [good]).encode())
