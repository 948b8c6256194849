"""The reader that users write before they look for a library: what streamd is compared with.

One OpenCV capture thread a stream, the latest frame behind a lock, and a main loop that puts what is new into one
batch. Nothing is slowed down on purpose: OpenCV, torch and the model run with the settings that they come with.

    python -m benchmarks.naive MODEL.pt tcp://127.0.0.1:5555 cam0=rtsp://... cam1=rtsp://...
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;tcp")  # read when cv2 opens a stream

import cv2
import numpy as np
import torch
import zmq
from torchvision.ops import batched_nms

PAD = 114
Image = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Capture:
    """A frame as OpenCV gave it."""

    image: Image  # [H, W, 3] BGR
    pts_s: float
    epoch: int
    taken_at: float
    num_dropped: int


class Camera(threading.Thread):
    """Read one stream and keep its latest frame."""

    def __init__(self, name: str, url: str, news: threading.Condition) -> None:
        super().__init__(name=name, daemon=True)
        self.stopping = threading.Event()
        self._url = url
        self._news = news
        self._latest: Capture | None = None
        self._num_dropped = 0

    def run(self) -> None:
        epoch = 0
        while not self.stopping.is_set():
            capture = cv2.VideoCapture(self._url, cv2.CAP_FFMPEG)
            while not self.stopping.is_set():
                ok, image = capture.read()
                if not ok:
                    break
                # Not CAP_PROP_POS_MSEC: on RTSP it is one frame behind (benchmarks/README.md).
                pts_s = capture.get(cv2.CAP_PROP_PTS) / capture.get(cv2.CAP_PROP_FPS)
                self._put(image, pts_s, epoch)
            if capture.isOpened():
                epoch += 1
            capture.release()
            self.stopping.wait(1)

    def _put(self, image: Image, pts_s: float, epoch: int) -> None:
        with self._news:
            if self._latest is not None:
                self._num_dropped += 1
            self._latest = Capture(image, pts_s, epoch, time.time(), self._num_dropped)
            self._news.notify()

    def take(self) -> Capture | None:
        """Return the latest frame once; the lock of `news` must be held."""
        latest, self._latest = self._latest, None
        return latest


class Detector:
    """The model with what is before and after it."""

    def __init__(self, path: str) -> None:
        extra_files = {"streamd.json": ""}
        self.model = torch.jit.load(path, _extra_files=extra_files)
        self.spec = json.loads(extra_files["streamd.json"])

    def letterbox(self, images: Sequence[Image]) -> tuple[torch.Tensor, list[float]]:
        """Return the batch [B, 3, H, W] float32 and the scale of each image."""
        height, width = self.spec["input_size"]
        batch = np.full((len(images), height, width, 3), PAD, dtype=np.uint8)
        scales = []
        for slot, image in zip(batch, images, strict=True):
            scale = min(height / image.shape[0], width / image.shape[1])
            resized = cv2.resize(image, (int(image.shape[1] * scale), int(image.shape[0] * scale)))
            slot[: resized.shape[0], : resized.shape[1]] = resized
            scales.append(scale)
        # A view and a conversion, so the memory stays channels-last, in which convolutions are faster on a CPU.
        return torch.from_numpy(batch).permute(0, 3, 1, 2).float(), scales

    def objects(self, boxes: torch.Tensor, scores: torch.Tensor, scale: float) -> list[dict[str, Any]]:
        """Return what is in one image as the wire format has it, by falling score."""
        nms = self.spec.get("nms", {})
        best, labels = scores.max(dim=1)
        sure = best >= nms.get("score_threshold", 0.3)
        boxes, best, labels = boxes[sure], best[sure], labels[sure]
        keep = batched_nms(boxes, best, labels, nms.get("iou_threshold", 0.45))[: nms.get("max_detections", 100)]
        rows = zip((boxes[keep] / scale).tolist(), best[keep].tolist(), labels[keep].tolist(), strict=True)
        return [
            {
                "label": self.spec["labels"][label],
                "label_id": label,
                "score": round(score, 4),
                "box": [round(value, 2) for value in box],
            }
            for box, score, label in rows
        ]


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    model, bind, *streams = sys.argv[1:]
    socket = zmq.Context().socket(zmq.PUB)
    socket.bind(bind)
    detector = Detector(model)
    news = threading.Condition()
    cameras = [Camera(name, url, news) for name, _, url in (stream.partition("=") for stream in streams)]
    for camera in cameras:
        camera.start()
    seqs = dict.fromkeys((camera.name for camera in cameras), 0)
    while True:
        with news:
            while not (taken := [(c.name, frame) for c in cameras if (frame := c.take()) is not None]):
                news.wait()
        for message in detect(detector, taken):
            message["seq"] = seqs[message["stream"]]
            seqs[message["stream"]] += 1
            topic = f"streamd/{message['stream']}/detections"
            socket.send_multipart([topic.encode(), json.dumps(message).encode()])


def detect(detector: Detector, taken: Sequence[tuple[str, Capture]]) -> list[dict[str, Any]]:
    """Return a message for each frame, without its number."""
    began = time.time()
    images, scales = detector.letterbox([frame.image for _, frame in taken])
    with torch.inference_mode():
        output = detector.model(images)
    inferred = time.time()
    messages = []
    for (stream, frame), boxes, scores, scale in zip(taken, output["boxes"], output["scores"], scales, strict=True):
        objects = detector.objects(boxes, scores, scale)
        done = time.time()
        captured_at = datetime.fromtimestamp(frame.taken_at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        messages.append(
            {
                "schema": 1,
                "stream": stream,
                "epoch": frame.epoch,
                "pts": frame.pts_s,
                "captured_at": captured_at,
                "clock": "arrival",
                "width": frame.image.shape[1],
                "height": frame.image.shape[0],
                "model": {"name": detector.spec["name"], "sha256": detector.spec["weights_sha256"]},
                "objects": objects,
                "ms": {
                    "decode": 0.0,  # OpenCV does not tell
                    "wait": (began - frame.taken_at) * 1e3,
                    "infer": (inferred - began) * 1e3,
                    "post": (done - inferred) * 1e3,
                    "total": (done - frame.taken_at) * 1e3,
                },
                "dropped": frame.num_dropped,
            }
        )
    return messages


if __name__ == "__main__":
    main()
