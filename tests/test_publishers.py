"""Publishers are exchanged one by one, and a change that fails leaves those at work alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from streamd.changes import difference
from streamd.config import Config
from streamd.errors import PublishError
from streamd.publishers import Publishers
from tests.redis_server import free_port

WITHIN_S = 30.0


def config_with(publish: dict[str, Any]) -> Config:
    return Config.model_validate(
        {"models": {"m": {"path": "a.pt"}}, "streams": {"gate": {"url": "a.mp4"}}, "publish": publish}
    )


class Running:
    """Publishers at work, and the configuration that they are of."""

    def __init__(self) -> None:
        self.config = config_with({"zeromq": {"bind": f"tcp://127.0.0.1:{free_port()}"}})
        self.crashes: list[Exception] = []
        self.publishers = Publishers(self.config.publish, self.crashes.append)
        self.publishers.start()

    def change_to(self, publish: dict[str, Any]) -> None:
        new = config_with(publish)
        names = difference(self.config, new).publishers
        fresh = self.publishers.prepare(new.publish, names)
        self.publishers.retire(self.publishers.exchange(fresh, names, new.publish))
        self.config = new


@pytest.fixture
def running() -> Iterator[Running]:
    made = Running()
    yield made
    made.publishers.stop(WITHIN_S)
    assert made.crashes == []


def test_another_address_is_another_publisher_and_the_old_one_ends(running: Running) -> None:
    [old] = running.publishers.all
    running.change_to({"zeromq": {"bind": f"tcp://127.0.0.1:{free_port()}"}})
    [new] = running.publishers.all
    assert new is not old and new.healthy
    assert not old.healthy, "its thread has ended"


def test_what_did_not_change_stays_and_takes_the_new_queue_size(running: Running) -> None:
    [old] = running.publishers.all
    assert running.config.publish.zeromq is not None
    running.change_to({"zeromq": {"bind": running.config.publish.zeromq.bind}, "queue_size": 7})
    assert running.publishers.all == [old] and old.healthy
    assert old.queue_size == 7


def test_an_address_that_cannot_be_had_changes_nothing(running: Running) -> None:
    [old] = running.publishers.all
    with pytest.raises(PublishError, match="no such address"):
        running.change_to({"zeromq": {"bind": "tcp://192.0.2.1:5555", "insecure": True}})
    assert running.publishers.all == [old] and old.healthy


def test_all_may_be_switched_off(running: Running) -> None:
    running.change_to({"zeromq": None})
    assert not running.publishers.all and not running.publishers.outlets
