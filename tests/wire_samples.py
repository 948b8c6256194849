"""Results and messages as the daemon makes them, for tests of the wire and of both its ends."""

from __future__ import annotations

import numpy as np
import torch
from pycocotools import mask as coco

from streamd.announce import detections_message, status_message
from streamd.messages import Detections, Frame, Picture, Result, Rle, StageTimes, Stamp, Status, StreamState
from streamd.publish import Outgoing
from streamd.wire import DetectionsMessage, Format, encode

LABELS = ("person", "bicycle", "car")
CAPTURED_AT = 1769853600.123456  # 2026-01-31T10:00:00.123456Z


def disc(height: int, width: int, radius: int) -> np.ndarray:
    """Return a bool [height, width] with a disc in its middle."""
    y, x = np.ogrid[:height, :width]
    return (y - height // 2) ** 2 + (x - width // 2) ** 2 <= radius**2


def body(height: int, width: int, num_parts: int = 24) -> np.ndarray:
    """Make a chart as plausible as can be without a network: parts that meet in a body, smooth U and V on each."""
    random = np.random.default_rng(0)
    y, x = (np.mgrid[:height, :width] + 0.5) / np.array([height, width])[:, None, None]
    middles = random.random((num_parts, 2))
    part = ((y[..., None] - middles[:, 0]) ** 2 * 2 + (x[..., None] - middles[:, 1]) ** 2).argmin(-1) + 1
    limbs = 0.15 * np.sin(9 * np.arctan2(y - 0.5, x - 0.5))
    part *= ((x - 0.5) / 0.42) ** 2 + ((y - 0.5) / 0.48) ** 2 + limbs < 1
    turn = random.random(num_parts + 1)[part] * 2 * np.pi
    across, down = x - middles[part - 1, 1], y - middles[part - 1, 0]
    u = 0.5 + 2.2 * (np.cos(turn) * across + np.sin(turn) * down) + across * down
    v = 0.5 + 2.2 * (np.cos(turn) * down - np.sin(turn) * across) + across**2
    coordinates = np.stack((u, v)) + 0.002 * random.standard_normal((2, height, width))
    planes = np.concatenate((part[None], (coordinates.clip(0, 1) * 255).round() * (part > 0)))
    return planes.astype(np.uint8)


def rle(pixels: np.ndarray) -> Rle:
    counts = coco.encode(np.asfortranarray(pixels, dtype=np.uint8))["counts"]
    return Rle(height=pixels.shape[0], width=pixels.shape[1], counts=counts)


def make_result(stream: str = "gate", num_objects: int = 2, masks: tuple[Rle, ...] | None = None) -> Result:
    pixel = torch.zeros(1, 1, dtype=torch.uint8)
    frame = Frame(
        stream=stream,
        seq=40,
        pts_s=41.1333333333,
        stamp=Stamp(epoch=2, arrived_ns=1, arrived_at=CAPTURED_AT + 0.25, captured_at=CAPTURED_AT, clock="sender"),
        decode_ms=3.1,
        picture=Picture(planes=(pixel,), layout="rgb", matrix="bt709", full_range=True, rotation=0),
        width=1920,
        height=1080,
        keyframe=False,
        corrupt=False,
    )
    corner = np.arange(num_objects, dtype=np.float32)[:, None] * 10
    detections = Detections(
        boxes=corner + np.array([1.23456, 2.5, 101.98765, 302.0], dtype=np.float32),
        scores=np.linspace(0.93, 0.31, num_objects, dtype=np.float32),
        labels=np.arange(num_objects, dtype=np.int64) % len(LABELS),
        masks=masks,
    )
    times = StageTimes(decode=3.1234, wait=4.0, infer=6.2, post=0.8, total=15.0001)
    return Result(frame=frame, detections=detections, times=times, dropped=3, model="people")


def make_message(stream: str = "gate", seq: int = 0) -> DetectionsMessage:
    return detections_message(make_result(stream), seq, LABELS, sha256="")


def make_status(stream: str = "gate", state: StreamState = StreamState.RUNNING, reason: str = "") -> Status:
    return Status(
        stream=stream,
        state=state,
        reason=reason,
        decoder="software: no GPU",
        at=CAPTURED_AT,
        retry_in_s=None,
        reconnects=1,
        frames=10,
        dropped=2,
        corrupt=0,
    )


def outgoing(stream: str = "gate", seq: int = 0, format: Format = "json") -> Outgoing:
    return Outgoing(stream, "detections", encode(make_message(stream, seq), format))


def outgoing_status(stream: str = "gate", format: Format = "json") -> Outgoing:
    return Outgoing(stream, "status", encode(status_message(make_status(stream)), format))
