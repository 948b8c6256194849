"""Where the exporter may listen, and what the configuration refuses."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from streamd.config import MetricsConfig
from streamd.metrics.endpoint import DEFAULT, Endpoint


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("tcp://127.0.0.1:9464", Endpoint("127.0.0.1", 9464)),
        ("tcp://localhost:0", Endpoint("127.0.0.1", 0)),
        ("tcp://[::1]:80", Endpoint("::1", 80)),
        ("tcp://0.0.0.0:65535", Endpoint("0.0.0.0", 65535)),
        ("unix:///run/streamd/metrics", Endpoint(path="/run/streamd/metrics")),
    ],
)
def test_an_address_is_read_as_what_it_says(text: str, endpoint: Endpoint) -> None:
    assert Endpoint.parse(text) == endpoint
    assert Endpoint.parse(str(endpoint)) == endpoint


@pytest.mark.parametrize(
    "text",
    [
        "",
        "9464",
        "127.0.0.1:9464",
        "http://127.0.0.1:9464",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:65536",
        "tcp://127.0.0.1:-1",
        "tcp://127.0.0.1:9464/metrics",
        "tcp://::1:80",
        "tcp://*:9464",
        "tcp://metrics.example:9464",
        "unix://metrics",
        "unix://" + "/long" * 30,
        "unix://",
    ],
)
def test_what_is_no_address_is_refused_with_the_reason(text: str) -> None:
    with pytest.raises(ValueError, match=r"must read like|is no IP address|path of a Unix socket"):
        Endpoint.parse(text)
    with pytest.raises(ValidationError):
        MetricsConfig(listen=text)


@pytest.mark.parametrize(
    "text", ["tcp://0.0.0.0:9464", "tcp://192.0.2.1:9464", "tcp://[::]:9464", "tcp://[2001:db8::1]:1"]
)
def test_an_address_that_other_machines_reach_needs_the_word_insecure(text: str) -> None:
    with pytest.raises(ValidationError, match="insecure: true"):
        MetricsConfig(listen=text)
    assert MetricsConfig(listen=text, insecure=True).listen == text


@pytest.mark.parametrize("text", ["auto", None, "tcp://127.0.0.1:0", "tcp://127.8.8.8:1", "tcp://[::1]:1", "unix:///x"])
def test_this_machine_needs_no_permission(text: str | None) -> None:
    assert MetricsConfig(listen=text).listen == text


def test_the_default_stays_on_this_machine() -> None:
    assert DEFAULT.is_local
