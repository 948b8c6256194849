"""Pairs of CURVE keys for tests."""

from __future__ import annotations

from typing import NamedTuple

import zmq


class Pair(NamedTuple):
    public: str
    secret: str


def make_pair() -> Pair:
    public, secret = zmq.curve_keypair()
    return Pair(public.decode(), secret.decode())
